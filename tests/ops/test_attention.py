"""Every attention path computes one function, in every precision, and a masked token never speaks."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from manyscale.ops.attention import attend
from manyscale.ops.sequential import LIVE, chunk_of
from manyscale.ops.unit import unit, unit_, unit_gradient
from manyscale.ops.windows import layout

pytestmark = pytest.mark.attention
PATHS = ["reference", "fused", "sequential"]
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


def rates(heads=3, dtype=torch.float64):
    """One for each head, (H, 1, 1)."""
    return torch.linspace(0.5, 20, heads, dtype=dtype)[:, None, None]


def slowly(q, k, v, bias, mask, scale=None):
    """The definition, one row at a time."""
    out = torch.zeros_like(v)
    if scale is None:
        q = q / q.shape[-1] ** 0.5
    else:
        q, k = scale * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    batch, windows, heads, tokens, _ = q.shape
    for b, w, h, n in torch.cartesian_prod(*map(torch.arange, (batch, windows, heads, tokens))).tolist():
        seen = mask[w, n] if mask is not None else torch.ones(tokens, dtype=torch.bool)
        weights = (k[b, w, h, seen] @ q[b, w, h, n] + bias[h, n, seen]).softmax(dim=0)
        out[b, w, h, n] = weights @ v[b, w, h, seen]
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("scale", [None, rates()], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_every_path_is_the_definition(case, scale, shifted, path):
    cut = layout(*case, shifted=shifted, mask_padding=True)
    tensors = inputs(cut)
    found = attend(*tensors, cut.mask, scale=scale, path=path)
    torch.testing.assert_close(found, slowly(*tensors, cut.mask, scale), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_paths_have_the_same_gradients(case, cosine):
    cut = layout(*case, shifted=True, mask_padding=True)
    tensors = [t.requires_grad_() for t in inputs(cut)]
    weights, scale = torch.randn_like(tensors[2]), rates().requires_grad_() if cosine else None
    wanted = [*tensors, scale] if cosine else tensors
    reference, *others = (
        torch.autograd.grad((attend(*tensors, cut.mask, scale=scale, path=path) * weights).sum(), wanted) for path in PATHS
    )
    for other in others:
        for a, b in zip(reference, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [None, rates(4, torch.float32)], ids=["dot", "cosine"])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_half_precision(dtype, largest, scale, path):
    """Error of the result over its size: within 2 % in bfloat16 and 0.25 % in float16."""
    torch.manual_seed(0)
    cut = layout((8, 16), (8, 8), shifted=True, mask_padding=True)
    q, k, v, bias = inputs(cut, dtype, heads=4, width=32)
    found = []
    for way, to in (("reference", torch.float64), (path, dtype)):
        tensors = [t.to(to).requires_grad_() for t in (q, k, v, bias)]
        exact = scale if scale is None else scale.to(torch.promote_types(to, torch.float32))
        out = attend(*tensors, cut.mask, scale=exact, path=way)
        assert out.dtype == to
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)))
    for exact, near in zip(*found, strict=True):
        assert (near.double() - exact).norm() / exact.norm() < largest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_token_cannot_outbid(dtype, path):
    """Temperature 0.01 and a bias of 16: logits -100 and 116. The official mask of -100 would let the masked one win."""
    q = torch.tensor([[142.0, 0], [142.0, 0]], dtype=dtype)[None, None, None]
    k = torch.tensor([[-1.0, 0], [1.0, 0]], dtype=dtype)[None, None, None]  # a row's own token is its opposite
    v = torch.tensor([[1.0, 0], [0, 1.0]], dtype=dtype)[None, None, None]
    bias = torch.tensor([[[0, 16.0], [0, 16.0]]], dtype=dtype)
    mask = torch.tensor([[[True, False], [True, True]]])
    logits = (q @ k.mT / 2**0.5 + bias)[0, 0, 0]
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


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_attend(path, cosine):
    cut = layout((3, 4), (2, 2), shifted=True, mask_padding=True)
    tensors = [t.requires_grad_() for t in (*inputs(cut, batch=1, heads=2, width=2), *([rates(2)] if cosine else []))]
    assert torch.autograd.gradcheck(lambda q, k, v, bias, scale=None: attend(q, k, v, bias, cut.mask, scale=scale, path=path), tensors)


def test_dropout_drops_attention_weights():
    torch.manual_seed(0)
    cut = layout((8, 8), (8, 8), shifted=False, mask_padding=True)
    q, k, v, bias = inputs(cut, batch=8)
    v = torch.ones_like(v)  # a row's weights sum to 1, and so does the result, unless weights were dropped
    for path in ("reference", "fused"):
        out = attend(q, k, v, bias, dropout=0.5, path=path)
        assert out.std() > 0.1 and out.mean().item() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="field `attention`: sequential keeps no attention weights"):
        attend(q, k, v, bias, dropout=0.5, path="sequential")


def test_auto_fuses_where_the_bias_needs_no_gradient(monkeypatch):
    taken = []
    for path in ("reference", "fused"):
        monkeypatch.setattr(f"manyscale.ops.attention._{path}", lambda *_, path=path: taken.append(path))
    tensors = inputs(layout((2, 2), (2, 2), shifted=False, mask_padding=True))
    attend(*tensors)
    tensors[-1].requires_grad_()
    attend(*tensors)
    with torch.no_grad():
        attend(*tensors)
    assert taken == ["fused", "reference", "fused"]


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_a_mask_needs_no_bias(path):
    cut = layout((4, 4), (2, 2), shifted=True, mask_padding=True)
    q, k, v, bias = inputs(cut)
    expected = attend(q, k, v, torch.zeros_like(bias), cut.mask, path="reference")
    torch.testing.assert_close(attend(q, k, v, None, cut.mask, path=path), expected, rtol=0, atol=1e-12)


def test_cudnn_gives_no_gradients_of_biased_attention(monkeypatch):
    """They can be NaN at 64 and 576 tokens (pytorch#196678). Fake tensors know the device, no GPU need be there."""
    named = []
    monkeypatch.setattr("manyscale.ops.attention.sdpa_kernel", lambda kernels: named.append(kernels) or nullcontext())
    monkeypatch.setattr("manyscale.ops.attention.F.scaled_dot_product_attention", lambda q, *_, **__: q)
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 64, 32, device="cuda", requires_grad=True)
        bias = torch.empty(2, 64, 64, device="cuda")
        attend(q, q, q, bias, path="fused")
        assert named == [[SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]]
        with torch.no_grad():
            attend(q, q, q, bias, path="fused")
        attend(q, q, q, path="fused")
        attend(*[torch.empty(1, 4, 2, 64, 32)] * 3, torch.empty(2, 64, 64), path="fused")
    assert len(named) == 1


