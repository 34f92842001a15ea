"""How a net lies on the ranks: whole on each (DDP), its moments shared out (ZeRO-1), or sharded (FSDP2: ZeRO-2, ZeRO-3, HSDP).

A model file and a task know nothing of it. Sharding follows attention, activation checkpointing and compiling (`train.shard`).
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from manyscale.config import Parallel
from manyscale.models.supervit import SizedBatchNorm
from manyscale.ranks import ALONE, Ranks
from manyscale.train.shard import blocks

METHODS = ("features", "tokens", "last_map")  # that are called on a net besides its forward


class Spread:
    """How one run's nets lie on the ranks. Alone, everything is whole and nothing is summed.

    Args:
        passes_many: whether a step passes the net several times, some of its parameters not each time.

    Raises:
        ValueError: ranks that do not fill groups; ranks or a net that `elastic exact` cannot have.
    """

    def __init__(
        self,
        how: Parallel | None = None,
        ranks: Ranks = ALONE,
        *,
        device: torch.device | None = None,
        precision: torch.dtype = torch.float32,
        passes_many: bool = False,
    ) -> None:
        self.how, self.ranks, self.device, self.precision = how or Parallel(), ranks, device or torch.device("cpu"), precision
        self.passes_many = passes_many
        self.many = ranks.count > 1
        self.sharded = self.many and self.how.shard not in ("ddp", "zero1")
        self.exact = self.how.elastic == "exact"
        if self.exact and ranks.count & (ranks.count - 1):
            raise ValueError(f"field `elastic`: exact sums by pairs; {ranks.count} ranks are no power of two")
        self.mesh = self._mesh() if self.sharded else None
        self.sum = Tree(ranks) if self.exact else None
        self.net = self.twin = self.call = None  # what learns; its shape alone; what the losses call where it is not the net

    def _mesh(self) -> Any:
        kind, count = self.device.type, self.ranks.count
        if self.how.shard != "hsdp":
            return init_device_mesh(kind, (count,))
        group = self.how.shard_group or self.ranks.on_node
        if count % group:
            raise ValueError(f"field `shard_group`: {count} ranks do not fill groups of {group}; give --shard-group a divisor")
        return init_device_mesh(kind, (count // group, group), mesh_dim_names=("copies", "shards"))

    # -- laying out -----------------------------------------------------------------------------------------------------

    def made(self, make: Callable[[], nn.Module], *, fresh: bool) -> nn.Module:
        """What `make` makes; of a net that will be sharded and is `fresh`, only the leader has the numbers."""
        with torch.device("meta") if self.sharded and fresh and not self.ranks.leads else nullcontext():
            return make()

    def place(self, net: nn.Module, average: nn.Module | None) -> None:
        """Put a net and its moving average, which is equal to it, on the device, sharded where the run says so."""
        self.net = net
        if not self.sharded:
            for one in filter(None, (net, average)):
                one.to(self.device)
            if self.exact and any(isinstance(module, (nn.modules.batchnorm._BatchNorm, SizedBatchNorm)) for module in net.modules()):
                raise ValueError("field `elastic`: batch norms look at the pictures of one rank; a net with them cannot be exact")
            if self.many and not self.exact:
                devices = [self.device] if self.device.type == "cuda" else None
                options = {"find_unused_parameters": self.passes_many, "gradient_as_bucket_view": True}
                self.call = DistributedDataParallel(net, device_ids=devices, **options)
            return
        numbers = {name: tensor.detach() for name, tensor in net.state_dict().items()} if self.ranks.leads else {}
        net.to("meta")
        self.twin = copy.deepcopy(net)
        for one in filter(None, (net, average)):
            one.to("meta")
            self.shard(one)
            one.to_empty(device="cpu" if self.how.offload else self.device)
            set_model_state_dict(one, dict(numbers), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))

    def shard(self, net: nn.Module) -> None:
        """Cut a net's parameters into one shard a rank: block by block, then what is outside of blocks."""
        options: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": self.how.shard != "zero2"}
        if self.precision == torch.bfloat16:
            options["mp_policy"] = _policy(net)
        if self.how.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for module in (*blocks(net), net):
            fully_shard(module, **options)
        for module in [module for module in net.modules() if hasattr(module, "features")]:  # of a SimMIM net its encoder
            for name in METHODS:
                if hasattr(module, name):
                    setattr(module, name, Gathered(net, getattr(module, name)))

    def optimiser(self, kind: Callable[..., Any], groups: list[dict], **options: Any) -> torch.optim.Optimizer:
        """An optimiser, or this rank's share of one."""
        if self.many and self.how.shard == "zero1":
            return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)
        return kind(groups, **options)

    def whole(self, net: nn.Module) -> nn.Module | None:
        """A net with all its numbers, to be written down: itself, or a copy of a sharded one. None on ranks that do not lead."""
        if not self.sharded:
            return net if self.ranks.leads else None
        numbers = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.ranks.leads:
            return None
        twin = copy.deepcopy(self.twin)
        twin.load_state_dict(numbers, assign=True)
        return twin

    # -- a step ---------------------------------------------------------------------------------------------------------

    def part(self, last: bool, ends: bool) -> AbstractContextManager:
        """Where a pass of a part of a batch happens.

        Ranks take the mean of their gradients in the `last` part alone, and there of whole nets in the pass that `ends` it; of sharded
        ones in each, since a gradient that waits for others is whole.
        """
        if self.sharded:
            self.net.set_requires_gradient_sync(last)
        return self.call.no_sync() if self.call is not None and not (last and ends) else nullcontext()

    def add(self) -> None:
        """A part's gradients are there: of an exact sum, put them away."""
        if self.sum:
            self.touched = [p for p in self.net.parameters() if p.grad is not None]
            self.sum.add([p.grad for p in self.touched])
            self.net.zero_grad()

    def forget(self) -> None:
        """A step was broken off: of an exact sum, nothing of it stays."""
        if self.sum:
            self.sum.held = []

    def reduce(self) -> None:
        """All parts are through: of an exact sum, the parameters get it as their gradient."""
        if self.sum:
            for p, gradient in zip(self.touched, self.sum.total(), strict=True):
                p.grad = gradient


