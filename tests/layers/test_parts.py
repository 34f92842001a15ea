"""The small modules: patches, merging, residual branches, position bias, window attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyscale.layers.attention import WindowAttention
from manyscale.layers.block import ROWS, Block, Mlp, Residual
from manyscale.layers.patch import PatchEmbed, PatchMerge
from manyscale.layers.position_bias import ContinuousBias, TableBias
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.ops.windows import layout


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_patches_are_a_linear_layer_on_blocks_of_pixels():
    embed, images = PatchEmbed(3, 8, (2, 3)), torch.randn(2, 3, 4, 9)
    tokens = embed(images)
    block = images[1, :, 2:4, 3:6]
    expected = embed.norm(embed.proj.weight.flatten(1) @ block.flatten() + embed.proj.bias)
    assert tokens.shape == (2, 2, 3, 8)
    torch.testing.assert_close(tokens[1, 1, 1], expected)


@pytest.mark.parametrize(("size", "patch"), [((5, 9), (4, 4)), ((1, 1), (4, 4)), ((3, 5, 9), (2, 4, 4))])
def test_patches_are_padded_with_zeros_at_the_far_ends(size, patch):
    embed, x = PatchEmbed(3, 8, patch), torch.randn(1, 3, *size)
    padded = torch.zeros(1, 3, *(-(-s // p) * p for s, p in zip(size, patch, strict=True)))
    padded[(..., *map(slice, size))] = x
    assert torch.equal(embed(x), embed(padded))


@pytest.mark.parametrize("norm", ["before", "after"])
def test_merging_takes_two_by_two_down_the_column_first(norm):
    merge, x = PatchMerge(4, norm), torch.randn(2, 4, 6, 4)
    four = torch.cat([x[1, 2, 4], x[1, 3, 4], x[1, 2, 5], x[1, 3, 5]])
    layer_norm = merge.norm_in if norm == "before" else merge.norm_out
    nn.init.normal_(layer_norm.weight)
    expected = merge.reduction(layer_norm(four)) if norm == "before" else layer_norm(merge.reduction(four))
    result = merge(x)
    assert result.shape == (2, 2, 3, 8)
    torch.testing.assert_close(result[1, 1, 2], expected)


def test_merging_leaves_time_alone_and_pads_odd_grids():
    merge, x = PatchMerge(4, "after"), torch.randn(2, 3, 5, 7, 4)
    result = merge(x)
    assert result.shape == (2, 3, 3, 4, 8)
    torch.testing.assert_close(result[:, 1], merge(x[:, 1]))
    torch.testing.assert_close(result, merge(F.pad(x, (0, 0, 0, 1, 0, 1))))


def test_residual_norm_placements():
    x, branch = torch.randn(3, 5, 8), nn.Linear(8, 8)
    for norm, expected in {
        "pre": lambda r: x + branch(r.norm_in(x)),
        "res-post": lambda r: x + r.norm_out(branch(x)),
        "sandwich": lambda r: x + r.norm_out(branch(r.norm_in(x))),
        "post": lambda r: r.norm_sum(x + branch(x)),
    }.items():
        residual = Residual(branch, 8, norm)
        for p in (p for part in (residual.norm_in, residual.norm_out, residual.norm_sum) for p in part.parameters()):
            nn.init.normal_(p)
        torch.testing.assert_close(residual(x), expected(residual), msg=norm)


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_drop_path_comes_after_the_norm(rate):
    """A sample keeps x, or gets its normed branch over the keep rate; were the norm last, it would undo both."""
    x = torch.randn(200, 3, 8)
    residual = Residual(nn.Linear(8, 8), 8, "res-post", drop_path=rate)
    nn.init.normal_(residual.norm_out.weight)
    nn.init.normal_(residual.norm_out.bias)
    change = residual(x) - x
    kept = residual.norm_out(residual.branch(x)) / (1 - rate)
    dropped = (change == 0).all(dim=(1, 2))
    torch.testing.assert_close(change[~dropped], kept[~dropped])
    assert abs(dropped.float().mean().item() - rate) < 0.12
    torch.testing.assert_close(residual.eval()(x), x + kept * (1 - rate))


def test_block_is_attention_then_mlp_then_the_extra_norm():
    block = Block(8, nn.Linear(8, 8), Mlp(8, 16), "pre", drop_path=0.0, zero_init=False, extra_norm=True)
    x = torch.randn(2, 3, 8)
    first = x + block.attention.branch(F.layer_norm(x, (8,)))
    hidden = F.gelu(block.mlp.branch.fc1(F.layer_norm(first, (8,))))
    torch.testing.assert_close(block(x), F.layer_norm(first + block.mlp.branch.fc2(hidden), (8,)))


def test_table_bias_looks_up_every_pair():
    bias = TableBias((2, 3), heads=2)
    assert bias.table.std() < 0.04
    result = bias(relative_index((2, 3), (2, 3)), None)
    assert result.shape == (2, 6, 6)
    for i in range(6):
        for j in range(6):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert result[1, i, j] == bias.table[(down + 1) * 5 + right + 2, 1]


def test_continuous_bias_is_a_function_of_the_offset():
    """Equation 3: 16 sigmoid of a two-layer network on (down, right)."""
    bias = ContinuousBias(2, heads=3)
    window = (3, 2)
    result = bias(relative_index(window, window), relative_coordinates(window, (8, 8), "log"))
    offset = torch.tensor([2.0, -1.0])  # from the first row, second column, to the last row, first column
    x = 8 * offset / 7
    x = x.sign() * (1 + x.abs()).log2() / math.log2(8)
    torch.testing.assert_close(result[:, 4, 1], 16 * torch.sigmoid(bias.fc2(torch.relu(bias.fc1(x)))))
    assert (result > 0).all() and (result < 16).all()


def attention(similarity, heads=2, width=8, dropout=0.0, window=(4, 4)):
    module = WindowAttention(width, heads, similarity, TableBias(window, heads), dropout).double()
    for p in module.parameters():
        nn.init.normal_(p)
    return module.eval()


@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_attention_by_hand(similarity, path):
    """One window, one head at a time, from the papers' formulas."""
    module, x = attention(similarity), torch.randn(1, 4, 4, 8, dtype=torch.float64)
    module.attention_path = path
    index = relative_index((4, 4), (4, 4))
    q, k, v = (x.reshape(16, 8) @ module.qkv.weight.T).chunk(3, dim=1)
    if similarity == "dot":
        q, k, v = (t + b for t, b in zip((q, k, v), module.qkv.bias.chunk(3), strict=True))
    else:
        q, v = q + module.q_bias, v + module.v_bias
    heads = []
    for head, part in enumerate((slice(0, 4), slice(4, 8))):
        if similarity == "dot":
            logits = q[:, part] @ k[:, part].T / 2
        else:
            logits = F.cosine_similarity(q[:, None, part], k[None, :, part], dim=-1) * module.logit_scale[head].exp()
        heads.append((logits + module.bias.table[index, head]).softmax(dim=-1) @ v[:, part])
    expected = module.proj(torch.cat(heads, dim=1)).reshape(1, 4, 4, 8)
    cut = layout((4, 4), (4, 4), shifted=False, mask_padding=True)
    torch.testing.assert_close(module(x, cut, index, None), expected)