# --- One chunk after another ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_any_budget_gives_the_same(batch, across, heads, side, shifted, biased, more):
    """From one row at a time to all at once, forward and backward, whether or not chunks divide the work."""
    cut = layout((side, side * across), (side, side), shifted=shifted, mask_padding=True)
    q, k, v, bias = (t.requires_grad_() for t in inputs(cut, batch=batch, heads=heads, width=2))
    bias, mask = (bias, cut.mask) if biased else (None, None)
    tensors = [t for t in (q, k, v, bias) if t is not None]
    weights, found = torch.randn_like(v), []
    row = LIVE * 8 * heads * side * side
    for path, budget in (("reference", 0), ("sequential", row + more % (row * side * side * across * batch))):
        out = attend(q, k, v, bias, mask, path=path, budget=budget)
        found.append((out, *torch.autograd.grad((out * weights).sum(), tensors)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(*[st.integers(1, 70)] * 5, st.integers(0, 10**8))
def test_chunks_keep_to_their_budget(batch, windows, heads, rows, keys, budget):
    shape, row = torch.Size((batch, windows, heads, rows, 8)), LIVE * 4 * heads * keys
    if budget < row:
        with pytest.raises(ValueError, match=rf"field `attention_memory`: {budget:,} bytes; .* takes {row:,}, give more"):
            chunk_of(shape, keys, 4, budget)
        return
    chunk = chunk_of(shape, keys, 4, budget)
    assert 1 <= chunk.windows <= windows and 1 <= chunk.samples <= batch and 1 <= chunk.rows <= rows
    assert chunk.samples * chunk.windows * chunk.rows * row <= budget
    if budget >= batch * windows * rows * row:
        assert chunk == (batch, windows, rows)


def test_queries_may_be_fewer_than_keys():
    q, k, v = torch.randn(2, 1, 3, 4, 5), torch.randn(2, 1, 3, 9, 5), torch.randn(2, 1, 3, 9, 5)
    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    found = [attend(*tensors, path=path, budget=LIVE * 8 * 3 * 9 * 2) for path in PATHS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in found]
    for a, b in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's check looks there itself
def test_chunks_are_one_node_of_a_graph():
    """torch's own check of schema, fake tensors and autograd; no graph breaks when compiled; torch.export takes it."""
    cut = layout((4, 8), (4, 4), shifted=True, mask_padding=True)
    tensors = [t.requires_grad_() for t in inputs(cut, torch.float32)]
    torch.library.opcheck(
        torch.ops.manyscale.sequential_attention.default, (*tensors, cut.mask, rates(dtype=torch.float32).requires_grad_(), 10_000)
    )

    def attended(*tensors):
        return attend(*tensors, cut.mask, path="sequential", budget=10_000)

    compiled = torch.compile(attended, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (attended, compiled)), strict=True):
        torch.testing.assert_close(a, b)

    class Net(torch.nn.Module):
        def forward(self, *tensors):
            return attended(*tensors)

    exported = torch.export.export(Net(), tuple(tensors)).module()
    torch.testing.assert_close(exported(*tensors), attended(*tensors))


def test_under_autocast_chunks_compute_in_the_type_they_are_given():
    """In both passes, whether or not the backward one is under it too."""
    cut = layout((4, 4), (4, 4), shifted=False, mask_padding=True)
    tensors = [t.requires_grad_() for t in inputs(cut, torch.float32)]
    expected = attend(*tensors, path="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*tensors, path="sequential")
        gradients = torch.autograd.grad(found.square().sum(), tensors)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


# --- Length one ----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_in_place_is_unit_rounded_once(dtype):
    x, length = torch.randn(4, 2, 3, 5).to(dtype), torch.rand(2, 3, 1)
    x[0, 1, 2] = 0
    expected = unit(x, length).to(dtype)
    whole = torch.stack([x, x], dim=1)
    unit_(whole[:, 0], length)  # of which half is as it was
    torch.testing.assert_close(whole[:, 0], expected)
    torch.testing.assert_close(whole[:, 1], x, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["auto", "reference", "fused"])
def test_what_is_normed_is_not_normed_again(path):
    q, k, v, bias = inputs(layout(*CUTS["image"], shifted=False, mask_padding=False))
    scale = torch.tensor([3.0, 20.0, 100.0], dtype=torch.float64).view(3, 1, 1)
    expected = attend(q, k, v, bias, scale=scale, path="reference")
    torch.testing.assert_close(attend(unit(q, scale), unit(k), v, bias, scale=scale, normed=True, path=path), expected)
    # were they normed again, another length would change nothing
    apart = attend(unit(q, 2 * scale), unit(k), v, bias, scale=scale, normed=True, path=path) - expected
    assert apart.abs().max() > 1e-3


def test_gradients_of_unit():
    x, length = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x, length))
    grad = torch.randn(3, 4, dtype=torch.float64)
    for found, expected in zip(unit_gradient(x, grad, length), torch.autograd.grad(unit(x, length), (x, length), grad), strict=True):
        torch.testing.assert_close(found, expected)
    found, along = unit_gradient(torch.zeros(2, 3), torch.ones(2, 3), 5.0)
    assert not found.any() and not along.any()
