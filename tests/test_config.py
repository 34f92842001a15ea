"""Settings: what they refuse, how they are written and read back, and the windows they lay out."""

import dataclasses
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import manyscale.config as config
from manyscale.config import Augment, Input, Optim, Preprocess, Run, Schedule, SwinConfig, from_dict, nearest, seconds, to_dict

KINDS = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]
fractions = st.floats(0, 1, exclude_max=True)
rates = st.floats(1e-9, 1e3)
some = settings(max_examples=60, deadline=None)


@st.composite
def swins(draw):
    axes, stages = draw(st.sampled_from([2, 3])), draw(st.integers(1, 4))
    window = st.integers(1, 40)
    sides, each = st.tuples(*[st.integers(1, 500)] * axes), st.tuples(*[window] * axes)
    heads = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))
    return SwinConfig(
        image_size=draw(sides) if axes == 3 else draw(sides | st.integers(1, 500)),
        patch=draw(st.integers(1, 9) | st.tuples(*[st.integers(1, 9)] * axes)),
        width=4 * draw(st.integers(1, 99)),
        depths=tuple(draw(st.lists(st.integers(1, 50), min_size=stages, max_size=stages))),
        heads=tuple(heads),
        window=draw(window | each | st.tuples(*[each] * stages)),
        mlp_ratio=draw(st.floats(0.5, 9)),
        norm=draw(st.sampled_from(["pre", "post", "sandwich", "res-post"])),
        zero_init=draw(st.booleans()),
        drop_path=draw(fractions),
    )


runs = st.builds(
    Run,
    model=swins(),
    input=st.builds(Input, data=st.text(), holdout=st.floats(0.01, 0.99), cache=st.booleans()),
    augment=st.builds(Augment, scale=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)), crop=st.sampled_from(["resized", "pad", "none"])),
    optim=st.builds(Optim, lr=rates, clip=rates, betas=st.tuples(fractions, fractions)),
    schedule=st.builds(Schedule, epochs=st.integers(1, 999), time=st.sampled_from(["", "30m", "1h30m"])),
    batch=st.integers(1, 4096),
    seed=st.integers(0, 2**63 - 1),
    out=st.text(),
)
preprocesses = st.builds(Preprocess, image_size=st.tuples(st.integers(1, 999), st.integers(1, 999)), mean=st.tuples(rates, rates, rates))


def json_of(value):
    return json.loads(json.dumps(to_dict(value)))


@some
@given(runs | preprocesses)
def test_round_trip_through_json(value):
    assert from_dict(type(value), json_of(value)) == value
    assert json_of(value) == to_dict(value)  # nothing in the dict that JSON would change


@pytest.mark.parametrize("kind", KINDS)
def test_defaults(kind):
    assert from_dict(kind, {}) == kind() == from_dict(kind, json_of(kind()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, 1)
    with pytest.raises(TypeError):
        kind(1)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_fields_name_the_nearest(kind):
    for field in dataclasses.fields(kind):
        with pytest.raises(ValueError, match=rf"run.json: unknown field `{field.name}x` of {kind.__name__}; did you mean `"):
            from_dict(kind, {field.name + "x": 1}, "run.json")
    with pytest.raises(ValueError, match="did you mean `mlp_ratio`"):
        from_dict(SwinConfig, {"mpl_ratio": 4})
    with pytest.raises(ValueError, match="field `optim`: unknown field `learning` of Optim; known: "):
        from_dict(Run, {"optim": {"learning": 1}})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (SwinConfig, {"width": "96"}),
        (SwinConfig, {"width": 96.0}),
        (SwinConfig, {"width": True}),
        (SwinConfig, {"depths": 2}),
        (SwinConfig, {"depths": [2, 2, "6", 2]}),
        (SwinConfig, {"norm": "prenorm"}),
        (SwinConfig, {"norm": ["pre"]}),
        (SwinConfig, {"zero_init": 1}),
        (SwinConfig, {"mlp_ratio": "4"}),
        (SwinConfig, {"mlp_ratio": True}),
        (SwinConfig, {"window": 8.0}),
        (SwinConfig, {"window": [[8, 8], "8"]}),
        (SwinConfig, {"image_size": None}),
        (Optim, {"betas": [0.9]}),
        (Optim, {"betas": [0.9, 0.99, 0.999]}),
        (Run, {"model": 3}),
        (Run, {"model": None}),
        (Run, {"seed": None}),
        (Preprocess, {"image_size": 224}),
    ],
)
def test_wrong_types(kind, fields):
    with pytest.raises(ValueError, match=rf"here: field `{next(iter(fields))}`: expected "):
        from_dict(kind, fields, "here")


