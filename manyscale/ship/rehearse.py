"""A net sharded over ranks that do not exist: what `plan memory` says in closed form, held against what torch does with the tensors.

torch's own tests have the process group for it, whose collectives do nothing; on the meta device nothing has numbers. So a net of
3 billion parameters is laid out on 512 ranks in seconds, in one process. (torchtitan has a mode like it.)
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from manyscale.config import NetConfig, Optim, Parallel
from manyscale.models import build
from manyscale.plan.memory import SHARDS, Memory, Sharding
from manyscale.ranks import Ranks
from manyscale.train.optim import make_optimiser
from manyscale.train.spread import Spread


class Rehearsed(NamedTuple):
    """What belongs to the weights on one rank, in bytes: the first, which has the most where shards are uneven."""

    name: str
    planned: int
    found: int

    @property
    def ratio(self) -> float:
        """Found over planned."""
        return self.found / self.planned


def rehearse(config: NetConfig, states: Memory, shardings: Sequence[Sharding], optim: Optim, *, ranks: int, node: int) -> list[Rehearsed]:
    """Lay a net out in each of `shardings` and count the bytes of weights, gradients, moments and average on a rank.

    Args:
        states: the planned bytes of one process without sharding.

    Raises:
        ValueError: this process belongs to ranks already.
    """
    if dist.is_initialized():
        raise ValueError("field `check`: this process is one of several already; ask in a process alone")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        found: dict[tuple[int, int], int] = {}  # between steps ZeRO-2 keeps the pieces of ZeRO-3: laid out once
        for how in shardings:
            if (how.optimiser, how.rest) not in found:
                found[how.optimiser, how.rest] = _bytes(config, states, how, optim, Ranks(0, ranks, 0, node))
        return [Rehearsed(how.name, how.states(states), found[how.optimiser, how.rest]) for how in shardings]
    finally:
        dist.destroy_process_group()


def _bytes(config: NetConfig, states: Memory, how: Sharding, optim: Optim, ranks: Ranks) -> int:
    parallel = Parallel(shard=SHARDS[how.name], shard_group=ranks.on_node if how.name == "HSDP" else 0)
    spread = Spread(parallel, ranks)
    with torch.device("meta"):
        net = build(config)
    if spread.sharded:
        spread.shard(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ZeroRedundancyOptimizer says of tensors on the meta device
        optimiser = make_optimiser(net, optim, spread.optimiser)
    own = getattr(optimiser, "optim", optimiser)
    weights = sum(map(_numel, net.parameters()))
    mine = sum(_numel(p) for group in own.param_groups for p in group["params"])  # whose moments this rank keeps
    per_number = states.optimiser / states.parameters  # of Adafactor, whose squares are small, nearly so
    return 4 * weights * (3 if states.average else 2) + round(per_number * mine)


def _numel(parameter: nn.Parameter) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
