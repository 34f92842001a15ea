"""Into how many parts a batch falls, each passed on its own: what ranks share out, and what fits into memory.

What is random within a step follows from the part, so the number of parts belongs to the run, and the number of ranks does not.
"""

import os

import torch

from manyscale.config import Run
from manyscale.plan import memory as planned
from manyscale.ranks import Ranks
from manyscale.storage import read_json

ASKED = "parts.json"  # what a rank that ran out of memory leaves in the run's folder for those that are started after it


def share_out(run: Run, ranks: Ranks, before: int, device: torch.device, precision: torch.dtype) -> int:
    """As many parts as before where the ranks can share them, else as the run says; where it says 0, as few as fit.

    Args:
        before: of the checkpoint that the run goes on from; 0: there is none.

    Raises:
        ValueError: a batch that does not fall into so many equal parts; an exact sum that needs another number.
    """
    count, exact = ranks.count, run.parallel.elastic == "exact"
    asked = read_json(f"{run.folder}/{ASKED}")["parts"] if os.path.exists(f"{run.folder}/{ASKED}") else 0
    wanted = run.accumulate or fitting(run, ranks, device, precision)
    before = max(before, asked)
    parts = before if before and before % count == 0 else max(wanted, count)
    if parts % count or run.batch % parts:
        raise ValueError(f"field `accumulate`: {count} ranks do not share {parts} parts of a batch of {run.batch} evenly")
    if exact and parts & (parts - 1):
        raise ValueError(f"field `elastic`: exact sums by pairs; {parts} parts of a batch are no power of two: give --accumulate so")
    if exact and before and before != parts:
        raise ValueError(f"field `elastic`: the run began with {before} parts of a batch, which {count} ranks cannot share")
    return parts


def fitting(run: Run, ranks: Ranks, device: torch.device, precision: torch.dtype) -> int:
    """The fewest equal parts of the run's batch that fit, as `plan memory` counts; all the images one by one where none do."""
    kind = "bfloat16" if precision == torch.bfloat16 else "float32"
    optim, node = run.optim, run.parallel.shard_group or ranks.on_node
    states = planned.memory(run.model, optim.method, half=optim.momentum != "float32", ema=bool(optim.ema))
    job = planned.Job(config=run.model, states=states, precision=kind)
    ways = planned.shardings(ranks.count, node)
    how = next((way for way in ways if planned.SHARDS.get(way.name) == run.parallel.shard), ways[-1])
    most = job.largest(run.memory, how, int(memory_of(device, ranks) * (1 - planned.FREE)))
    of_rank = run.batch // ranks.count
    own = next((own for own in range(1, of_rank + 1) if of_rank % own == 0 and of_rank // own <= most), of_rank)
    return own * ranks.count


def memory_of(device: torch.device, ranks: Ranks) -> int:
    """Bytes of memory that this rank may have: of its GPU, or its share of what the machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks.on_node


class Full(RuntimeError):
    """A part of a batch did not fit into memory. Nothing was changed: the same step may be taken in more parts."""


def is_full(error: RuntimeError) -> bool:
    """Whether memory ran out; on a CPU torch has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def more_parts(parts: int, batch: int, ranks: Ranks) -> int:
    """The next larger number of equal parts; 0 where there is none."""
    return next((more for more in range(2 * parts, batch + 1) if batch % more == 0 and more % ranks.count == 0), 0)