class Gathered:
    """A method of a sharded net, or of a part of it, that gathers weights outside of blocks first, unless a forward pass has them already.

    (torch's `register_fsdp_forward_method` would let go of them in the midst of that forward.)
    """

    def __init__(self, net: nn.Module, method: Callable[..., Any]) -> None:
        self.net, self.method = net, method
        inside = {id(p) for block in blocks(net) for p in block.parameters()}
        self.owner, self.name = next(
            (module, name) for module in net.modules() for name, p in module.named_parameters(recurse=False) if id(p) not in inside
        )

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not isinstance(getattr(self.owner, self.name), DTensor):
            return self.method(*arguments, **options)
        self.net.unshard()
        try:
            return self.method(*arguments, **options)
        finally:
            self.net.reshard()


def _policy(net: nn.Module) -> MixedPrecisionPolicy:
    """Gather in bfloat16 what autocast rounds to it anyway, and sum gradients in float32. torch below 2.15 gathers all in float32."""
    if not hasattr(MixedPrecisionPolicy(), "param_dtype_override_fn"):
        return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = {id(module.weight) for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda p: None if id(p) in rounded else p.dtype,
    )


class Tree:
    """A sum in one order, whatever shares it out: neighbours in pairs, pairs in pairs, ... The same bits on 1, 2, 4, ... ranks.

    After EasyScale (arXiv 2208.14228), which keeps the order of a fixed number of virtual ranks. a + b is b + a in floating point, so
    two ranks that add each other's halves agree.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.held = ranks, []  # (parts in it, tensors), the largest first
        self.pairs = []
        for bit in range(ranks.count.bit_length() - 1):
            groups = {rank: sorted((rank, rank ^ 1 << bit)) for rank in range(ranks.count)}
            made = {first: dist.new_group([first, second]) for first, second in {tuple(pair): 0 for pair in groups.values()}}
            self.pairs.append(made[groups[ranks.rank][0]])

    def add(self, tensors: list[Tensor]) -> None:
        """Add a part's tensors, which the tree takes over."""
        parts = 1
        while self.held and self.held[-1][0] == parts:
            _, before = self.held.pop()
            torch._foreach_add_(before, tensors)
            tensors, parts = before, 2 * parts
        self.held.append((parts, tensors))

    def total(self) -> list[Tensor]:
        """The sums over all parts of all ranks; the tree is empty then."""
        ((_, tensors),) = self.held
        self.held = []
        for pair in self.pairs:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat, group=pair)
            tensors = [piece.view_as(tensor) for piece, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
        return tensors
