import pytest
import torch

import manyscale as ms
from manyscale.config import Preprocess
from tests.conftest import loud

MICRO = {"image_size": 32, "patch": 4, "window": 4, "width": 16, "depths": (2, 2), "heads": (2, 4), "classes": 5}


def net(**fields):
    return loud(ms.create_model("swinv2_tiny", **{**MICRO, **fields})).eval().double()


@pytest.mark.parametrize("bias", ["log-cpb", "linear-cpb"])
def test_a_continuous_bias_comes_back_to_the_last_bit(bias):
    model, x = net(bias=bias), torch.randn(2, 3, 32, 32).double()
    there = ms.transfer(model, 64, 8)
    assert there.config.windows == ((8, 8), (8, 8)) and there.config.pretrained_windows == model.config.windows == ((4, 4), (4, 4))
    further = ms.transfer(there, 96, 12)
    assert further.config.pretrained_windows == ((4, 4), (4, 4))  # stays at the window it learnt at
    assert torch.equal(ms.transfer(further, 32, 4)(x), model(x))


def test_the_bias_at_old_offsets_does_not_move_under_log_cpb_but_does_under_a_table():
    """What the paper's transfer rests on: a larger window asks the same network at the same coordinates, and more."""
    from manyscale.studies.report import bias_map

    with torch.no_grad():
        for bias, same in (("log-cpb", True), ("table", False)):
            model = net(bias=bias)
            old, new = bias_map(model), bias_map(ms.transfer(model, 64, 8))
            assert torch.allclose(new[:, 4:11, 4:11], old, atol=1e-6) == same


def test_a_table_is_resized_both_ways():
    model, x = net(bias="table"), torch.randn(2, 3, 32, 32).double()
    for method in ("bicubic", "geometric"):
        there = ms.transfer(model, 64, 8, table=method)
        assert there(torch.randn(1, 3, 64, 64).double()).isfinite().all()
        back = ms.transfer(there, 32, 4, table=method)
        assert not torch.equal(back(x), model(x))  # an approximation, and said to be
    assert torch.equal(ms.transfer(model, 32, 4)(x), model(x))


def test_the_head_is_kept_or_replaced_and_the_model_left_alone():
    model = net()
    model.labels, model.preprocess = tuple("abcde"), Preprocess(image_size=(32, 32))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = ms.transfer(model, 64, 8)
    assert torch.equal(kept.head.weight, model.head.weight) and kept.labels == model.labels
    assert kept.preprocess.image_size == (64, 64)
    new = ms.transfer(model, 64, 8, classes=3)
    assert new.head.weight.shape == (3, 32) and new.labels == ()
    assert ms.transfer(model, 64, classes=0)(torch.randn(1, 3, 64, 64).double()).shape == (1, 32)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shapes_per_axis_and_clipping():
    model = net()
    wide = ms.transfer(model, (32, 64), (4, 8))
    assert wide.config.windows == ((4, 8), (4, 8))
    clipped = ms.transfer(model, 32, 64)
    assert clipped.config.windows == ((8, 8), (4, 4))  # never larger than the grid
    with pytest.raises(ValueError, match="field `window`"):
        ms.transfer(model, 32, 0)


def test_clips():
    video = loud(
        ms.create_model("swinv2_tiny", **{**MICRO, "image_size": (4, 32, 32), "patch": (2, 4, 4), "window": (2, 4, 4), "bias": "table"})
    ).eval()
    longer = ms.transfer(video, (8, 64, 64), (4, 8, 8))
    assert longer(torch.randn(1, 3, 8, 64, 64)).shape == (1, 5)
