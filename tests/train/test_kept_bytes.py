"""What a training step on a GPU keeps for its backward pass, counted to the byte on tensors that have shapes but no numbers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import manyscale as ms
from manyscale.config import Memory
from manyscale.train.shard import fit

pytestmark = pytest.mark.attention


def kept(model: nn.Module, batch: int, size: int) -> int:
    """Bytes kept by one forward pass under CUDA's autocast to bfloat16, on tensors that stand for ones of a GPU."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        found.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.empty(batch, 3, size, size, device="cuda")).float().sum()
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    return sum(storage.nbytes() for storage in found.values())


def per_image(size: int, window: int, memory: Memory) -> float:
    """MiB that one more image costs: what is kept once, such as weights in bfloat16, cancels."""
    with torch.device("meta"):
        model = fit(ms.create_model("swinv2_tiny", image_size=size, window=window, drop_path=0.0), memory).train()
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        return (kept(model, 3, size) - kept(model, 1, size)) / 2 / 2**20


@pytest.mark.parametrize(
    ("size", "window", "plain", "short"),
    [(256, 8, 105.9, 69.3), (384, 24, 603.5, 155.8)],
)
def test_attention_keeps_no_logits(size, window, plain, short):
    """timm's net keeps 109 and 736 MiB an image; 12 numbers a token and channel in bfloat16, all that must be, are 43 and 96."""
    assert per_image(size, window, Memory(attention="reference")) == pytest.approx(plain, abs=0.1)
    assert per_image(size, window, Memory(attention="sequential")) == pytest.approx(short, abs=0.1)
    assert per_image(size, window, Memory(attention="kernel")) == pytest.approx(short, abs=0.1)


def test_blocks_computed_again_keep_their_input_alone():
    """3.6 MiB of inputs in bfloat16 are 7.1 in float32, which the main branch is; and the outermost layers."""
    assert per_image(256, 8, Memory(checkpointing="blocks")) == pytest.approx(11.9, abs=0.1)
