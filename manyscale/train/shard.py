"""What is done to a net from outside so that it fits: which path its attention takes, and what its backward pass computes again.

A model file knows nothing of it. The order is fixed: attention, then activation checkpointing, then compiling.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from manyscale.config import Memory, read_bytes
from manyscale.models import set_attention

# What selective checkpointing keeps: results of linear layers and of attention. The rest is norms, GELUs, sums, copies, and the
# products of attention's reference path, which are as large as all logits.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.manyscale.sequential_attention.default,
    torch.ops.manyscale.window_attention.default,
}


def fit(model: nn.Module, memory: Memory) -> nn.Module:
    """The net itself, made to compute as `memory` says.

    Raises:
        ValueError: stages asked for that the net does not have; blocks asked for of a net without.
    """
    budget = read_bytes(memory.attention_memory)
    set_attention(model, memory.attention, budget=budget)
    if memory.sequential:
        set_attention(model, "sequential", stages=memory.sequential, budget=budget)
    if memory.checkpointing != "none":
        for block in blocks(model):
            block.forward = Again(block.forward, memory.checkpointing == "selective")
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """Every block of a net: the members of its lists named `blocks`.

    Raises:
        ValueError: there are none.
    """
    found = [block for name, part in model.named_modules() if name.rpartition(".")[2] == "blocks" for block in part]
    if not found:
        raise ValueError(f"field `checkpointing`: {type(model).__name__} has no blocks that could be computed again; give none")
    return found


class Again:
    """A block's forward whose backward pass computes it again, with the same random numbers (Chen et al., arXiv 1604.06174).

    It takes the place of the method, so names of parameters stay; a copy of the net has copies of these, of its own blocks.
    """

    def __init__(self, forward: Any, selective: bool) -> None:
        self.forward, self.selective = forward, selective

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs)
        if not self.selective:
            return checkpoint(self.forward, *inputs, use_reentrant=False)
        return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=_contexts)


def _keep(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _keep)