def test_not_a_dict():
    with pytest.raises(ValueError, match="expected fields of Run, found "):
        from_dict(Run, [1])


def test_whole_numbers_are_floats_too():
    assert type(from_dict(SwinConfig, {"mlp_ratio": 4}).mlp_ratio) is float


RATES = ("lr", "min_lr", "warmup_lr", "weight_decay", "eps", "clip")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((SwinConfig, {name: 0}) for name in ("width", "channels", "image_size", "patch", "window", "mlp_ratio")),
        *((SwinConfig, {name: -1}) for name in ("classes", "pretrained_window", "extra_norm_every", "drop_path", "dropout")),
        (SwinConfig, {"window": (8, 0)}),
        (SwinConfig, {"window": ()}),
        (SwinConfig, {"window": (8, 8, 8)}),
        (SwinConfig, {"window": ((8, 8), (8, 8), (8, 8), (8,))}),
        (SwinConfig, {"heads": (3, 6, 12, 25)}),
        (SwinConfig, {"heads": (3, 6, 12)}),
        (SwinConfig, {"heads": (0, 6, 12, 24)}),
        (SwinConfig, {"depths": ()}),
        (SwinConfig, {"depths": (2, 0, 6, 2)}),
        (SwinConfig, {"image_size": (256,)}),
        (SwinConfig, {"image_size": (1, 2, 3, 4)}),
        (SwinConfig, {"patch": (4, 4, 4)}),
        (SwinConfig, {"mlp_ratio": math.nan}),
        (SwinConfig, {"mlp_ratio": math.inf}),
        (SwinConfig, {"mlp_ratio": 0.001}),
        (SwinConfig, {"drop_path": 1.0}),
        (SwinConfig, {"dropout": math.nan}),
        *((Optim, {name: value}) for name in RATES for value in (-1, math.nan, math.inf)),
        (Optim, {"lr": 0.0}),
        (Optim, {"lr_batch": -1}),
        (Optim, {"betas": (0.9, 1.0)}),
        (Optim, {"layer_decay": 0.0}),
        (Optim, {"layer_decay": 1.1}),
        (Optim, {"ema": 1.0}),
        *((Augment, {name: value}) for name in ("flip", "erase", "mix_switch") for value in (-0.1, 1.1, math.nan)),
        *((Augment, {name: value}) for name in ("mixup", "cutmix", "color_jitter") for value in (-1, math.nan, math.inf)),
        (Augment, {"scale": (0.5, 0.1)}),
        (Augment, {"ratio": (0, 1)}),
        (Augment, {"magnitude": 11}),
        (Augment, {"smoothing": 1}),
        *((Input, {"holdout": value}) for value in (0, 1, math.nan)),
        (Input, {"workers": -2}),
        (Input, {"max_pixels": 0}),
        (Input, {"crop_ratio": 2}),
        (Preprocess, {"std": (0.2, 0, 0.2)}),
        (Preprocess, {"crop_ratio": -1}),
        (Preprocess, {"image_size": (0, 8)}),
        *((Schedule, {name: 0}) for name in ("epochs", "evaluate_every", "keep")),
        *((Schedule, {name: -1}) for name in ("warmup", "patience", "save_minutes", "save_steps")),
        (Schedule, {"warmup": math.nan}),
        (Schedule, {"time": "soon"}),
        (Run, {"batch": 0}),
        (Run, {"batch": 10, "accumulate": 4}),
    ],
)
def test_bad_values_are_named(kind, fields):
    name = list(fields)[-1]
    with pytest.raises(ValueError, match=rf"^field `{name}`: .*\w"):
        kind(**fields)


@some
@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_durations(days, hours, minutes, rest):
    assert seconds(f"{days}d{hours}h{minutes}m{rest}s") == ((days * 24 + hours) * 60 + minutes) * 60 + rest


def test_short_durations():
    assert [seconds(text) for text in ("90s", "30m", "8h", "1h30m", " 1.5H ", "0.5m")] == [90, 1800, 28800, 5400, 5400, 30]
    assert seconds("") == math.inf


