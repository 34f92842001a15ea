"""How a run is spread over ranks, the processes that torchrun starts."""

from dataclasses import dataclass
from typing import Literal

from manyscale.config.checks import finite, require

Shard = Literal["ddp", "zero1", "zero2", "zero3", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What each rank keeps of weights, gradients and moments. One process alone keeps all, whatever is said here."""

    shard: Shard = "ddp"  # ddp: all. zero1: its share of moments. zero2, zero3: its share of everything; zero2 gathers weights once a step,
    # zero3 twice. hsdp: zero3 within groups, each with a copy of everything
    shard_group: int = 0  # ranks of an hsdp group; 0: those of a machine
    offload: bool = False  # of zero2, zero3, hsdp: what lies still lies in the CPU's memory
    elastic: Literal["close", "exact"] = "close"  # exact: the same bits on any number of ranks, for some time; of ddp and zero1
    timeout: float = 300.0  # seconds: a rank that does not answer for so long is named, and the run ends

    def __post_init__(self) -> None:
        finite(self, "timeout")
        require(self.timeout > 0, "timeout", f"{self.timeout} must be positive, such as 300")
        require(self.shard_group >= 0, "shard_group", f"{self.shard_group} must be 0 (a machine's ranks) or more")
        whole = self.shard in ("ddp", "zero1")
        exact = self.elastic == "exact"
        require(whole or not exact, "elastic", f"exact sums whole gradients; --shard {self.shard} has none: give ddp or zero1")
        require(not (whole and self.offload), "offload", f"is of zero2, zero3 and hsdp; --shard {self.shard} keeps weights on the device")
        require(not self.shard_group or self.shard == "hsdp", "shard_group", "goes with --shard hsdp")
