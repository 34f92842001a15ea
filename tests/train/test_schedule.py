import math
from dataclasses import replace

import pytest

from manyscale.config import Optim, Run, Schedule, in_steps
from manyscale.config.durations import parts
from manyscale.recipes import RECIPES
from manyscale.train.schedule import evaluation_steps, planned_steps, rate, total_rate, warmup_steps

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


VIT_G = Run(
    optim=Optim(lr=8e-4, warmup_lr=0.0, weight_decay=0.03, head_decay=3.0),
    schedule=Schedule(length="1M-steps", warmup="10k-steps", curve="rsqrt", cooldown="50k-steps"),
    batch=16_384,
)


def test_rsqrt_with_cooldown_is_that_of_the_paper():
    """Golden values of the original configuration, from the facts; the time scale is the warm-up's, as there."""
    steps = planned_steps(VIT_G, 1)
    assert steps == 1_000_000
    golden = {0: 0.0, 5_000: 4e-4, 10_000: 8e-4, 20_000: 5.66e-4, 110_000: 2.41e-4, 500_000: 1.13e-4, 950_000: 8.2e-5}
    assert [rate(VIT_G, step, steps, 1) for step in golden] == pytest.approx(list(golden.values()), rel=5e-3, abs=1e-12)

    def exact(step):
        return 8e-4 / math.sqrt(1 + (step - 10_000) / 10_000)

    assert rate(VIT_G, 975_000, steps, 1) == pytest.approx(exact(975_000) / 2)  # the cooldown multiplies a rate that still falls
    assert rate(VIT_G, 999_999, steps, 1) == pytest.approx(exact(999_999) / 50_000)
    assert [rate(VIT_G, step, steps, 1) for step in (10**6, 10**6 + 1, 2 * 10**6)] == [0, 0, 0]  # never below zero
    # 146 of the published sum, so that the decay takes weights to e^-4.4 of themselves and the head to e^-438
    assert total_rate(VIT_G, steps, 1) == pytest.approx(146, rel=0.01)


def test_total_rate_is_the_sum():
    for run in (RUN, replace(RUN, schedule=Schedule(epochs=10, warmup=1, curve="linear", cooldown="20%"))):
        for steps in (1, 7, 100, 12_345):
            total = math.fsum(rate(run, step, steps, 10) for step in range(steps))
            assert total_rate(run, steps, 10) == pytest.approx(total, rel=1e-3)


def test_curves():
    line = replace(RUN, schedule=Schedule(epochs=10, warmup=1, curve="linear"))
    assert [round(rate(line, step, 100, 10), 6) for step in (0, 5, 10, 55, 100)] == [0.2, 0.6, 1.0, 0.55, 0.1]
    flat = replace(RUN, schedule=Schedule(epochs=10, warmup=1, curve="constant", cooldown="30-steps"))
    assert [round(rate(flat, step, 100, 10), 6) for step in (5, 10, 50, 70, 85, 100, 130)] == [0.6, 1, 1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="field `cooldown`: '30-steps' are 30 steps, longer than the run of 20"):
        rate(flat, 0, 20, 10)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(3, 30), (0.5, 5), ("3", 30), ("3 epochs", 30), ("1-epoch", 10), ("500-steps", 500), ("20k-steps", 20_000), ("1.5M images", 187_500),
     ("9_images", 2), ("1B-images", 125_000_000), ("5%", 10), ("12.5 %", 25), ("0.2k-Steps", 200)],
)  # fmt: skip
def test_durations(duration, steps):
    assert in_steps(duration, steps=200, steps_per_epoch=10, batch=8) == steps


@pytest.mark.parametrize("wrong", ["", "steps", "5 parsecs", "-3", "1e", "5k%%", "1,5", -1, math.inf, math.nan])
def test_what_is_no_duration(wrong):
    with pytest.raises(ValueError, match="is not a duration; write 3"):
        parts(wrong)
    with pytest.raises(ValueError, match="field `warmup`"):
        Schedule(warmup=wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": "5%"}, "field `length`: .* in steps, epochs or images"),
        ({"length": "0-steps"}, "field `length`: .* longer than nothing"),
        ({"evaluate_every": 0}, "field `evaluate_every`"),
        ({"cooldown": "101%"}, "field `cooldown`: .* at most 100%"),
        ({"branches": ("10-steps",)}, "field `curve`: a trunk"),
        ({"branches": ("10-steps",), "curve": "rsqrt"}, "field `cooldown`: branches are cooldowns"),
        ({"branches": ("10-steps",), "curve": "rsqrt", "cooldown": "10%", "time": "3m"}, "field `time`"),
        ({"branches": ("10-steps",), "curve": "constant", "cooldown": "10%", "warmup": "1%"}, "field `warmup`: per cent of which"),
        ({"branches": ("10%",), "curve": "constant", "cooldown": "10%"}, "field `branches`"),
    ],
)
def test_schedules_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_lengths():
    assert planned_steps(RUN, 10) == 100
    assert planned_steps(replace(RUN, schedule=Schedule(length="4k-images")), 10) == 500
    assert evaluation_steps(RUN, 100, 10) == 10
    assert evaluation_steps(replace(RUN, schedule=Schedule(evaluate_every="25%")), 100, 10) == 25
    assert evaluation_steps(replace(RUN, schedule=Schedule(evaluate_every=0.01)), 100, 10) == 1
