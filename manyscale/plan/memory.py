"""What training takes of a rank, in bytes: weights, gradients, what the optimiser remembers, and with the activations a whole step.

`memory` is exact to the byte, but for a step count of four bytes a tensor. `step` goes through the net forward and back and finds
the most that is alive at once; `manyscale.plan.activations` says what each part has alive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal, NamedTuple, get_args

from manyscale.config import Memory as Lean
from manyscale.config import NetConfig, Size, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.config.checks import require
from manyscale.plan.activations import Part, Precision, activations
from manyscale.plan.count import BIAS_HIDDEN, count

FACTORED_FROM = 32  # as `train.moments`: the second longest axis of a matrix that Adafactor keeps as row and column means

Method = Literal["adamw", "adafactor", "sgd"]
METHODS: tuple[tuple[Method, bool], ...] = tuple((method, half) for method in get_args(Method) for half in (False, True))


class Memory(NamedTuple):
    """Bytes of one training process without sharding."""

    parameters: int  # how many
    weights: int
    gradients: int
    optimiser: int
    average: int  # of a moving average of the weights

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.average

    @property
    def per_parameter(self) -> float:
        """The optimiser's bytes per parameter."""
        return self.optimiser / self.parameters


def memory(config: NetConfig, method: Method = "adamw", *, half: bool = False, ema: bool = False) -> Memory:
    """Weights and gradients in float32, and what the optimiser keeps.

    Args:
        half: whether momentum is kept in bfloat16.
        ema: whether a moving average of the weights is.
    """
    parameters = count(config).parameters
    momentum = (2 if half else 4) * parameters
    squares = {"sgd": 0, "adamw": 4 * parameters, "adafactor": 4 * _factored_squares(config, parameters)}[method]
    return Memory(parameters, 4 * parameters, 4 * parameters, momentum + squares, 4 * parameters if ema else 0)


SHARDS = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "HSDP": "hsdp"}  # as `--shard` has their names


class Sharding(NamedTuple):
    """How what belongs to the weights lies on the ranks."""

    name: str
    optimiser: int = 1  # ranks that share its state
    rest: int = 1  # ranks that share weights, gradients and moving average
    gathered: Literal["no", "once", "passing"] = "no"  # weights: always whole; from a part's forward to its backward pass; in each pass
    buckets: bool = False  # whether gradients are there from the start

    def states(self, states: Memory) -> int:
        """Bytes of a rank at the end of a step, gradients included."""
        return (states.weights + states.gradients + states.average) // self.rest + states.optimiser // self.optimiser


def shardings(ranks: int, node: int = 8) -> tuple[Sharding, ...]:
    """One GPU; or DDP and its kin, the least communication first. HSDP is ZeRO-3 within nodes of `node` ranks.

    As torch has them: DistributedDataParallel with gradients as views of its buckets, and with ZeroRedundancyOptimizer (ZeRO-1);
    fully_shard with reshard_after_forward=False (ZeRO-2, its weights being sharded too) and True, on a mesh of nodes or of all ranks.

    Raises:
        ValueError: numbers below one; ranks that do not fill their nodes.
    """
    require(ranks >= 1, "gpus", f"{ranks} must be at least 1")
    require(node >= 1, "gpus_per_node", f"{node} must be at least 1; 8 is usual")
    if ranks == 1:
        return (Sharding("one GPU"),)
    found = (
        Sharding("DDP", buckets=True),
        Sharding("ZeRO-1", ranks, buckets=True),
        Sharding("ZeRO-2", ranks, ranks, "once"),
        Sharding("HSDP", node, node, "passing"),
        Sharding("ZeRO-3", ranks, ranks, "passing"),
    )
    if ranks <= node or node == 1:
        return tuple(how for how in found if how.name != "HSDP")
    require(ranks % node == 0, "gpus", f"{ranks} do not fill nodes of {node}; give a multiple, or another --gpus-per-node")
    return found


