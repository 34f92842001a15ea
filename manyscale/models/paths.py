"""Which path a net's attention takes."""

from typing import get_args

from torch import nn

from manyscale.config import nearest
from manyscale.layers.attention import WindowAttention
from manyscale.ops.attention import BUDGET, Path


def set_attention(model: nn.Module, path: Path, *, stages: int | None = None, budget: int = BUDGET) -> nn.Module:
    """The net itself, its attention computed along `path`; see `ops.attention.attend`. Weights do not know of it.

    Args:
        stages: of a Swin, only in this many first stages.
        budget: bytes that the logits of a chunk may take, of the sequential path.

    Raises:
        ValueError: no such path; more stages than there are, or a net without stages; the kernels for a net without windows.
    """
    if path not in get_args(Path):
        raise ValueError(f"field `attention`: unknown path `{path}`; {nearest(path, get_args(Path))}")
    parts: list[nn.Module] = [model]
    if stages is not None:
        encoder = getattr(model, "encoder", model)  # of a SimMIM net
        found = list(getattr(encoder, "stages", ()))
        if not 0 <= stages <= len(found):
            raise ValueError(f"field `sequential`: {stages} stages, but {type(encoder).__name__} has {len(found)}; --attention sets all")
        parts = found[:stages]
    if path == "kernel" and not any(isinstance(module, WindowAttention) for module in model.modules()):
        raise ValueError(f"field `attention`: kernel is attention inside windows, which {type(model).__name__} has none of; give fused")
    for part in parts:
        for module in part.modules():
            if hasattr(module, "attention_path"):
                module.attention_path, module.attention_budget = path, budget
    return model
