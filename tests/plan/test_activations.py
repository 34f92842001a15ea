"""Planned activations against bytes that are counted without numbers, as on a GPU, and against measured ones on this CPU."""

import runpy
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import manyscale as ms
from manyscale.config import Memory
from manyscale.models.paths import set_attention
from manyscale.ops import attention, kernel
from manyscale.ops.windows import layout
from manyscale.plan.activations import Attended, How, _kernel, activations, walk
from manyscale.plan.memory import leans, memory
from manyscale.presets import model_config

MEASURE = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "measure_memory.py"))
TWO = {"depths": (2, 1), "heads": (3, 6), "classes": 10}
CLIP = {"image_size": (4, 32, 32), "patch": (2, 4, 4), "window": (2, 4, 4)}
DEEP = {"depth": 2, "classes": 10}
SUPER = {**DEEP, "sizes": (96,), "drop_blocks": ()}


def counted(name: str, fields: dict, path: str, precision: str, batch: int) -> int:
    """Bytes kept for the backward pass by a forward pass on tensors that stand for ones of a GPU; parameters and images apart."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        found.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with torch.device("meta"):
        model = set_attention(ms.create_model(name, **fields), path).train()
    torch.set_autocast_enabled("cuda", precision == "bfloat16")  # torch.autocast refuses without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            for module in model.modules():
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                for key, buffer in list(module._buffers.items()):
                    module._buffers[key] = torch.empty(buffer.shape, device="cuda")
            images = torch.empty(batch, 3, *model.config.size, device="cuda")
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(images).float().sum()
            for tensor in (images, *model.parameters()):
                found.pop(tensor.untyped_storage()._cdata, None)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    return sum(storage.nbytes() for storage in found.values())


def efficient(q, k, v, attn_mask=None, dropout_p=0.0, scale=None):
    """The kernel that a GPU takes for a bias that learns; without one torch would choose its plain form here."""
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, scale=scale)[0]


@pytest.mark.parametrize(
    ("name", "fields", "path", "precision"),
    [
        ("swinv2_tiny", {**TWO, "image_size": 64, "window": 8}, "reference", "bfloat16"),
        ("swinv2_tiny", {**TWO, "image_size": 64, "window": 8}, "sequential", "bfloat16"),
        ("swinv2_tiny", {**TWO, "image_size": 64, "window": 8}, "fused", "bfloat16"),
        ("swinv2_tiny", {**TWO, "image_size": 72, "window": 4, "norm": "sandwich"}, "reference", "float32"),  # grids that are padded
        ("swinv2_tiny", {**TWO, "image_size": 72, "window": 4, "padding": "attend"}, "sequential", "float32"),
        ("swinv2_tiny", {**TWO, **CLIP, "norm": "post", "extra_norm_every": 2}, "reference", "bfloat16"),
        ("swinv2_tiny", {**TWO, "image_size": 64, "window": 8}, "kernel", "bfloat16"),
        ("swin_tiny", {**TWO, "image_size": 64, "window": 8}, "kernel", "float32"),
        ("swin_tiny", {**TWO, "image_size": 72, "window": 4}, "reference", "bfloat16"),
        ("swin_tiny", {**TWO, "image_size": 64, "window": 8}, "sequential", "float32"),
        ("vit_tiny_patch16", {**DEEP, "image_size": 96, "pool": "token"}, "fused", "float32"),
        ("vit_tiny_patch16", {**DEEP, "image_size": 96, "pool": "gap", "position": "sincos2d"}, "reference", "bfloat16"),
        ("vit_tiny_patch16", {**DEEP, "image_size": 96, "pool": "map"}, "sequential", "bfloat16"),
        ("supervit_deit_tiny", SUPER, "fused", "bfloat16"),
        ("supervit_lvvit_tiny", SUPER, "fused", "float32"),
    ],
)
def test_what_is_kept_for_an_image_is_what_torch_keeps(name, fields, path, precision, monkeypatch):
    """Of four images less than of two, so that what is kept once for all, such as weights in bfloat16, cancels."""
    if path == "fused":
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", efficient)
    config = model_config(name, **fields)
    four, two = (walk(activations(config, Memory(attention=path), batch=batch, precision=precision))[0] for batch in (4, 2))
    images = 2 * 4 * config.channels * prod(config.size)
    seen = counted(name, fields, path, precision, 4) - counted(name, fields, path, precision, 2)
    assert four - two - images == pytest.approx(seen, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "fields", "batch", "precision", "way"),
    [
        ("swinv2_tiny", {**TWO, "image_size": 112, "window": 8}, 2, "float32", "naive"),
        ("swinv2_tiny", {**TWO, "image_size": 128, "window": 16}, 2, "bfloat16", "naive"),
        ("swinv2_tiny", {**TWO, "image_size": 128, "window": 16}, 2, "float32", "sequential"),
        ("swinv2_tiny", {**TWO, "image_size": 128, "window": 16}, 2, "bfloat16", "selective"),
        ("swinv2_tiny", {**TWO, "image_size": 128, "window": 16}, 2, "float32", "blocks"),
        ("swinv2_tiny", {**TWO, "image_size": 128, "window": 16}, 2, "bfloat16", "both"),
        ("swin_tiny", {**TWO, "image_size": 128, "window": 8}, 2, "float32", "naive"),
        ("vit_tiny_patch16", {**DEEP, "image_size": 128}, 16, "float32", "naive"),
        ("supervit_deit_tiny", SUPER, 16, "float32", "blocks"),
    ],
)
def test_a_step_takes_what_is_measured(name, fields, batch, precision, way):
    """Within a tenth; without weights, moments and images within 15 %."""
    measured = MEASURE["Step"](name, fields, batch, precision, way)
    alive, most, (planned, _) = measured.alive(), measured.measured(), measured.planned()
    assert planned == pytest.approx(most, rel=0.1)
    assert planned - alive == pytest.approx(most - alive, rel=0.15)


def test_lean_ways_keep_less_and_less():
    config = model_config("swinv2_large", image_size=768, window=32)
    found = {name: walk(activations(config, lean)) for name, lean in leans(Memory(), 2).items()}
    peaks = [max(forward, backward) for _, forward, backward in found.values()]
    assert list(found) == [
        "nothing",
        "--sequential 2",
        "--checkpointing selective",
        "--checkpointing selective --sequential 2",
        "--checkpointing blocks",
        "--checkpointing blocks --sequential 2",
    ]
    assert peaks[-1] < 0.12 * peaks[0] and peaks[-1] == min(peaks) and peaks[0] == max(peaks)
    assert found["--checkpointing blocks"][0] == found["--checkpointing blocks --sequential 2"][0]


@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [4, 7, 8, 12])
def test_partial_sums_of_a_bias_are_the_kernels_own(side, dtype, width):
    """As many as programs share the windows, which is fewer where a window has tiles."""
    heads, batch = 3, 512
    qkv = torch.empty(batch, side * side, 3, heads, width, dtype=dtype)
    tables = kernel.tables(layout((side, side), (side, side), shifted=False, mask_padding=True), mask_padding=True)
    launched = kernel._Plan.of(qkv, *tables[:2], kernel.block_of(qkv))
    how = How(Memory(attention="kernel"), batch, "cuda", dtype.itemsize, dtype.itemsize, 4)
    with_bias, without = (_kernel(Attended(batch, 1, heads, side * side, heads * width, True, bias), how) for bias in (4, 0))
    sums = (with_bias.backward - with_bias.kept) - (without.backward - without.kept)
    assert sums == 4 * launched.loops * heads * side**4


def test_a_budget_that_a_row_exceeds_is_no_plan():
    with pytest.raises(ValueError, match="field `attention_memory`: 1,000 bytes; a row of 64 tokens in 3 heads takes 3,072, give more"):
        activations(model_config("swinv2_tiny"), Memory(attention="sequential", attention_memory="1kB"))


def test_kernels_are_of_windows_on_a_gpu():
    for name, device in (("swinv2_tiny", "cpu"), ("vit_tiny_patch16", "cuda")):
        with pytest.raises(ValueError, match="field `attention`: kernel is of windows, on a GPU; give auto"):
            activations(model_config(name), Memory(attention="kernel"), device=device)


def test_every_part_has_its_weights():
    for name in ("swin_tiny", "swinv2_giant", "vit_base_patch16", "supervit_lvvit_small"):
        config = model_config(name)
        assert sum(part.weights for part in activations(config)) == pytest.approx(memory(config).weights, rel=1e-5)
