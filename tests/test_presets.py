"""Names to configurations."""

import pytest

from manyscale.config import SwinConfig
from manyscale.presets import PRESETS, list_models, model_config


def test_list_models():
    assert list_models() == sorted(PRESETS)
    assert list_models("swin_*") == ["swin_base", "swin_large", "swin_small", "swin_tiny"]
    assert list_models("swinv2_*") == [
        "swinv2_base", "swinv2_giant", "swinv2_huge", "swinv2_large", "swinv2_simmim_1b", "swinv2_small", "swinv2_tiny",
    ]  # fmt: skip
    assert list_models("nothing*") == list_models("Swin*") == []


@pytest.mark.parametrize("name", list_models())
def test_presets_are_the_papers(name):
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
    given = {name: (c.width, c.depths) for name, c in ((name, model_config(name)) for name in list_models())}
    small = (2, 2, 18, 2)
    for first in ("swin_", "swinv2_"):
        assert given[first + "tiny"] == (96, (2, 2, 6, 2))
        assert [given[first + size] for size in ("small", "base", "large")] == [(96, small), (128, small), (192, small)]
    assert given["swinv2_huge"] == (352, small) and given["swinv2_giant"] == (512, (2, 2, 42, 4))
    assert given["swinv2_simmim_1b"] == (448, small)


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
        ("?", {}, "unknown model `\\?`; known: swin_base, "),
        ("swin_tiny", {"clases": 10}, "swin_tiny: unknown field `clases` of SwinConfig; did you mean `classes`?"),
        ("swin_tiny", {"window": 0}, "swin_tiny: field `window`: 0 must be at least 1"),
        ("swin_tiny", {"norm": "layer"}, "swin_tiny: field `norm`: expected pre or post or sandwich or res-post, found 'layer'"),
    ],
)
def test_mistakes_are_named(name, fields, message):
    with pytest.raises(ValueError, match="^" + message):
        model_config(name, **fields)
