"""Names to configurations."""

import pytest

from manyscale.config import SwinConfig, ViTConfig
from manyscale.plan.count import as_table_2, count
from manyscale.presets import PRESETS, list_models, model_config


def test_list_models():
    assert list_models() == sorted(PRESETS)
    assert list_models("swin_*") == ["swin_base", "swin_large", "swin_small", "swin_tiny"]
    assert list_models("swinv2_*") == [
        "swinv2_base", "swinv2_giant", "swinv2_huge", "swinv2_large", "swinv2_simmim_1b", "swinv2_small", "swinv2_tiny",
    ]  # fmt: skip
    assert list_models("nothing*") == list_models("Swin*") == []


@pytest.mark.parametrize("name", list_models("swin*"))
def test_swins_are_the_papers(name):
    config = model_config(name)
    first = not name.startswith("swinv2")
    assert (config.similarity, config.norm, config.bias, config.merge_norm) == (
        ("dot", "pre", "table", "before") if first else ("cosine", "res-post", "log-cpb", "after")
    )
    assert (config.patch, config.mlp_ratio, config.classes, len(config.depths)) == (4, 4, 1000, 4)
    assert all(config.width * 2**i == 32 * heads for i, heads in enumerate(config.heads))  # a head is 32 wide
    assert config.extra_norm_every == (6 if name in ("swinv2_huge", "swinv2_giant") else 0)
    size, window = (192, 12) if name == "swinv2_simmim_1b" else (224, 7) if first else (256, 8)
    assert (config.image_size, config.window) == (size, window)


def test_tables():
    """Width and depths: Swin V1 section 3.3, Swin V2 section 4.1."""
    given = {name: (c.width, c.depths) for name, c in ((name, model_config(name)) for name in list_models("swin*"))}
    small = (2, 2, 18, 2)
    for first in ("swin_", "swinv2_"):
        assert given[first + "tiny"] == (96, (2, 2, 6, 2))
        assert [given[first + size] for size in ("small", "base", "large")] == [(96, small), (128, small), (192, small)]
    assert given["swinv2_huge"] == (352, small) and given["swinv2_giant"] == (512, (2, 2, 42, 4))
    assert given["swinv2_simmim_1b"] == (448, small)


TABLE_2 = {  # of Scaling Vision Transformers: million parameters, GFLOPs at 224 and at 384 px
    "s/28": (5.4, 0.7, 2.0), "s/16": (5.0, 2.2, 7.8), "S/32": (22, 2.3, 6.9), "Ti/16": (5.5, 2.5, 9.5), "B/32": (87, 8.7, 26.0),
    "S/16": (22, 9.2, 31.2), "B/28": (87, 11.3, 30.5), "B/16": (86, 35.1, 111.3), "L/16": (303, 122.9, 382.8),
    "g/14": (1011, 533.1, 1596.4), "G/14": (1843, 965.3, 2859.9),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name):
    """Every number to the digits that are printed; the GFLOPs but for a hundredth."""
    wanted, *flops = TABLE_2[name]
    for size, printed in zip((224, 384), flops, strict=True):
        parameters, counted = as_table_2(model_config(name, image_size=size))
        assert counted / 1e9 == pytest.approx(printed, abs=0.06)
        assert counted / 1e9 == pytest.approx(printed, rel=0.01) or printed < 10  # where a digit is more than 1 %
        if size == 224:
            assert round(parameters / 1e6, 1 if wanted < 10 else 0) == wanted


def test_vits():
    """To the digit, from the facts of the public code: with pooling by attention, and sizes that are not in the paper."""
    assert count(model_config("G/14", pool="map", classes=0)).parameters == 1_881_132_416  # timm's, without class token
    assert round(as_table_2(model_config("vit_huge_patch14"))[0] / 1e6, 1) == 630.8
    assert round(as_table_2(model_config("e/14"))[0] / 1e9, 2) == 3.81
    assert model_config("vit_so400m_patch14") == model_config("So400m/14") and isinstance(model_config("M/16"), ViTConfig)
    for name in list_models("vit_*"):
        config = model_config(name)
        assert (config.image_size, config.pool, config.position, config.gelu, config.classes) == (224, "gap", "learned", "tanh", 1000)
    with pytest.raises(ValueError, match="unknown model `B/17`; did you mean"):
        model_config("B/17")


def test_any_field_can_be_replaced():
    config = model_config("swinv2_tiny", classes=10, image_size=(192, 256), window=[12, 12, 12, 6], depths=[1, 1, 1, 1])
    assert isinstance(config, SwinConfig)
    assert (config.classes, config.image_size, config.window, config.depths) == (10, (192, 256), (12, 12, 12, 6), (1, 1, 1, 1))
    assert (config.width, config.heads) == (96, (3, 6, 12, 24))
    assert model_config("swinv2_tiny").classes == 1000  # the table is as it was


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("swinv2_tinny", {}, "unknown model `swinv2_tinny`; did you mean `swinv2_tiny`?"),
        ("?", {}, "unknown model `\\?`; known: supervit_deit_base, "),
        ("swin_tiny", {"clases": 10}, "swin_tiny: unknown field `clases` of SwinConfig; did you mean `classes`?"),
        ("swin_tiny", {"window": 0}, "swin_tiny: field `window`: 0 must be at least 1"),
        ("swin_tiny", {"norm": "layer"}, "swin_tiny: field `norm`: expected pre or post or sandwich or res-post, found 'layer'"),
    ],
)
def test_mistakes_are_named(name, fields, message):
    with pytest.raises(ValueError, match="^" + message):
        model_config(name, **fields)