@some
@given(st.text(alphabet="0123456789.dhmsxe -") | st.text())
@example("²s")  # a digit to str.isdigit, no number to float
def test_anything_else_is_no_duration(text):
    try:
        assert seconds(text) > 0
    except ValueError as error:
        assert str(error) == f"field `time`: {text!r} is not a duration; write 90s, 30m, 8h or 1h30m"


@pytest.mark.parametrize("text", [" ", "30", "m", "0s", "1h30", ".m", "1..5h", "-3m", "1e3s", "h1", "1 h", "nan", "inf"])
def test_not_a_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)


def test_nearest():
    assert nearest("windw", ["window", "width"]) == "did you mean `window`?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


# Image size, window, then what the official code lays out: grids and windows by stage (microsoft/Swin-Transformer).
LAYOUTS = [
    (256, 8, (64, 32, 16, 8), (8, 8, 8, 8)),
    (256, 16, (64, 32, 16, 8), (16, 16, 16, 8)),
    (192, 12, (48, 24, 12, 6), (12, 12, 12, 6)),
    (384, 24, (96, 48, 24, 12), (24, 24, 24, 12)),
    (224, 14, (56, 28, 14, 7), (14, 14, 14, 7)),
]


@pytest.mark.parametrize(("size", "window", "grids", "windows"), LAYOUTS)
def test_grids_and_windows(size, window, grids, windows):
    swin = SwinConfig(image_size=size, window=window)
    assert swin.grids == tuple((g, g) for g in grids)
    assert swin.windows == tuple((w, w) for w in windows)
    assert swin.pretrained_windows == swin.windows


def test_grids_round_up():
    assert SwinConfig(image_size=(225, 30)).grids == ((57, 8), (29, 4), (15, 2), (8, 1))
    assert SwinConfig(image_size=1).grids == ((1, 1),) * 4
    clip = SwinConfig(image_size=(7, 100, 64), patch=(2, 4, 4), window=8)
    assert clip.grids == ((4, 25, 16), (4, 13, 8), (4, 7, 4), (4, 4, 2))  # time is not merged
    assert clip.windows == ((4, 8, 8), (4, 8, 8), (4, 7, 4), (4, 4, 2))
    assert clip.axes == 3 and clip.patches == (2, 4, 4) and SwinConfig(image_size=(8, 64, 64)).patches == (4, 4, 4)


def test_windows_by_axis_and_by_stage():
    by_axis = SwinConfig(window=(8, 4))
    assert by_axis.windows == ((8, 4),) * 4
    by_stage = SwinConfig(window=(16, 8, 8, 4))
    assert by_stage.windows == ((16, 16), (8, 8), (8, 8), (4, 4))
    both = SwinConfig(window=((16, 8), 8, 8, (4, 2)))
    assert both.windows == ((16, 8), (8, 8), (8, 8), (4, 2))


def test_ambiguous_windows_are_by_axis():
    two = {"depths": (2, 2), "heads": (3, 6)}
    assert SwinConfig(window=(8, 4), **two).windows == ((8, 4), (8, 4))
    assert SwinConfig(window=((8, 8), (4, 4)), **two).windows == ((8, 8), (4, 4))
    clip = {"image_size": (8, 64, 64), "depths": (1, 1, 1), "heads": (1, 2, 3)}
    assert SwinConfig(window=(1, 8, 4), **clip).windows == ((1, 8, 4),) * 2 + ((1, 4, 4),)


def test_pretrained_windows():
    """The window the bias network learnt at: kept by stage as given, own where 0."""
    tuned = SwinConfig(window=16, pretrained_window=(12, 12, 12, 6))
    assert tuned.pretrained_windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert SwinConfig(window=16, pretrained_window=(12, 12, 0, 6)).pretrained_windows == ((12, 12), (12, 12), (16, 16), (6, 6))
    assert SwinConfig(window=16, pretrained_window=12).pretrained_windows == ((12, 12),) * 4


@some
@given(swins())
def test_windows_fit_their_grids(swin):
    assert len(swin.grids) == len(swin.windows) == len(swin.depths)
    for grid, window in zip(swin.grids, swin.windows, strict=True):
        assert len(grid) == len(window) == swin.axes
        assert all(1 <= w <= g for w, g in zip(window, grid, strict=True))


def test_where_a_run_is_written():
    assert [Run().folder, Run(recipe="digits").folder, Run(recipe="digits", out="here").folder] == ["runs/classify", "runs/digits", "here"]
