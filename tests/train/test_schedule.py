import math
from dataclasses import replace

import pytest

from manyscale.config import Optim, Run, Schedule
from manyscale.recipes import RECIPES
from manyscale.train.schedule import rate, warmup_steps

RUN = Run(optim=Optim(lr=1.0, min_lr=0.1, warmup_lr=0.2), schedule=Schedule(epochs=10, warmup=1), batch=8)


def test_warm_up_is_linear_and_the_cosine_takes_the_rest():
    assert warmup_steps(RUN, 100, 10) == 10
    assert [round(rate(RUN, step, 100, 10), 6) for step in (0, 5, 10, 55, 100)] == [0.2, 0.6, 1.0, 0.55, 0.1]
    # golden value: 1/4 through the cosine
    assert rate(RUN, 32, 98, 10) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 88)))


def test_rates_scale_with_the_batch_only_where_the_recipe_says_so():
    run = RECIPES["imagenet_swinv2_tiny_window8"]()
    steps, epoch = 300 * 1251, 1251
    peak = rate(run, 20 * epoch, steps, epoch)
    assert peak == pytest.approx(1e-3)  # 5e-4 per 512 images, batch 1024
    assert rate(run, 0, steps, epoch) == pytest.approx(1e-6)
    assert rate(run, steps, steps, epoch) == pytest.approx(1e-5)
    assert rate(replace(run, batch=512), 20 * epoch, steps, epoch) == pytest.approx(peak / 2)
    assert rate(replace(RUN, batch=512), 10, 100, 10) == 1.0


def test_milestones_are_tenths_at_their_epochs_whatever_the_length():
    run = replace(RUN, schedule=Schedule(epochs=10, warmup=1, milestones=(5, 9)))
    assert [round(rate(run, step, 100, 10), 6) for step in (0, 5, 10, 49, 50, 89, 90, 99)] == [0.2, 0.6, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [round(rate(run, step, 40, 10), 6) for step in (19, 20, 35, 36)] == [1, 0.1, 0.1, 0.01]  # cut short by a budget
    run = RECIPES["simmim_imagenet_swinv2_base"]()
    epoch = 625  # of 1.28 million pictures
    assert [rate(run, e * epoch, 800 * epoch, epoch) for e in (0, 10, 699, 700, 799)] == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5])
    for wrong in ((5, 3), (10,), (0,)):
        with pytest.raises(ValueError, match="field `milestones`"):
            Schedule(epochs=10, milestones=wrong)


def test_a_run_cut_short_still_warms_up_and_cools_down():
    run = replace(RUN, schedule=Schedule(epochs=10, warmup=20))
    assert warmup_steps(run, 100, 10) == 20
    assert rate(run, 99, 100, 10) < 0.11
