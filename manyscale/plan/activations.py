"""What the parts of a net keep for their backward pass, and what they have alive while they compute: bytes of a step, in closed form.

Counted are tensors as torch allocates them, in float32 or under autocast to bfloat16, on a GPU, where autocast takes norms in float32,
or on a CPU, where it leaves them as they come. Not counted: what libraries' kernels and an allocator take for themselves, and the
little that dropout, drop path and hidden patches add. Tests compare this with counted and with measured bytes.

Letters: B batch, W windows, H heads, N tokens of a window (of the whole picture where there are no windows), C channels; `size` is
bytes of a number in linear layers.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple

from manyscale.config import Memory, NetConfig, Setting, Size, SuperViTConfig, SwinConfig, ViTConfig, read_bytes
from manyscale.config.checks import require
from manyscale.plan.count import BIAS_HIDDEN, count

Precision = Literal["float32", "bfloat16"]
Device = Literal["cuda", "cpu"]


class Part(NamedTuple):
    """One part of a net, in bytes; gradients of its weights come on top."""

    name: str
    weights: int  # in float32
    kept: int  # at the end of its forward pass, for its backward pass
    forward: int  # the most that its forward pass has alive, what it keeps included
    backward: int  # the most that its backward pass has alive, likewise
    products: int = 0  # what linear layers and attention give: selective checkpointing keeps it
    again: bool = False  # whether the backward pass computes it again


class How(NamedTuple):
    """What a step is computed with."""

    memory: Memory
    batch: int
    device: Device
    size: int  # bytes of a number that linear layers and matrix products take and give
    main: int  # of the main branch
    norm: int  # that a norm is given

    def norms(self, tokens: int, width: int) -> int:
        """Bytes that a norm keeps: what it is given, and two statistics a token."""
        return self.norm * tokens * (width + 2)


class Attended(NamedTuple):
    """What attention is given."""

    batch: int
    windows: int
    heads: int
    keys: int  # N
    width: int
    cosine: bool = False
    bias: int = 0  # bytes of a number of the position bias; 0: there is none
    masked: bool = False

    @property
    def values(self) -> int:
        """Numbers of q, of k, and of v."""
        return self.batch * self.windows * self.keys * self.width

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return self.batch * self.windows * self.heads * self.keys

    @property
    def window(self) -> int:
        """Logits of one window; numbers of the position bias."""
        return self.heads * self.keys**2

    @property
    def mask(self) -> int:
        """Bytes of (W, N, N)."""
        return self.windows * self.keys**2 * self.masked


class Core(NamedTuple):
    """Bytes of attention from q, k and v to its result, which is counted where it is kept: by the projection behind it."""

    kept: int
    forward: int
    backward: int
    result: int = 0  # of what one operation gives, for selective checkpointing to keep


def activations(
    config: NetConfig,
    memory: Memory | None = None,
    *,
    batch: int = 1,
    precision: Precision = "bfloat16",
    device: Device = "cuda",
    size: Size | None = None,
) -> tuple[Part, ...]:
    """The parts of a net in the order that images meet them, at `config.image_size`, of a SuperViT with all tokens kept.

    Args:
        memory: which path attention takes, and what the backward pass computes again.
        batch: images of a forward pass.
        precision: float32, or weights in float32 under autocast to bfloat16.
        size: of a SuperViT, which of its sizes; None: the largest.

    Raises:
        ValueError: a size that a SuperViT does not have; more sequential stages than there are; a budget that a row of logits exceeds;
            kernels on a CPU, or for a net without windows.
    """
    memory = memory or Memory()
    stages = len(config.depths) if isinstance(config, SwinConfig) else 0
    if memory.sequential > stages:
        raise ValueError(
            f"field `sequential`: {memory.sequential} stages, but the net has {stages}; --attention sequential sets all blocks"
        )
    if memory.attention == "kernel" and (device == "cpu" or not stages):
        raise ValueError("field `attention`: kernel is of windows, on a GPU; give auto")
    number = 2 if precision == "bfloat16" else 4
    norm = number if device == "cpu" else 4
    if isinstance(config, SwinConfig):
        return _swin(config, How(memory, batch, device, number, norm, norm))
    if isinstance(config, ViTConfig) and config.position != "learned":
        return _vit(config, How(memory, batch, device, number, number, norm), config.size)
    how = How(memory, batch, device, number, 4, 4)  # learnt positions, in float32, make the main branch so
    if isinstance(config, SuperViTConfig):
        config.counts(Setting(), size)  # refuses a size that it does not have
        return _vit(config, how, size or config.size)
    return _vit(config, how, config.size)


def walk(parts: Sequence[Part]) -> tuple[int, int, int]:
    """What parts keep together, and the most alive in their forward and in their backward pass."""
    kept = forward = backward = 0
    for part in parts:
        forward = max(forward, kept + part.forward)
        kept += part.kept
    left = kept
    for part in reversed(parts):
        left -= part.kept
        backward = max(backward, left + part.backward)
    return kept, forward, backward


# -- attention ---------------------------------------------------------------------------------------------------------


def _reference(a: Attended, how: How) -> Core:
    """All logits in several copies. Under autocast softmax is taken in float32, and the weights are kept in both types."""
    size, logits = how.size, a.rows * a.keys
    qk = _lengths(a) + 2 * size * a.values
    v = size * a.values
    if a.batch * a.windows == 1:  # a matrix product takes v as it lies, and in place of a copy keeps all that it lies in
        v += (1 + a.cosine) * size * a.values
    kept = qk + v + a.mask + (4 + 2 * (size == 2)) * logits
    given = a.bias or size  # bytes of a logit that softmax is given
    copy = 4 if given == 2 else 2 * (size == 2)  # of what it is given, in float32, or of its result, in bfloat16
    adding = (size + given) * logits + given * a.windows * a.window * a.masked  # the bias with the mask laid into it
    forward = 3 * size * a.values + qk + a.mask + max(adding, (given + copy + 4) * logits)
    softmax = 3 * 4 * logits  # weights, their gradient, and that of the logits
    lengths = (2 * size + 12) * a.values
    return Core(kept, forward, qk + a.mask + size * a.values + max(softmax, lengths))


def _fused(a: Attended, how: How) -> Core:
    """torch's scaled_dot_product_attention. With a bias that learns, a CPU has its plain form alone, and a GPU the bias' gradient whole."""
    size, logits = how.size, a.rows * a.keys
    if a.bias and how.device == "cpu":
        qkv = _lengths(a) + 12 * a.values + a.mask
        return Core(qkv + 4 * logits, 3 * size * a.values + qkv + 12 * logits, qkv + 12 * logits)
    copies = 4 if a.masked else 3 + 2 * a.cosine  # windows folded into heads: q, k, v and the result, else what they lie in
    kept = copies * size * a.values + _lengths(a) + 4 * a.rows
    if a.bias:
        kept += size * a.window * (a.windows if a.masked else 1) + a.mask
    gradients = (6 * size + 12 * a.cosine) * a.values + size * logits * (a.bias > 0)
    return Core(kept, kept + size * a.values, kept + gradients, result=size * a.values + 4 * a.rows)


def _sequential(a: Attended, how: How) -> Core:
    """Chunks of logits within a budget; q and k at their lengths are made in either pass, whole."""
    size, bias = how.size, a.window * (a.bias > 0)
    kept = 3 * size * a.values + 4 * a.rows + a.bias * a.window
    logits, of_sample, of_window = _chunk(a, read_bytes(how.memory.attention_memory))
    chunk = max(8 * logits + 4 * of_window * (a.bias > 0), 10 * logits * (size == 2))
    chunk += 4 * of_sample * a.masked or 4 * of_window * (a.bias == 2)  # the bias with the mask laid into it, or in float32
    ready = (1 + a.cosine) * size * a.values
    forward = kept + ready + max(chunk, 8 * a.values * a.cosine)
    # Behind the last chunk its weights are still alive, and the gradients of lengths take several copies in float32.
    last = (4 + size) * logits + ((16 if size == 4 else 22) if a.cosine else 8) * a.values
    gradients = (size + 8) * a.values + 4 * bias  # of q, of k and v in float32
    backward = kept + ready + 2 * size * a.values + gradients + max(chunk, last)
    return Core(kept, forward, backward, result=size * a.values + 4 * a.rows)


def _kernel(a: Attended, how: How) -> Core:
    """Tokens of the grid and one number a row; the bias' gradient as at most 1,024 partial sums, of a program each. Not yet measured."""
    size = how.size
    kept = 3 * size * a.values + 4 * a.rows + a.bias * a.window
    block = 64 if size == 2 and a.width // a.heads <= 64 else 32  # as `ops.kernel.block_of`
    side = -(-a.keys // block)  # of a window in tiles
    programs = min(a.batch * a.windows, max(1, 1024 // (a.heads * side**2)))
    gradients = 3 * size * a.values + 4 * a.rows + 4 * programs * a.window * (a.bias > 0)
    return Core(kept, kept + size * a.values, kept + 2 * size * a.values + gradients, result=size * a.values + 4 * a.rows)


PATHS: dict[str, Callable[[Attended, How], Core]] = {
    "reference": _reference,
    "fused": _fused,
    "sequential": _sequential,
    "kernel": _kernel,
}


def _lengths(a: Attended) -> int:
    """What bringing q and k to their lengths keeps besides the result: a copy in float32, and a vector's three numbers and a flag."""
    return 2 * (4 * a.values + 13 * a.rows) * a.cosine


def _chunk(a: Attended, budget: int) -> tuple[int, int, int]:
    """Logits of a chunk, those of one sample in it, and of one window of that, as `ops.sequential.chunk_of` divides them."""
    row = 16 * a.heads * a.keys
    words = f"{budget:,} bytes; a row of {a.keys} tokens in {a.heads} heads takes {row:,}, give more"
    require(budget >= row, "attention_memory", words)
    if budget < row * a.keys:
        rows = budget // row * a.heads * a.keys
        return rows, rows, rows
    fit = budget // (row * a.keys)
    windows = max(1, min(fit // a.batch, a.windows))
    return min(fit, a.batch) * windows * a.window, windows * a.window, a.window


# -- blocks ------------------------------------------------------------------------------------------------------------


def _attention(a: Attended, how: How, weights: int, tokens: int, norm: str, path: str, offsets: int = 0) -> Part:
    """A residual branch. `offsets`: rows of the table that a bias network computes."""
    core, size, x = PATHS[path](a, how), how.size, tokens * a.width
    network = size * offsets * (BIAS_HIDDEN + a.heads)  # its hidden layer and its result
    before, after = _norms(norm, how, tokens, a.width)
    if norm in ("res-post", "sandwich") and how.norm == size:
        after += size * (a.values - x)  # the norm keeps what it is given, a view of the padded grid
    given = before + network + size * a.values
    kept = given + core.kept + size * a.values + after
    forward = max(kept, given + core.forward) + 2 * how.main * x
    entering = (6 * size + 4) * a.values  # gradients of q, k and v, and all of them in one; then back from windows to the grid
    backward = how.main * x + given + max(core.backward, core.kept + 3 * size * a.values, entering)
    return Part("attention", weights, kept, forward, backward, 4 * size * a.values + network + core.result)


def _mlp(how: How, weights: int, tokens: int, width: int, hidden: int, norm: str) -> Part:
    """Another: two linear layers, each of which keeps what it is given, and a GELU between them that keeps the same."""
    size, x, h = how.size, tokens * width, tokens * hidden
    before, after = _norms(norm, how, tokens, width)
    given = before + size * x
    kept = given + 2 * size * h + after
    forward = kept + (size + 2 * how.main) * x
    backward = max(how.main * x + given + size * x + 3 * size * h, kept + 2 * how.main * x)
    return Part("mlp", weights, kept, forward, backward, size * (x + h))


def _norms(norm: str, how: How, tokens: int, width: int) -> tuple[int, int]:
    """Bytes that the norms before and behind a branch keep."""
    kept = how.norms(tokens, width)
    return kept * (norm in ("pre", "sandwich")), kept * (norm != "pre")


def _block(name: str, branches: Sequence[Part], how: How, x: int, norm: str) -> Part:
    """Branches as one part. Computed again, it keeps the `x` numbers it is given, and of selective checkpointing its products."""
    weights = sum(part.weights for part in branches)
    kept, forward, backward = walk(branches)
    if how.memory.checkpointing == "none":
        return Part(name, weights, kept, forward, backward)
    products = [part.products if how.memory.checkpointing == "selective" else 0 for part in branches]
    for i, branch in enumerate(branches):  # products wait for their turn; then they are what is kept, or go
        backward = max(backward, sum(part.kept for part in branches[:i]) + branch.forward + sum(products[i + 1 :]))
    given = how.main * x
    stored = given + sum(products)
    if norm in ("pre", "sandwich") and how.norm == how.main:  # what it is given is also what its first norm keeps
        given = 0
    return Part(name, weights, stored, stored + forward, given + backward, again=True)


# -- nets --------------------------------------------------------------------------------------------------------------


def _swin(config: SwinConfig, how: How) -> tuple[Part, ...]:
    weights = {row.part: 4 * row.parameters for row in count(config).rows}
    stages = range(len(config.depths))
    tokens = how.batch * prod(config.grids[0])
    x = tokens * config.width
    stem = _images(how, config.channels, config.size) + how.norms(tokens, config.width)
    parts = [
        Part("layouts", 0, sum(_layouts(config, stage, how) for stage in stages), 0, 0),
        Part("stem", weights["stem"], stem, stem + how.main * x, stem + (how.main + 4) * x),
    ]
    for stage in stages:
        if stage:
            parts.append(_merge(config, stage, how, weights[f"merge {stage}"]))
            if config.merge_norm == "before":
                how = how._replace(main=how.size)  # the main branch goes on from a linear layer
        parts += _stage(config, stage, how, weights[f"stage {stage + 1}"])
    tokens, width = how.batch * prod(config.grids[-1]), config.last[0]
    kept = how.norms(tokens, width) + how.size * how.batch * width
    parts.append(Part("head", weights["head"], kept, kept + how.main * tokens * width, kept + 2 * how.norm * tokens * width))
    return tuple(parts)


def _stage(config: SwinConfig, stage: int, how: How, weights: int) -> list[Part]:
    grid, window, width, depth = config.grids[stage], config.windows[stage], config.width * 2**stage, config.depths[stage]
    tokens, hidden, table = how.batch * prod(grid), int(width * config.mlp_ratio), config.bias == "table"
    offsets = 0 if table else prod(2 * w - 1 for w in window)
    path = "sequential" if stage < how.memory.sequential else how.memory.attention
    path = "reference" if path == "auto" else path  # as `ops.attention` with a bias that learns
    mlp = 4 * 2 * width * hidden
    cosine, bias = config.similarity == "cosine", 4 if table else how.size
    a = Attended(how.batch, _windows(grid, window), config.heads[stage], prod(window), width, cosine, bias)
    masked = [_masked(config, stage, shifted=shifted) for shifted in (False, True)]
    blocks = []
    for block in range(depth):
        a = a._replace(masked=masked[block % 2])
        branches = [
            _attention(a, how, weights // depth - mlp, tokens, config.norm, path, offsets),
            _mlp(how, mlp, tokens, width, hidden, config.norm),
        ]
        before = 0 if config.extra_norm_scope == "stage" else sum(config.depths[:stage])
        if config.extra_norm_every and (before + block + 1) % config.extra_norm_every == 0:
            kept = how.norms(tokens, width)
            branches.append(Part("norm", 0, kept, kept + how.main * tokens * width, kept + 2 * how.main * tokens * width))
        blocks.append(_block(f"stage {stage + 1}, block {block + 1}", branches, how, tokens * width, config.norm))
    return blocks


def _merge(config: SwinConfig, stage: int, how: How, weights: int) -> Part:
    """The merging before a stage: 4C numbers of a token, a linear layer, 2C."""
    tokens, width = how.batch * prod(config.grids[stage]), config.width * 2**stage
    kept = how.size * tokens * 2 * width + how.norms(tokens, 2 * width if config.merge_norm == "before" else width)
    return Part(f"merge {stage}", weights, kept, kept + how.main * tokens * 3 * width, kept + how.main * tokens * 4 * width)


def _layouts(config: SwinConfig, stage: int, how: How) -> int:
    """What a stage's blocks share: an index and coordinates for the position bias, and masks, in place of which kernels have tables."""
    window, masks = config.windows[stage], sum(_masked(config, stage, shifted=shifted) for shifted in (False, True))
    coordinates = 0 if config.bias == "table" else 4 * config.axes * prod(2 * w - 1 for w in window)
    places = _windows(config.grids[stage], window) * prod(window)
    cuts = 4 * places * (2 + masks) if how.memory.attention == "kernel" else masks * places * prod(window)
    return 8 * prod(window) ** 2 + coordinates + cuts


def _masked(config: SwinConfig, stage: int, *, shifted: bool) -> bool:
    """Whether a layout needs a mask: because windows are shifted, or because the grid is padded."""
    pairs = list(zip(config.grids[stage], config.windows[stage], strict=True))
    return (shifted and any(g > w >= 2 for g, w in pairs)) or (config.padding == "mask" and any(g % w for g, w in pairs))


def _windows(grid: tuple[int, ...], window: tuple[int, ...]) -> int:
    return prod(-(-g // w) for g, w in zip(grid, window, strict=True))


def _images(how: How, channels: int, size: tuple[int, ...]) -> int:
    """Bytes of the images, and of their copy in bfloat16."""
    return (4 + 2 * (how.size == 2)) * how.batch * channels * prod(size)


def _vit(config: ViTConfig | SuperViTConfig, how: How, size: Size) -> tuple[Part, ...]:
    """Of either: patches, pre-norm blocks of all tokens on all, and the head."""
    weights = {"stem": 0, "blocks": 0, "head": 0}
    for row in count(config).rows:
        weights["blocks" if "blocks" in row.part else "stem" if row.part in ("stem", "patches") else "head"] += 4 * row.parameters
    grid = config.grid_of(size) if isinstance(config, SuperViTConfig) else config.grid
    each, width, depth = prod(grid) + _prefix(config), config.width, config.depth
    tokens = how.batch * each
    x = tokens * width

    size = size if isinstance(size, tuple) else (size, size)
    kept = _images(how, config.channels, size)
    convolved = 0
    if isinstance(config, SuperViTConfig) and config.stem == "conv":
        convolved = how.size * how.batch * config.stem_width * prod(size) // 4  # bytes of a result at half the size
        kept += 6 * convolved  # three of them, and three normalised
    parts = [Part("stem", weights["stem"], kept, kept + 3 * how.main * x, kept + 3 * convolved + 2 * how.main * x)]

    a = Attended(how.batch, 1, config.heads, each, width)
    path = "fused" if how.memory.attention == "auto" else how.memory.attention
    mlp = 4 * 2 * width * config.mlp_width
    branches = (
        _attention(a, how, weights["blocks"] // depth - mlp, tokens, "pre", path),
        _mlp(how, mlp, tokens, width, config.mlp_width, "pre"),
    )
    parts += [_block(f"block {i}", branches, how, x, "pre") for i in range(depth)]

    kept = how.norms(tokens, width) + how.size * how.batch * width
    if isinstance(config, ViTConfig) and config.pool == "map":
        kept += how.size * (3 * x + how.batch * (3 * width + 2 * config.mlp_width))  # what k and v are made of, both, and one token's way
    elif isinstance(config, SuperViTConfig) or config.pool == "token":
        kept += how.size * x * (how.size == 4)  # the head reads a view of all tokens; under autocast a copy of one
    if isinstance(config, SuperViTConfig) and config.token_head is not None:
        kept += how.size * (x + how.batch * prod(grid) * config.classes)
    parts.append(Part("head", weights["head"], kept, kept + how.norm * x, kept + 2 * how.norm * x))
    return tuple(parts)


def _prefix(config: ViTConfig | SuperViTConfig) -> int:
    """Tokens that are no patches."""
    return 1 + config.registers if isinstance(config, SuperViTConfig) else int(config.pool == "token")