def test_temperature_stops_at_a_hundredth():
    module, x = attention("cosine"), torch.randn(1, 4, 4, 8, dtype=torch.float64)
    cut, index = layout((4, 4), (4, 4), shifted=False, mask_padding=True), relative_index((4, 4), (4, 4))
    results = []
    for scale in (100.0, 1e6):
        nn.init.constant_(module.logit_scale, math.log(scale))
        results.append(module(x, cut, index, None))
    torch.testing.assert_close(*results)


def test_cosine_has_no_bias_on_k_and_dot_has():
    assert attention("cosine").qkv.bias is None and attention("cosine").q_bias.shape == (8,)
    assert attention("dot").qkv.bias.shape == (24,) and not hasattr(attention("dot"), "logit_scale")


def test_attention_stays_inside_windows():
    """A token of the shifted layout sees its window of the unshifted picture alone."""
    module = attention("cosine")
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    index = relative_index((4, 4), (4, 4))
    for shifted, rows in ((False, slice(0, 4)), (True, slice(2, 6))):
        out = module(x, layout((8, 8), (4, 4), shifted=shifted, mask_padding=True), index, None)
        (grad,) = torch.autograd.grad(out[0, 3, 3].sum(), x)
        seen = torch.zeros(8, 8, dtype=torch.bool)
        seen[rows, rows] = True
        assert torch.equal(grad[0].any(dim=-1), seen)


def test_attention_drops_in_training_only():
    module, x = attention("dot", dropout=0.5), torch.randn(1, 4, 4, 8, dtype=torch.float64)
    context = layout((4, 4), (4, 4), shifted=False, mask_padding=True), relative_index((4, 4), (4, 4)), None
    assert torch.equal(module(x, *context), module(x, *context))
    module.train()
    assert not torch.equal(module(x, *context), module(x, *context))


@pytest.mark.parametrize("shape", [(1, ROWS + 1, 8), (3, 17, 43, 8), (2, 5, 8)])
def test_an_mlp_in_parts_is_the_whole(shape, monkeypatch):
    """In evaluation on a CPU some tokens go after others; with gradients all at once."""
    mlp, x = Mlp(8, 24).double(), torch.randn(*shape, dtype=torch.float64)
    sizes = []
    layers = mlp._layers
    monkeypatch.setattr(mlp, "_layers", lambda x: sizes.append(x[..., 0].numel()) or layers(x))
    whole = mlp(x)
    with torch.no_grad():
        parts = mlp(x)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    assert sizes[0] == sum(sizes[1:]) and max(sizes[1:]) <= ROWS
