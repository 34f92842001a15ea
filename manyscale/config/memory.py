"""How little memory: bytes as people write them, and what a run gives up for fewer of them."""

import re
from dataclasses import dataclass
from typing import Literal

from manyscale.config.checks import require

AttentionPath = Literal["auto", "reference", "fused", "sequential", "kernel"]
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_FORM = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kmgt]i?|)b?", re.IGNORECASE)


def read_bytes(text: str) -> int:
    """The bytes of a text such as 64MiB, 40GB, 1.5 GiB or 4096.

    Raises:
        ValueError: anything else, or nothing.
    """
    found = _FORM.fullmatch(text.strip())
    count = int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if not count:
        raise ValueError(f"{text!r} is no number of bytes; write 64MiB or 40GB")
    return count


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is computed again, or one part after another, so that less is kept. Answers change by rounding alone."""

    attention: AttentionPath = "auto"  # how attention is computed: see docs/performance.md
    sequential: int = 0  # of a Swin, the first stages that attend one chunk of windows after another (Swin V2, section 4.1: 2)
    attention_memory: str = "64MiB"  # what such a chunk's logits may take
    checkpointing: Literal["none", "blocks", "selective"] = "none"  # blocks keep their input alone; selective: also what linear layers give

    def __post_init__(self) -> None:
        require(self.sequential >= 0, "sequential", f"{self.sequential} must be 0 (none) or the number of first stages, such as 2")
        beside = self.attention in ("auto", "sequential")
        require(
            beside or not self.sequential, "sequential", f"{self.sequential} stages, but --attention {self.attention} for all; give one"
        )
        try:
            read_bytes(self.attention_memory)
        except ValueError as error:
            raise ValueError(f"field `attention_memory`: {error}") from None