def leans(lean: Lean, stages: int) -> dict[str, Lean]:
    """Ways to keep less, the cheapest first: what they add to `lean`. `stages`: how many first ones attend in chunks, in those that do.

    Attention in chunks costs least. Selective checkpointing computes norms, GELUs and copies again, and of the reference path its
    products; of blocks the whole forward pass is computed again, up to 30 % of a step.
    """
    found = {}
    for kind in ("none", "selective", "blocks"):
        for first in dict.fromkeys((lean.sequential, stages)):
            added = [f"--checkpointing {kind}"] * (kind != "none") + [f"--sequential {first}"] * (first > 0)
            found[" ".join(added) or "nothing"] = replace(lean, checkpointing=kind, sequential=first)
    return found


def step(parts: Sequence[Part], states: Memory, how: Sharding, precision: Precision = "bfloat16") -> int:
    """The most bytes that a rank has alive during a training step, from the second one on.

    Autocast copies weights to bfloat16 in the forward pass and keeps them for the backward pass, but those of parts that are computed
    again. Where weights are sharded, gathered ones take the copies' place, of the same type: a part's, and meanwhile the next one's.
    """
    half, weights = precision == "bfloat16", [part.weights for part in parts]
    used = [size // 2 if half else size * (how.gathered != "no") for size in weights]
    base = (states.weights + states.average) // how.rest + states.optimiser // how.optimiser + states.gradients * how.buckets
    peak, kept = how.states(states), 0
    for i, part in enumerate(parts):
        copies = sum(used[i : i + 2] if how.gathered == "passing" else used[: i + 1])
        peak = max(peak, base + kept + part.forward + copies)
        kept += part.kept
    for i, part in reversed(list(enumerate(parts))):
        kept -= part.kept
        if how.gathered == "no":
            copies = used[i] + sum(size for size, before in zip(used, parts[:i], strict=False) if not before.again)
            gradients = 0 if how.buckets else sum(weights[i:])
        else:
            copies = sum(used[max(i - 1, 0) : i + 1] if how.gathered == "passing" else used[: i + 1])
            gradients = sum(weights[i + 1 :]) // how.rest + used[i] + weights[i]  # its own still whole, and again in float32 to be summed
        peak = max(peak, base + kept + part.backward + copies + gradients)
    return peak


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained; how it lies on the ranks and what is computed again is still open."""

    config: NetConfig
    states: Memory
    precision: Precision = "bfloat16"
    batch: int = 1  # images of a rank
    size: Size | None = None  # of a SuperViT, which of its sizes; None: the largest

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", f"{self.batch} must be at least 1 image of a rank")

    def parts(self, lean: Lean, batch: int = 0) -> tuple[Part, ...]:
        """The net's parts with what each has alive."""
        return _parts(self, lean, batch or self.batch)

    def takes(self, lean: Lean, how: Sharding, batch: int = 0) -> int:
        """Bytes of a rank, at most."""
        return step(self.parts(lean, batch), self.states, how, self.precision)

    def largest(self, lean: Lean, how: Sharding, limit: int) -> int:
        """The most images of a rank with which a step takes at most `limit` bytes; 0: not even one."""
        least, most = 0, 1
        while self.takes(lean, how, most) <= limit:
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self.takes(lean, how, middle) <= limit else (least, middle)
        return least


@cache
def _parts(job: Job, lean: Lean, batch: int) -> tuple[Part, ...]:
    return activations(job.config, lean, batch=batch, precision=job.precision, size=job.size)


FREE = 0.1  # of a GPU's memory: for CUDA itself, NCCL's buffers, gaps between tensors, and the doubt in these numbers


def advise(job: Job, leans: dict[str, Lean], shardings: Sequence[Sharding], limit: int) -> list[str]:
    """The cheapest combination that takes at most `limit` bytes and the leanest of all, each with its largest batch, in words.

    Raises:
        ValueError: nothing fits; the message says by how much.
    """
    sizes = {(lean, how): job.takes(leans[lean], how) for lean in leans for how in shardings}
    leanest = min(sizes, key=sizes.__getitem__)

    def words(lean: str, how: Sharding) -> str:
        added = "" if lean == "nothing" else f" with {lean}"
        return f"{how.name}{added}"

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f} GiB"

    if sizes[leanest] > limit:
        raise ValueError(
            f"field `gpu_memory`: nothing fits {gib(limit)}, which leave a tenth free: the leanest, {words(*leanest)}, takes "
            f"{gib(sizes[leanest])}, {gib(sizes[leanest] - limit)} more; give more --gpus, or a smaller --batch, --image-size or --window"
        )
    cheapest = next(pair for pair, size in sizes.items() if size <= limit)
    lines = []
    for kind, (lean, how) in {"cheapest that fits": cheapest, "leanest": leanest}.items():
        largest = job.largest(leans[lean], how, limit)
        lines.append(f"{kind}: {words(lean, how)}: {gib(sizes[lean, how])}; largest batch a GPU: {largest}")
    why = "all shardings are tried before more is computed again: their bytes travel while GPUs compute, blocks take up to 30 % longer"
    return [*lines[: 1 + (leanest != cheapest)], why]


