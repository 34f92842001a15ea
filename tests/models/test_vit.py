"""ViT: what goes in and comes out, how it starts, other sizes and patches. Parity with other code: tests/parity."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyscale as ms
from manyscale.config import ViTConfig
from manyscale.heads.pixels import MaskedImages
from manyscale.models import ViT, build
from manyscale.ops.positions import resize_positions, sincos2d
from tests.conftest import loud

MICRO = ViTConfig(image_size=32, patch=8, width=32, depth=2, heads=4, mlp_width=48, classes=5)
POOLS = ("token", "gap", "map")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
def test_logits_features_and_gradients(pool, position):
    model = loud(build(replace(MICRO, pool=pool, position=position, pre_logits=12)))
    images = torch.randn(2, 3, 32, 32)
    features = model.features(images)
    assert [tuple(stage.shape) for stage in features.stages] == [(2, 32, 4, 4)] and features.pooled.shape == (2, 12)
    assert torch.equal(model(images), model.head(features.pooled)) and torch.equal(model.last_map(images), features.stages[0])
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_pooling_reads_what_it_says():
    images = torch.randn(2, 3, 32, 32)
    model = loud(build(replace(MICRO, pool="gap")))
    torch.testing.assert_close(model.features(images).pooled, model.last_map(images).mean((2, 3)))
    model = loud(build(replace(MICRO, pool="token")))
    tokens, grid = model.tokens(images)
    assert tokens.shape == (2, 17, 32) and grid == (4, 4) and torch.equal(model.features(images).pooled, tokens[:, 0])
    torch.testing.assert_close(model.last_map(images).flatten(2).mT, tokens[:, 1:])


def test_the_map_head_by_hand():
    """Equation by equation in float64: no norm on the query, what attention returns takes its place, a residual MLP."""
    model = loud(build(replace(MICRO, pool="map"))).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, _ = model.tokens(images)
    pool = model.pool
    k, v = pool.attention.kv(x).chunk(2, dim=-1)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        weights = (pool.attention.q(pool.probe)[:, part] @ k[..., part].mT / math.sqrt(8)).softmax(-1)  # (2, 1, 16)
        heads.append(weights @ v[..., part])
    y = pool.attention.proj(torch.cat(heads, dim=-1))[:, 0]
    mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, correction=0)
    z = (y - mean) / (var + 1e-6).sqrt() * pool.norm.weight + pool.norm.bias
    h = z @ pool.mlp.fc1.weight.T + pool.mlp.fc1.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(model.features(images).pooled, y + h @ pool.mlp.fc2.weight.T + pool.mlp.fc2.bias, rtol=0, atol=1e-12)


def test_it_starts_as_flax_has_it():
    with torch.device("meta"):
        model = build(
            replace(MICRO, width=256, heads=4, mlp_width=300, pool="map", pre_logits=64, head_bias=-10.0, mask_token=True, depth=1)
        )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    torch.manual_seed(0)
    model.initialise()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    attention, mlp = model.blocks[0].attention.branch, model.blocks[0].mlp.branch
    for matrix in (
        *attention.qkv.weight.chunk(3),
        attention.proj.weight,
        model.pool.attention.q.weight,
        *model.pool.attention.kv.weight.chunk(2),
    ):
        assert matrix.abs().max().item() == pytest.approx(0.10825, rel=2e-3)  # sqrt(6 / 512): each matrix by itself
    assert mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 556), rel=2e-3)
    assert 0 < mlp.fc1.bias.abs().max() < 1e-5 and not attention.qkv.bias.any()
    assert model.patch.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert model.patch.weight.abs().max() <= 2 / 0.8796 * (3 * 64) ** -0.5 + 1e-6
    assert model.position.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert model.pool.probe.abs().max().item() == pytest.approx(math.sqrt(6 / 257), rel=0.02)
    assert not model.head.weight.any() and (model.head.bias == -10).all() and not model.pre_logits.bias.any()
    assert not build(replace(MICRO, pool="token")).token.any()


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from(POOLS), st.sampled_from(["bilinear", "bicubic"]))
@settings(max_examples=25, deadline=None)
def test_any_size_goes_in(height, width, pool, resize):
    model = loud(build(replace(MICRO, pool=pool, position_resize=resize))).eval()
    images = torch.randn(1, 3, height, width)
    grid = (height // 8, width // 8)
    with torch.no_grad():
        features = model.features(images)
        assert features.stages[0].shape == (1, 32, *grid) and features.pooled.isfinite().all()
        inside = images[..., : 8 * grid[0], : 8 * grid[1]]
        assert torch.equal(model(inside), model(images))  # what no patch covers is not looked at
        moved = ms.transfer(model, (height, width))
        torch.testing.assert_close(moved(images), model(images), rtol=0, atol=1e-5)  # laid out for it, the same function


def test_positions_are_resized_as_scipy_zooms():
    """What the original does: scipy.ndimage.zoom of order 1."""
    from scipy.ndimage import zoom

    table = torch.randn(7 * 5, 3)
    for new in ((12, 9), (3, 2), (7, 11)):
        wanted = zoom(table.reshape(7, 5, 3).numpy(), (new[0] / 7, new[1] / 5, 1), order=1)
        torch.testing.assert_close(resize_positions(table, (7, 5), new).reshape(*new, 3), torch.from_numpy(wanted), rtol=0, atol=1e-5)


def test_sincos_positions_by_hand():
    found = sincos2d((3, 5), 16)
    for y, x in ((0, 0), (2, 4), (1, 3)):
        rates = [10_000 ** -(i / 3) for i in range(4)]
        wanted = [f(place * rate) for place in (x, y) for f in (math.sin, math.cos) for rate in rates]
        torch.testing.assert_close(found[y * 5 + x], torch.tensor(wanted), rtol=0, atol=1e-6)


def test_a_grown_patch_gives_a_grown_picture_the_same_tokens():
    model = loud(build(MICRO)).double().eval()
    bigger = ms.transfer(model, 64, patch=16)
    assert bigger.config.grid == (4, 4) and bigger.patch.weight.shape == (32, 3, 16, 16)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 3, 8, 8)  # every patch grows by itself
    grown = torch.nn.functional.interpolate(patches, scale_factor=2, mode="bilinear", antialias=True).reshape(2, 3, 4, 4, 16, 16)
    grown = grown.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    torch.testing.assert_close(bigger(grown), model(images), rtol=0, atol=1e-10)


def test_transfer_keeps_what_it_should(tmp_path):
    model = loud(build(replace(MICRO, pool="map", head_bias=-3.0)))
    model.labels = tuple("abcde")
    tuned = ms.transfer(model, 48, classes=7, drop_path=0.1)
    assert (tuned.config.classes, tuned.labels, tuned.config.drop_path) == (7, (), 0.1)
    assert not tuned.head.weight.any() and torch.equal(tuned.pool.probe, model.pool.probe)
    with pytest.raises(ValueError, match="`window`: a ViT has none"):
        ms.transfer(model, 48, window=8)
    with pytest.raises(ValueError, match="`patch`: a Swin keeps its patches"):
        ms.transfer(ms.create_model("swinv2_tiny", width=16, heads=(1, 1, 1, 1), image_size=64), 64, patch=8)


@pytest.mark.parametrize("pool", POOLS)
def test_save_and_load(pool, tmp_path):
    model = loud(build(replace(MICRO, pool=pool, mask_token=True)))
    ms.save(model, tmp_path)
    again = ms.load(tmp_path)
    assert isinstance(again, ViT) and again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_masks_hide_patches_before_positions():
    model = loud(build(replace(MICRO, mask_token=True))).eval()
    images, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
    assert torch.equal(model(images, mask), model(images))
    mask[:, 1, 2] = True
    other = images.clone()
    other[:, :, 8:16, 16:24] = 9.0
    assert torch.equal(model(images, mask), model(other, mask)) and not torch.equal(model(images), model(other))
    painter = loud(MaskedImages(model))
    assert painter(images, mask).shape == images.shape
    with pytest.raises(ValueError, match="no mask token"):
        build(MICRO)(images, mask)
    with pytest.raises(ValueError, match=r"the mask has shape \(2, 3, 4\)"):
        model(images, mask[:, :3])


def test_layers_count_from_the_pixels():
    model = build(replace(MICRO, pool="map", pre_logits=8, mask_token=True))
    found = {name: model.layer(name) for name, _ in model.named_parameters()}
    assert model.layers == 4 and set(found.values()) == {0, 1, 2, 3}
    assert {name.split(".")[0] for name, layer in found.items() if layer == 0} == {"patch", "position", "mask_token"}
    assert found["blocks.1.mlp.branch.fc2.bias"] == 2 and found["pool.probe"] == found["head.weight"] == found["norm.weight"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "`heads`: 5 must divide the width 32"),
        ({"image_size": 4}, "`image_size`: 4 must hold at least one patch of 8"),
        ({"image_size": (4, 32, 32)}, "`image_size`: .* give one number or"),
        ({"position": "sincos2d", "width": 30, "heads": 3}, "`position`: sincos2d needs a width that 4 divides"),
        ({"depth": 0}, "`depth`: 0 must be at least 1"),
        ({"head_bias": math.inf}, "`head_bias`: inf is not a finite"),
        ({"patch": 0}, "`patch`: 0: give one number >= 1"),
    ],
)
def test_what_the_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(MICRO, **fields)


def test_inputs_it_refuses():
    model = build(MICRO)
    with pytest.raises(ValueError, match=r"a batch of shape \(B, 3, H, W\), not \(2, 1, 32, 32\)"):
        model(torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"an image of \(7, 32\) pixels holds no patch"):
        model(torch.randn(2, 3, 7, 32))
    assert "leave out the last [1, 2] pixels" in replace(MICRO, image_size=(33, 34)).clipped[0] and not MICRO.clipped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = loud(build(replace(MICRO, pool="map"))).to(dtype).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 40, 40, dtype=dtype)).isfinite().all()
