"""What no peer has: padding that nobody attends, and clips. Against the nets written a second time, without windows.

The reference knows no padding, rolling, splitting or masks. Along an axis shifted by s, token p lies in cell
floor((p - s) / w); two tokens may attend each other if they share the cell of every axis. All the rest is one dense
softmax over the whole grid, its bias computed for each pair from the offset itself.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import manyscale as ms

pytestmark = pytest.mark.parity


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))


def attention(x: Tensor, state: dict[str, Tensor], at: str, heads: int, window: tuple, learnt: tuple, odd: bool, v2: bool) -> Tensor:
    """(B, *grid, C) -> the same: every token attends its cell."""
    grid = x.shape[1:-1]
    here = [min(w, g) for w, g in zip(window, grid, strict=True)]
    places = torch.cartesian_prod(*map(torch.arange, grid))  # (N, axes)
    shift = torch.tensor([w // 2 if odd and g > w else 0 for w, g in zip(here, grid, strict=True)])
    cell = (places - shift).div(torch.tensor(here), rounding_mode="floor")
    allowed = (cell[:, None] == cell[None, :]).all(-1)  # (N, N)
    offset = (places[:, None] - places[None, :])[allowed]  # (pairs, axes)
    if v2:
        scaled = 8 * (offset.float() / torch.tensor([float(p - 1) for p in learnt]))
        scaled = (scaled.sign() * (scaled.abs() + 1).log2() / 3).double()  # float32 as in the official code
        pairs = 16 * linear(linear(scaled, state, at + ".bias.fc1").relu(), state, at + ".bias.fc2").sigmoid()  # (pairs, heads)
    else:
        table = state[at + ".bias.table"].reshape(*(2 * w - 1 for w in window), heads)
        pairs = table[(offset + torch.tensor(window) - 1).unbind(-1)]
    bias = x.new_zeros(*allowed.shape, heads)
    bias[allowed] = pairs
    tokens = x.flatten(1, -2)
    q, k, v = linear(tokens, state, at + ".qkv").chunk(3, dim=-1)
    if v2:
        q, v = q + state[at + ".q_bias"], v + state[at + ".v_bias"]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, d)
    if v2:
        cosine = (q @ k.mT) / (q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :])
        logits = cosine * state[at + ".logit_scale"].clamp(max=math.log(100)).exp()
    else:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
    weights = (logits + bias.permute(2, 0, 1)).masked_fill(~allowed, -math.inf).softmax(-1)
    return linear((weights @ v).transpose(1, 2).flatten(2), state, at + ".proj").reshape(x.shape)


def merge(x: Tensor) -> Tensor:
    """2 x 2 neighbours by channel, down the column first; a missing neighbour is zero."""
    height, width = x.shape[-3:-1]
    out = x.new_zeros(*x.shape[:-3], -(-height // 2), -(-width // 2), 4, x.shape[-1])
    for row in range(height):
        for column in range(width):
            out[..., row // 2, column // 2, row % 2 + 2 * (column % 2), :] = x[..., row, column, :]
    return out.flatten(-2)


def reference(model: torch.nn.Module, x: Tensor) -> Tensor:
    """The logits of V1 or V2, from the model's weights and configuration alone."""
    config, state = model.config, model.state_dict()
    v2 = config.similarity == "cosine"
    ends = [n for size, patch in zip(reversed(x.shape[2:]), reversed(config.patches), strict=True) for n in (0, -size % patch)]
    conv = F.conv3d if config.axes == 3 else F.conv2d
    x = norm(conv(F.pad(x, ends), state["patch.proj.weight"], state["patch.proj.bias"], config.patches).movedim(1, -1), state, "patch.norm")
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            at = f"stages.{i}.blocks.{j}"
            where = f"{at}.attention.branch", config.heads[i], config.windows[i], config.pretrained_windows[i], j % 2 == 1, v2
            if v2:
                x = x + norm(attention(x, state, *where), state, f"{at}.attention.norm_out")
                x = x + norm(mlp(x, state, f"{at}.mlp.branch"), state, f"{at}.mlp.norm_out")
            else:
                x = x + attention(norm(x, state, f"{at}.attention.norm_in"), state, *where)
                x = x + mlp(norm(x, state, f"{at}.mlp.norm_in"), state, f"{at}.mlp.branch")
        if i < len(config.depths) - 1:
            at = f"stages.{i}.merge"
            x = merge(x) if v2 else norm(merge(x), state, f"{at}.norm_in")
            x = linear(x, state, f"{at}.reduction")
            x = norm(x, state, f"{at}.norm_out") if v2 else x
    return linear(norm(x, state, "norm").flatten(1, -2).mean(1), state, "head")


def mlp(x: Tensor, state: dict[str, Tensor], at: str) -> Tensor:
    return linear(F.gelu(linear(x, state, f"{at}.fc1")), state, f"{at}.fc2")


@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize(
    ("built", "image", "window", "patch"),
    [
        ((32, 44), (32, 44), 3, 2),  # 16 x 22 and 8 x 11 tokens: both need padding, both are shifted
        ((24, 12), (25, 31), (4, 3), 2),  # 13 x 16 tokens: another size than built for, odd, pixels padded, unequal windows
        ((20, 8), (20, 8), (5, 6), 2),  # one axis clipped to its grid: shifted along the other only
        ((32, 32), (12, 28), 7, 2),  # 6 x 14 and 3 x 7 tokens: smaller windows than built, which read the middle of V1's tables
        ((5, 14, 18), (5, 14, 18), (2, 3, 4), (1, 2, 2)),  # clips: 5 x 7 x 9 and 5 x 4 x 5
        ((5, 14, 10), (5, 14, 10), (3, 3, 8), (2, 2, 2)),  # three frames in one window: time is not shifted
    ],
)
@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny"])
def test_against_dense_attention(name: str, built: tuple, image: tuple, window: object, patch: object, path: str) -> None:
    pretrained = {"pretrained_window": 7} if name == "swinv2_tiny" and len(built) == 2 else {}
    fields = {"image_size": built, "window": window, "patch": patch, "width": 16, "depths": (2, 2), "heads": (2, 4), "classes": 3}
    model = ms.create_model(name, **fields, **pretrained).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 1 if parameter.dim() == 1 or key.endswith("table") else 1.5 / math.sqrt(parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if key.endswith("logit_scale"):
                parameter.copy_(torch.linspace(0.5, 5, len(parameter)).view(-1, 1, 1))
        model = model.double()
        for module in model.modules():
            if hasattr(module, "attention_path"):
                module.attention_path = path
        x = torch.randn(2, 3, *image, generator=generator, dtype=torch.float64)
        ours, expected = model(x), reference(model, x)
    assert expected.std() > 0.1
    assert ((ours - expected).abs().max() / expected.abs().max()).item() <= 1e-9
