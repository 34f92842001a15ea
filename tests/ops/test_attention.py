"""Every attention path computes one function, in every precision, and a masked token never speaks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyscale.ops.attention import attend, unit
from manyscale.ops.windows import layout

PATHS = ["reference", "fused"]
CUTS = {  # grid, window
    "image": ((6, 8), (3, 4)),
    "padded": ((5, 9), (3, 4)),
    "clip": ((3, 4, 5), (2, 2, 3)),
    "one token": ((1, 1), (4, 4)),
}


def inputs(cut, dtype=torch.float64, batch=2, heads=3, width=5):
    """q, k, v (B, W, H, N, d) and bias (H, N, N) for a layout."""
    count = torch.Size(p // w for p, w in zip(cut.padded, cut.window, strict=True)).numel()
    tokens = torch.Size(cut.window).numel()
    q, k, v = (torch.randn(batch, count, heads, tokens, width, dtype=dtype) for _ in range(3))
    return q, k, v, torch.randn(heads, tokens, tokens, dtype=dtype)


def slowly(q, k, v, bias, mask):
    """The definition, one row at a time."""
    out = torch.zeros_like(v)
    batch, windows, heads, tokens, _ = q.shape
    for b, w, h, n in torch.cartesian_prod(*map(torch.arange, (batch, windows, heads, tokens))).tolist():
        seen = mask[w, n] if mask is not None else torch.ones(tokens, dtype=torch.bool)
        weights = (k[b, w, h, seen] @ q[b, w, h, n] + bias[h, n, seen]).softmax(dim=0)
        out[b, w, h, n] = weights @ v[b, w, h, seen]
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_every_path_is_the_definition(case, shifted, path):
    cut = layout(*case, shifted=shifted, mask_padding=True)
    tensors = inputs(cut)
    torch.testing.assert_close(attend(*tensors, cut.mask, path=path), slowly(*tensors, cut.mask))


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_paths_have_the_same_gradients(case):
    cut = layout(*case, shifted=True, mask_padding=True)
    tensors = [t.requires_grad_() for t in inputs(cut)]
    weights = torch.randn_like(tensors[2])
    reference, fused = (torch.autograd.grad((attend(*tensors, cut.mask, path=path) * weights).sum(), tensors) for path in PATHS)
    for a, b in zip(reference, fused, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_half_precision(dtype, largest, path):
    """Error of the result over its size: within 2 % in bfloat16 and 0.25 % in float16."""
    torch.manual_seed(0)
    cut = layout((8, 16), (8, 8), shifted=True, mask_padding=True)
    q, k, v, bias = inputs(cut, dtype, heads=4, width=32)
    q = q / 32**0.5
    exact = attend(q.double(), k.double(), v.double(), bias.double(), cut.mask, path="reference")
    result = attend(q, k, v, bias, cut.mask, path=path)
    assert result.dtype == dtype
    assert (result.double() - exact).norm() / exact.norm() < largest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_token_cannot_outbid(dtype, path):
    """Temperature 0.01 and a bias of 16: logits -100 and 116. The official mask of -100 would let the masked one win."""
    q = torch.tensor([[100.0, 0], [100.0, 0]], dtype=dtype)[None, None, None]
    k = torch.tensor([[-1.0, 0], [1.0, 0]], dtype=dtype)[None, None, None]  # a row's own token is its opposite
    v = torch.tensor([[1.0, 0], [0, 1.0]], dtype=dtype)[None, None, None]
    bias = torch.tensor([[[0, 16.0], [0, 16.0]]], dtype=dtype)
    mask = torch.tensor([[[True, False], [True, True]]])
    logits = (q @ k.mT + bias)[0, 0, 0]
    assert logits[0, 1] - logits[0, 0] > 200
    assert (logits + torch.tensor([[0, -100.0], [0, 0]], dtype=dtype)).argmax(dim=-1).tolist() == [1, 1]
    result = attend(q, k, v, bias, mask, path=path)[0, 0, 0]
    assert result[0].tolist() == [1, 0]
    torch.testing.assert_close(result[1], v[0, 0, 0, 1])


@pytest.mark.parametrize("path", PATHS)
def test_what_is_masked_has_no_gradient(path):
    cut = layout((5, 8), (4, 4), shifted=True, mask_padding=True)
    q, k, v, bias = inputs(cut)
    v.requires_grad_()
    row = attend(q, k, v, bias, cut.mask, path=path)[0, -1, :, 0]
    (grad,) = torch.autograd.grad(row.sum(), v)
    assert torch.equal(grad[0, -1, 0].any(dim=-1), cut.mask[-1, 0])
    assert not grad[1].any() and not grad[0, :-1].any()


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_attend(path):
    cut = layout((3, 4), (2, 2), shifted=True, mask_padding=True)
    tensors = [t.requires_grad_() for t in inputs(cut, batch=1, heads=2, width=2)]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, cut.mask, path=path), tensors)


def test_dropout_drops_attention_weights():
    torch.manual_seed(0)
    cut = layout((8, 8), (8, 8), shifted=False, mask_padding=True)
    q, k, v, bias = inputs(cut, batch=8)
    v = torch.ones_like(v)  # a row's weights sum to 1, and so does the result, unless weights were dropped
    for path in PATHS:
        out = attend(q, k, v, bias, dropout=0.5, path=path)
        assert out.std() > 0.1 and out.mean().item() == pytest.approx(1, abs=0.1)


def test_auto_fuses_where_the_bias_needs_no_gradient(monkeypatch):
    taken = []
    for path in PATHS:
        monkeypatch.setattr(f"manyscale.ops.attention._{path}", lambda *_, path=path: taken.append(path))
    tensors = inputs(layout((2, 2), (2, 2), shifted=False, mask_padding=True))
    attend(*tensors)
    tensors[-1].requires_grad_()
    attend(*tensors)
    with torch.no_grad():
        attend(*tensors)
    assert taken == ["fused", "reference", "fused"]


@settings(max_examples=30, deadline=None)
@given(st.integers(-20, 20))
def test_unit_has_length_one(power):
    x = torch.randn(4, 7, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True) * 10.0**power
    expected = 1.0 if power >= -6 else 0.0  # below a millionth a vector counts as zero
    torch.testing.assert_close(unit(2 * x).norm(dim=-1), torch.full((4,), expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_of_nothing_is_nothing(dtype):
    x = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    result = unit(x)
    assert not result.any()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result.sum().backward()
    assert x.grad.isfinite().all(), "inf here, times the zeros of the padding, would be NaN in the weights' gradients"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 6e4])
def test_unit_is_finite_in_half_precision(dtype, size):
    x = torch.full((2, 64), size, dtype=dtype, requires_grad=True)
    result = unit(x)
    (result * torch.arange(64)).sum().backward()
    assert result.isfinite().all() and (result.norm(dim=-1) <= 1.0001).all()
    if dtype == torch.bfloat16 or size > 1e-6:  # below, float16 has no number for the gradient
        assert x.grad.isfinite().all()


def test_gradients_of_unit():
    assert torch.autograd.gradcheck(unit, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
