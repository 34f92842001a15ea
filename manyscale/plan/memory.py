"""What training keeps per net whatever the batch: weights, gradients, and what the optimiser remembers, in bytes.

Exact to the byte, but for a step count of four bytes a tensor. Activations come on top, and grow with batch and image size.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple, get_args

from manyscale.config import NetConfig, SuperViTConfig, SwinConfig, ViTConfig
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
