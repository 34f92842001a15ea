"""The quick way is the plain one, and is not taken where something must see or change what happens."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import manyscale.ops.linear as ops
from manyscale.config import SwinConfig
from manyscale.layers.block import ROWS, Mlp
from manyscale.models import build
from manyscale.ops.linear import is_quick, linear
from tests.conftest import loud

quick_only = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("gelu", [None, "exact", "tanh"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 4e-3)])
def test_either_way_is_the_same(dtype, limit, gelu):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 7, 24), (40, 24), (40,)))
    exact = F.linear(x, weight, bias)
    exact = exact if gelu is None else F.gelu(exact, approximate={"exact": "none"}.get(gelu, gelu))
    for some in (bias, None):
        expected = exact if some is not None else linear(x, weight, None, gelu)
        given = [tensor if tensor is None else tensor.to(dtype) for tensor in (x, weight, some)]
        with torch.no_grad():
            assert is_quick(*given[:2]) == (dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available())
            found = linear(*given, gelu)
        assert found.shape == (2, 5, 7, 40) and found.dtype == dtype
        assert (found.double() - expected).norm() / expected.norm() < limit
        again = linear(*given, gelu)  # with gradients
        assert (again.double() - expected).norm() / expected.norm() < limit


@quick_only
@pytest.mark.parametrize(
    ("intel", "dtype", "rows", "width", "gelu", "by_onednn"),
    [
        (False, torch.float32, 8, 384, None, True),
        (True, torch.bfloat16, 8, 384, None, True),
        (True, torch.float32, 8, 384, None, False),
        (True, torch.float32, 8, 192, None, True),
        (True, torch.float32, 2048, 384, None, False),
        (True, torch.float32, 2047, 384, "exact", False),
        (True, torch.float32, 2048, 384, "tanh", True),
    ],
)
def test_who_computes(intel, dtype, rows, width, gelu, by_onednn, monkeypatch):
    real, calls = ops._ONEDNN, []
    monkeypatch.setattr(ops, "_INTEL", intel)
    monkeypatch.setattr(ops, "_ONEDNN", lambda *given: (calls.append(given), real(*given))[1])
    x, weight = torch.ones(1, rows, width, dtype=dtype), torch.ones(4, width, dtype=dtype)
    with torch.no_grad():
        found = linear(x, weight, None, gelu)
    assert bool(calls) == by_onednn
    torch.testing.assert_close(found, torch.full_like(found, width))


def test_views_and_no_rows():
    weight = torch.randn(6, 4)
    wide = torch.randn(3, 8, 9)[:, ::2, 1:].transpose(1, 2)  # (3, 8, 4), neither dense nor in order
    with torch.no_grad():
        torch.testing.assert_close(linear(wide, weight), F.linear(wide, weight))
        torch.testing.assert_close(
            linear(wide.transpose(1, 2).contiguous().transpose(1, 2), weight[::2], None), F.linear(wide, weight[::2])
        )
        assert linear(torch.randn(0, 5, 4), weight).shape == (0, 5, 6)


@quick_only
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own word on switching oneDNN
def test_who_counts_or_watches_sees_all():
    mlp, x = Mlp(8, 24), torch.randn(3, 8)
    with torch.no_grad():
        assert is_quick(x, mlp.fc1.weight)
        with FlopCounterMode(display=False) as counter:
            expected = mlp(x)
        assert counter.get_total_flops() == 2 * 2 * 3 * 8 * 24
        seen = []
        handle = mlp.fc1.register_forward_hook(lambda layer, given, found: seen.append(found))
        mlp(x)
        torch.testing.assert_close(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))  # before the GELU
        handle.remove()
        mlp.fc1 = nn.Sequential(mlp.fc1)  # as a quantiser, or LoRA, would
        torch.testing.assert_close(mlp(x), expected)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not is_quick(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_quick(x) and mlp(x).dtype == torch.bfloat16


class Other(torch.Tensor):
    """As tensors that are cut over ranks, or quantised, are."""


@torch.no_grad()
def test_tensors_of_other_kinds_go_torchs_own_way():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert is_quick(x, nn.Parameter(weight)) == torch.backends.mkldnn.is_available()
    assert not is_quick(x, weight.as_subclass(Other)) and not is_quick(x.as_subclass(Other), weight)
    assert type(linear(x, weight.as_subclass(Other))) is Other


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_what_takes_the_place_of_a_layer_is_asked(similarity):
    """An adapter in the place of attention's first layer, as LoRA puts one there; and a hook on it."""
    config = SwinConfig(image_size=16, patch=4, window=4, width=8, depths=(1,), heads=(2,), classes=3, similarity=similarity)
    model, images = loud(build(config)).eval(), torch.randn(2, 3, 16, 16)
    before, attention, seen = model(images), model.stages[0].blocks[0].attention.branch, []
    handle = attention.qkv.register_forward_hook(lambda layer, given, found: seen.append(found))
    torch.testing.assert_close(model(images), before)
    assert len(seen) == 1
    handle.remove()
    attention.qkv = nn.Sequential(attention.qkv, nn.Linear(24, 24, bias=False))
    nn.init.eye_(attention.qkv[1].weight)
    torch.testing.assert_close(model(images), before)
    attention.qkv[1].weight.mul_(2)
    assert not torch.allclose(model(images), before, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(3, 4), torch.ones(6, 4, dtype=torch.bfloat16), None),
        (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(6, 4), None),
        (torch.ones(3, 4), torch.ones(6, 4), torch.ones(6, dtype=torch.bfloat16)),
        (torch.ones(3, 5), torch.ones(6, 4), None),
        (torch.ones(3, 4), torch.ones(6, 4), torch.ones(5)),
        (torch.ones(3, 4), torch.ones(4), None),
        (torch.ones(3, 4), torch.ones(6, 4), torch.ones(1)),
        (torch.ones(3, 0), torch.ones(6, 0), torch.ones(6)),
    ],
)
def test_what_does_not_fit_is_torchs_own_to_take_or_refuse(x, weight, bias):
    """oneDNN takes other types without a word, and of other shapes says that it could not create a primitive descriptor."""
    try:
        expected = F.linear(x, weight, bias)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as found:
            linear(x, weight, bias)
        assert str(found.value) == str(error) and "primitive" not in str(error)
    else:
        assert torch.equal(linear(x, weight, bias), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.autograd.forward_ad scripts something of its own
def test_tangents_of_forward_mode_are_kept():
    """no_grad does not switch forward-mode derivatives off."""
    x, weight, tangent = torch.randn(3, 4), torch.randn(6, 4), torch.randn(3, 4)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), weight)).tangent
        torch.testing.assert_close(found, F.linear(tangent, weight))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_traced_mlp_is_of_torchs_own_operations():
    """torch.jit.trace, which other converters start from, knows no oneDNN, and must not fix the number of tokens."""
    mlp = Mlp(8, 24)
    traced = torch.jit.trace(mlp, torch.randn(ROWS + 1, 8))
    for count in (1, 5, 3 * ROWS):
        x = torch.randn(count, 8)
        torch.testing.assert_close(traced(x), mlp(x))


def test_functions_of_functions_work():
    layer = Mlp(8, 24)
    stack = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    x = torch.randn(5, 8)
    with torch.no_grad():
        both = torch.func.vmap(lambda weights: torch.func.functional_call(layer, weights, (x,)))(stack)
        torch.testing.assert_close(both[0], layer(x))
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