def _factored_squares(config: NetConfig, parameters: int) -> int:
    """Numbers that Adafactor keeps for squared gradients: every parameter's own, or means over the two longest axes."""
    kept = parameters
    for repeats, lead, *shape in matrices(config):
        *_, second, first = sorted(shape)
        if second >= FACTORED_FROM:
            whole = prod(shape)
            kept += repeats * lead * (whole // first + whole // second - whole)
    return kept


def matrices(config: NetConfig) -> Iterator[tuple[int, ...]]:
    """(repeats, lead, *shape) of every parameter with two axes that may both be long, as `train.optim` shows it to Adafactor."""
    yield from {SwinConfig: _swin, ViTConfig: _vit, SuperViTConfig: _supervit}[type(config)](config)


def _attention(repeats: int, width: int, heads: int, biased: bool = True) -> Iterator[tuple[int, ...]]:
    yield repeats, 3, heads, width // heads, width
    if biased:
        yield repeats, 3, heads, width // heads
    yield repeats, 1, width, heads, width // heads


def _mlp(repeats: int, width: int, hidden: int) -> Iterator[tuple[int, ...]]:
    yield 2 * repeats, 1, width, hidden


def _vit(config: ViTConfig) -> Iterator[tuple[int, ...]]:
    width, heads = config.width, config.heads
    yield 1, 1, width, config.channels, *config.patches
    if config.position == "learned":
        yield 1, 1, prod(config.grid), width
    repeats = config.depth + (config.pool == "map")  # q, k and v of the pooling's query and tokens are as large as a block's
    yield from _attention(repeats, width, heads)
    yield from _mlp(repeats, width, config.mlp_width)
    if config.pre_logits:
        yield 1, 1, config.pre_logits, width
    yield 1, 1, config.classes, config.pre_logits or width


def _supervit(config: SuperViTConfig) -> Iterator[tuple[int, ...]]:
    width, stem, conv = config.width, config.stem_width, config.stem == "conv"
    if conv:
        yield 1, 1, stem, config.channels, 7, 7
        yield 2, 1, stem, stem, 3, 3
    side = config.patch // 2 if conv else config.patch
    yield 1, 1, width, stem if conv else config.channels, side, side
    for grid in config.grids if config.positions == "per-size" else (config.grid_of(config.size),):
        yield 1, 1, 1 + prod(grid), width
    if config.registers:
        yield 1, 1, config.registers, width
    yield from _attention(config.depth, width, config.heads, biased=config.qkv_bias)
    yield from _mlp(config.depth, width, config.mlp_width)
    yield 1 + (config.token_head is not None), 1, config.classes, width


def _swin(config: SwinConfig) -> Iterator[tuple[int, ...]]:
    yield 1, 1, config.width, config.channels, *config.patches
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        width = config.width * 2**stage
        yield from _attention(depth, width, heads, biased=config.similarity == "dot")
        yield from _mlp(depth, width, int(width * config.mlp_ratio))
        if config.bias == "table":
            yield depth, 1, prod(2 * w - 1 for w in config.windows[stage]), heads
        else:
            yield depth, 1, heads, BIAS_HIDDEN
        if stage:
            yield 1, 1, width, 2 * width
    yield 1, 1, config.classes, width
