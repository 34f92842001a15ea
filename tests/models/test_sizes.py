"""Any image size and window, two axes or three, in every precision."""

import pytest
import torch

import manyscale.layers.attention
from manyscale.models.swin import Swin
from manyscale.ops.windows import enter

SIZES = [(1, 1), (3, 50), (33, 47), (96, 20), (8, 8), (32, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
V1 = {"similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"}


def images(*size, batch=2, channels=3, dtype=torch.float32):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("padding", ["mask", "attend"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_in_any_precision(micro, size, dtype, padding):
    exact = micro(padding=padding)(images(*size))
    result = micro(padding=padding).to(dtype)(images(*size, dtype=dtype))
    assert result.dtype == dtype and result.isfinite().all()
    assert (result.float() - exact).norm() <= {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype] * exact.norm()


@pytest.mark.parametrize("padding", ["mask", "attend"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (33, 47)])
def test_gradients_in_half_precision(micro, size, dtype, padding):
    """Scaled as a mixed-precision trainer scales them: float16 must not turn the zeros of the padding into NaN."""
    model = micro(padding=padding).to(dtype).train()
    (model(images(*size, dtype=dtype)).float().sum() * 1024).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, V1], ids=["v2", "v1"])
def test_one_token(micro, fields):
    model = micro(**fields, image_size=2)  # one patch: stages of one token from the start
    assert model.config.windows == ((1, 1), (1, 1))
    assert model(images(2, 2)).isfinite().all()
    assert model(images(32, 32)).isfinite().all()


@pytest.mark.parametrize("fields", [{}, V1], ids=["v2", "v1"])
@pytest.mark.parametrize("size", [(33, 47), (5, 61)])
def test_what_padding_holds_cannot_matter(micro, monkeypatch, fields, size):
    """With `padding="mask"` noise in the padded places changes no logit; with "attend" it does."""

    def noisy(x, layout):
        real = enter(torch.ones_like(x), layout).bool()
        return torch.where(real, enter(x, layout), 10 * torch.randn(real.shape))

    for padding, same in (("mask", True), ("attend", False)):
        model = micro(padding=padding, **fields)
        with torch.no_grad(), monkeypatch.context() as patch:
            clean = model(images(*size))
            patch.setattr(manyscale.layers.attention, "enter", noisy)
            assert torch.allclose(clean, model(images(*size)), atol=1e-5) == same


def test_padding_only_matters_where_there_is_some(micro):
    masked, attended = (micro(padding=padding) for padding in ("mask", "attend"))
    assert torch.equal(masked(images(32, 32)), attended(images(32, 32)))
    assert not torch.allclose(masked(images(34, 32)), attended(images(34, 32)), atol=1e-4)


def middle(table, old, new):
    """The entries of a table that a smaller window uses."""
    grid = table.unflatten(0, [2 * w - 1 for w in old])
    for axis, (o, n) in enumerate(zip(old, new, strict=True)):
        grid = grid.narrow(axis, o - n, 2 * n - 1)
    return grid.flatten(0, len(old) - 1)


@pytest.mark.parametrize("size", [(6, 6), (4, 7)])
def test_a_smaller_grid_reads_the_middle_of_the_table(micro, size):
    """An image of 3 x 3 patches in a net built for windows of 4 equals a net built for windows of 3."""
    large, small = micro(**V1), micro(**V1, image_size=size)
    weights = large.state_dict()
    for name in [name for name in weights if name.endswith("table")]:
        stage = int(name.split(".")[1])
        weights[name] = middle(weights[name], large.config.windows[stage], small.config.windows[stage])
    small.load_state_dict(weights)
    assert small.config.windows[0] == (size[0] // 2, -(-size[1] // 2))
    torch.testing.assert_close(large(images(*size)), small(images(*size)))


def test_a_smaller_grid_keeps_the_scale_of_its_coordinates(micro):
    large, small = micro(), micro(image_size=6, pretrained_window=4)
    small.load_state_dict(large.state_dict())
    torch.testing.assert_close(large(images(6, 6)), small(images(6, 6)))
    own = micro(image_size=6)
    own.load_state_dict(large.state_dict())
    assert not torch.allclose(own(images(6, 6)), small(images(6, 6)), atol=1e-4)


def test_the_built_size_does_not_matter_where_windows_fit(micro):
    small, large = micro(), micro(image_size=64)
    assert torch.equal(small(images(64, 48)), large(images(64, 48)))


def seen_by(model, size, token, stage=0):
    """Places of a stage's own grid that one of its tokens can see through one plain and one shifted block."""
    grid = [-(-s // p) for s, p in zip(size, model.config.patches, strict=True)]
    x = torch.randn(1, *grid, model.config.width, requires_grad=True)
    (grad,) = torch.autograd.grad(model.stages[stage](x)[(0, *token)].sum(), x)
    return grad[0].abs().amax(dim=-1) > 0


def test_windows_differ_by_axis(micro):
    """One plain block and one shifted by (1, 2): a token sees the plain windows its shifted one touches."""
    model = micro(window=(2, 4), image_size=32)
    assert model.config.windows == ((2, 4), (2, 4))
    seen = seen_by(model, (32, 32), (1, 2))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[0:4, 0:8] = True
    assert torch.equal(seen, expected)


def test_windows_differ_by_stage(micro):
    model = micro(window=((2, 2), (4, 8)))
    assert [stage.window for stage in model.stages] == [(2, 2), (4, 8)]
    assert model(images(32, 32)).isfinite().all()


@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_the_shift_does_not_reach_round_the_border(micro, padding):
    """The peers' bug (pytorch-image-models#2438): shifting before padding lets the first row see the last."""
    seen = seen_by(micro(padding=padding), (34, 34), (0, 0))
    assert seen[:4, :4].all() and not seen[4:].any() and not seen[:, 4:].any()


VIDEO = {"image_size": (4, 16, 16), "patch": (1, 2, 2), "window": ((2, 4, 4), (2, 4, 4))}


@pytest.mark.parametrize("size", [(4, 16, 16), (1, 1, 1), (5, 18, 23), (3, 7, 40)])
@pytest.mark.parametrize("fields", [{}, V1], ids=["v2", "v1"])
def test_clips(micro, fields, size):
    model = micro(**VIDEO, **fields)
    features = model.features(images(*size))
    _, height, width = model.patch(images(*size)).shape[1:4]
    assert features.stages[0].shape == (2, 8, size[0], height, width)
    assert features.stages[1].shape == (2, 16, size[0], -(-height // 2), -(-width // 2))  # time is never merged
    assert model(images(*size)).isfinite().all()


def test_time_is_clipped(micro):
    model = micro(**{**VIDEO, "window": (8, 4, 4)})
    assert model.config.windows == ((4, 4, 4), (4, 4, 4))
    seen = seen_by(model, (4, 16, 16), (0, 0, 0))
    assert seen[:, :4, :4].all() and not seen[:, 4:].any()  # every frame, and no shift along time
    long = seen_by(model, (12, 16, 16), (5, 0, 0))
    assert long[:8, :4, :4].all() and not long[8:].any()  # windows of 4, one shifted by 2


def as_video(picture: Swin, clip: Swin) -> None:
    """Give a clip model a picture model's weights: patches of one frame, a bias that ignores time."""
    weights = picture.state_dict()
    for name, own in clip.state_dict().items():
        if name == "patch.proj.weight":
            weights[name] = weights[name][:, :, None]
        elif name.endswith("bias.fc1.weight"):
            weights[name] = torch.cat([torch.ones_like(weights[name][:, :1]), weights[name]], dim=1)
        assert weights[name].shape == own.shape
    clip.load_state_dict(weights)


@pytest.mark.parametrize("size", [(16, 16), (18, 23)])
def test_windows_of_one_frame_see_frames_one_by_one(micro, size):
    """Then a clip's pooled features are the mean of its frames', and its maps are theirs."""
    picture, clip = micro(image_size=16), micro(**{**VIDEO, "window": ((1, 4, 4), (1, 4, 4))})
    as_video(picture, clip)
    x = images(3, *size)
    frames, whole = [picture.features(frame) for frame in x.unbind(2)], clip.features(x)
    torch.testing.assert_close(whole.pooled, torch.stack([frame.pooled for frame in frames]).mean(dim=0))
    for i, level in enumerate(whole.stages):
        torch.testing.assert_close(level, torch.stack([frame.stages[i] for frame in frames], dim=2))


def test_frames_meet_in_longer_windows(micro):
    model, x = micro(**VIDEO), images(4, 16, 16)
    other = x.clone()
    other[:, :, 3] += 1
    a, b = model.features(x).stages[0], model.features(other).stages[0]
    assert not torch.allclose(a[:, :, 1], b[:, :, 1])  # the shifted block joins frames 1 and 2, the plain one 2 and 3
    torch.testing.assert_close(a[:, :, 0], b[:, :, 0])  # frame 0 shares its shifted window with frame 3, come round the end: masked
