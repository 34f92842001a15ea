"""The processes that train one net together: which of them this is, and the few words they exchange.

torchrun starts them and says in the environment who is who; started alone, a process is all there is. Words go through the CPU
(gloo) as numbers and JSON, never as pickled objects, so no rank runs what another sends.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; `rank` 0 leads: it alone writes and speaks."""

    rank: int = 0
    count: int = 1
    local: int = 0  # which of this machine's
    on_node: int = 1  # how many this machine has
    words: Any = None  # the group that words go through, so that they never meet a gradient

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, numbers: Sequence[float]) -> Tensor:
        """The numbers of every rank, (count, len(numbers)) float64: the same bits everywhere."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.count == 1:
            return mine[None]
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.words)
        return torch.stack(found)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, added in the order of ranks: the same bits everywhere. On the CPU, float64."""
        mine = tensor.detach().cpu().double()
        return self.gather(mine.flatten().tolist()).sum(0).view_as(mine)

    def tell(self, value: Any) -> Any:
        """The leader's `value`, anything that JSON holds, on every rank."""
        if self.count == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if self.leads else torch.empty(0)
        length = torch.tensor(len(text))
        dist.broadcast(length, 0, group=self.words)
        text = text if self.leads else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.words)
        return json.loads(text.numpy().tobytes())

    def collect(self, value: Any) -> list[Any]:
        """Every rank's `value`, anything that JSON holds, in the order of ranks, on every rank."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = self.gather([len(text)])[:, 0].long()
        padded = torch.frombuffer(bytearray(text.ljust(int(lengths.max()))), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded, group=self.words)
        return [json.loads(each.numpy().tobytes()) for each in found]

    def in_turns(self, tensors: list[Tensor]) -> list[Tensor]:
        """All ranks' tensors on every rank: the first of each in the order of ranks, the second of each, ...

        Args:
            tensors: on the CPU, of one dtype, alike but in their first length; every rank has as many.
        """
        if self.count == 1 or not tensors:
            return tensors
        lengths = self.gather([len(tensor) for tensor in tensors]).long().tolist()  # (ranks, tensors)
        rows = torch.cat(tensors)
        most = max(map(sum, lengths))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded, group=self.words)
        split = [each[: sum(own)].split(own) for each, own in zip(found, lengths, strict=True)]
        return [tensor for turn in zip(*split, strict=True) for tensor in turn]

    def apart(self) -> "Ranks":
        """The same ranks, whose words go through another group: for a thread that runs beside. All ranks call it."""
        return self if self.count == 1 else replace(self, words=dist.new_group(backend="gloo"))

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.gather([0.0])


ALONE = Ranks()
_joined: list[Ranks] = []  # at most one: what `joined` gave and has not taken back


def is_joined() -> bool:
    """Whether this process was started as one of several (torchrun sets RANK and WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def attempt() -> int:
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """This process among those that torchrun started; left at the end.

    Args:
        device: where tensors will be: cuda ranks talk by NCCL, others by gloo.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        ValueError: fewer GPUs on this machine than ranks.
    """
    if not is_joined():
        yield ALONE
        return
    if _joined:  # by a caller
        yield _joined[-1]
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, on_node = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        if local >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise ValueError(f"rank {rank} finds {there} GPUs for {on_node} ranks on this machine; give torchrun --nproc-per-node {there}")
        torch.cuda.set_device(local)
    limit = timedelta(seconds=timeout)
    store, *_ = next(dist.rendezvous("env://", rank, count, timeout=limit))
    store = dist.PrefixStore(f"manyscale/{attempt()}", store)  # else ranks that torchrun starts again find the addresses of dead ones
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count, timeout=limit)
    _joined.append(Ranks(rank, count, local, on_node, dist.new_group(backend="gloo", timeout=limit)))
    try:
        yield _joined[-1]
    finally:
        _joined.clear()
        dist.destroy_process_group()
