"""Parameters and multiply-adds of a net in closed form, by part and stage: the answer before a weight exists.

What the Swin papers and the official zoo call FLOPs are multiply-adds of one image, and so are the GFLOPs here; torch's
FlopCounterMode, and Table 2 of Scaling Vision Transformers, count a multiply-add as two. Counted are the convolution, the
linear layers (the bias network's too), and the two matrix products of attention, at the grids and windows of
`config.image_size`, with the padding to whole windows. Not counted, as in the papers: norms, softmax, activations, sums
and means. The official zoo (microsoft/Swin-Transformer, MODELHUB.md) also leaves out the bias network, whose table may be
stored once trained: without it these figures are within 0.5 % of its fourteen, with it within 1.5 %.

Of a SuperViT they are those of one setting; torch counts the same, but for the bilinear resizing.

Letters: C channels of a stage, L tokens of its grid, L' tokens with the padding, N tokens of a window, d axes,
T offsets inside a window; for ViT, W channels, M of the MLP and N tokens.
"""

from dataclasses import replace
from math import prod
from typing import NamedTuple

from manyscale.config import NetConfig, Setting, SuperViTConfig, SwinConfig, ViTConfig

BIAS_HIDDEN = 512  # of the bias network, in every official model
NORMS = {"pre": 1, "post": 1, "sandwich": 2, "res-post": 1}  # of one residual branch


class Row(NamedTuple):
    """One part of the net."""

    part: str  # stem, stage 1, merge 1, stage 2, ..., head
    grid: tuple[int, ...]  # tokens per axis that leave the part; () for the head
    window: tuple[int, ...]  # of a stage, clipped to its grid; () elsewhere
    parameters: int
    macs: int  # multiply-adds of one image, all that follows included
    attention: int = 0  # of them, in the two matrix products of attention
    bias: int = 0  # of them, in the bias network: once per forward pass, however large the batch


class Count(NamedTuple):
    """A whole net: its totals, and where they come from."""

    parameters: int
    macs: int  # multiply-adds of one image
    rows: tuple[Row, ...]  # in the order the image meets them; they add up to the totals


def count(config: NetConfig, setting: Setting | None = None) -> Count:
    """Parameters, and multiply-adds of one image at `config.image_size` or as a setting has it, exact to the digit.

    Raises:
        ValueError: a setting that the net cannot be run at.
    """
    if isinstance(config, SuperViTConfig):
        rows = _supervit(config, setting or Setting())
    elif isinstance(config, ViTConfig):
        if setting and (setting.window is not None or not setting.is_full):
            raise ValueError(f"setting {setting}: a ViT keeps every token and has no windows; give a size alone")
        rows = _vit(config)
        if setting and setting.size:  # the parameters stay: positions are resized
            at_size = _vit(replace(config, image_size=setting.size))
            rows = [row._replace(grid=at.grid, macs=at.macs, attention=at.attention) for row, at in zip(rows, at_size, strict=True)]
    else:
        rows = _swin(config)
        if setting:
            config.windows_at(setting)
            window = config.windows if setting.window is None else setting.window
            at_setting = _swin(replace(config, image_size=setting.size or config.image_size, window=window))
            rows = [at._replace(parameters=row.parameters) for row, at in zip(rows, at_setting, strict=True)]
    return Count(sum(row.parameters for row in rows), sum(row.macs for row in rows), tuple(rows))


def as_table_2(config: ViTConfig) -> tuple[int, int]:
    """Parameters and FLOPs as Table 2 of Scaling Vision Transformers counts them (arXiv 2106.04560).

    Without class token, pooling and head, a multiply-add as two, and the operations between the products: 3 for every
    logit, 41 for every channel of a token and 7 for every hidden one, in every block. These three are fitted to the
    table; with them its 22 GFLOPs come out within 0.06, half of the last digit they are printed to (0.05) and a little.
    Without them the table is up to 2.6 % higher (S/32 at 224 px: 2.24 for 2.3).
    """
    counted = count(replace(config, pool="gap", pre_logits=0, classes=0, mask_token=False))
    tokens = prod(config.grid)
    between = config.depth * tokens * (3 * config.heads * tokens + 41 * config.width + 7 * config.mlp_width)
    return counted.parameters, 2 * counted.macs + between


def _swin(config: SwinConfig) -> list[Row]:
    tokens = prod(config.grids[0])
    kernel = config.channels * prod(config.patches) * config.width
    rows = [Row("stem", config.grids[0], (), kernel + (3 + config.mask_token) * config.width, tokens * kernel)]
    for stage in range(len(config.depths)):
        if stage:
            rows.append(_merge(config, stage - 1))
        rows.append(_stage(config, stage))
    width = config.width * 2 ** (len(config.depths) - 1)
    rows.append(Row("head", (), (), 2 * width + (width + 1) * config.classes, width * config.classes))
    return rows


def _vit(config: ViTConfig) -> list[Row]:
    """Patches, blocks (the last norm with them), pooling, head."""
    width, hidden, patches = config.width, config.mlp_width, prod(config.grid)
    tokens = patches + (config.pool == "token")
    kernel = config.channels * prod(config.patches) * width
    learnt = kernel + width + (patches * width if config.position == "learned" else 0)
    learnt += ((config.pool == "token") + config.mask_token) * width
    rows = [Row("patches", config.grid, (), learnt, patches * kernel)]

    mlp = 2 * width * hidden + hidden + width
    block = 4 * width**2 + 4 * width + mlp + 4 * width
    attention = 2 * tokens**2 * width
    macs = tokens * (4 * width**2 + 2 * width * hidden) + attention
    depth = config.depth
    rows.append(Row(f"{depth} blocks", config.grid, (), depth * block + 2 * width, depth * macs, attention=depth * attention))

    if config.pool == "map":  # one query
        attention = 2 * tokens * width
        macs = 2 * tokens * width**2 + 2 * width**2 + 2 * width * hidden + attention
        rows.append(Row("map pooling", (), (), width + 4 * width**2 + 4 * width + 2 * width + mlp, macs, attention=attention))
    last = config.pre_logits or width
    between = (width + 1) * config.pre_logits
    rows.append(Row("head", (), (), between + (last + 1) * config.classes, width * config.pre_logits + last * config.classes))
    return rows


def _supervit(config: SuperViTConfig, setting: Setting) -> list[Row]:
    """Stem, patches, blocks between one dropping and the next (the last norm with the last), head."""
    width, hidden, size = config.width, config.mlp_width, setting.size or config.size
    grid = config.grid_of(size)
    patches, prefix = prod(grid), 1 + config.registers
    rows, inputs, kernel = [], config.channels, config.patch
    if config.stem == "conv":
        stem, half = config.stem_width, (config.patch // 2 * grid[0], config.patch // 2 * grid[1])
        weights = 49 * config.channels * stem + 2 * 9 * stem**2
        rows.append(Row("stem", half, (), weights + 6 * stem, prod(half) * weights))
        inputs, kernel = stem, config.patch // 2
    weights = inputs * kernel**2 * width
    tables = config.grids if config.positions == "per-size" else (config.grid_of(config.size),)
    learnt = weights + width + prefix * width + sum(1 + prod(table) for table in tables) * width
    rows.append(Row("patches", grid, (), learnt, patches * weights))

    counts = dict(zip(config.drop_blocks, config.counts(setting, size), strict=True))
    block = 4 * width**2 + width * (1 + 3 * config.qkv_bias) + 2 * width * hidden + hidden + width + 4 * width
    first, parameters, macs, attention, left = 0, 0, 0, 0, patches
    for i in range(config.depth):
        tokens = prefix + left
        products, leaving = 2 * tokens**2 * width, counts.get(i, left) < left
        if leaving:
            products += tokens * width  # the class token's row of scores
            left = counts[i] + config.fuse
        parameters, attention = parameters + block, attention + products
        macs += products + tokens * 4 * width**2 + (prefix + left) * 2 * width * hidden
        if leaving or i == config.depth - 1:
            name = f"blocks {first}-{i}, {left} patches left" if leaving else f"blocks {first}-{i}"
            rows.append(Row(name, (), (), parameters + 2 * width * (i == config.depth - 1), macs, attention=attention))
            first, parameters, macs, attention = i + 1, 0, 0, 0
    heads = 1 if config.token_head is None else 1 + left
    rows.append(Row("head", (), (), (1 + (heads > 1)) * (width + 1) * config.classes, heads * width * config.classes))
    return rows


def table(counted: Count) -> list[tuple[str, ...]]:
    """The rows as text, one tuple of cells each, under a heading and over the totals."""
    heading = ("part", "grid", "window", "parameters", "GFLOPs", "attention", "bias")
    total = Row("total", (), (), *(sum(row[column] for row in counted.rows) for column in (3, 4, 5, 6)))
    return [heading, *(_cells(row) for row in (*counted.rows, total))]


def _cells(row: Row) -> tuple[str, ...]:
    sizes = ("x".join(map(str, size)) for size in (row.grid, row.window))
    shares = (f"{part / row.macs:.1%}" if part else "" for part in (row.attention, row.bias))
    return (row.part, *sizes, f"{row.parameters:,}", f"{row.macs / 1e9:.3f}", *shares)


def _stage(config: SwinConfig, stage: int) -> Row:
    """The blocks of one stage, and its level norm."""
    grid, window, depth = config.grids[stage], config.windows[stage], config.depths[stage]
    width, heads = config.width * 2**stage, config.heads[stage]
    hidden = int(width * config.mlp_ratio)
    tokens, padded = prod(grid), prod(-(-g // w) * w for g, w in zip(grid, window, strict=True))
    offsets = prod(2 * w - 1 for w in window)

    qkv = 3 * width if config.similarity == "dot" else 2 * width + heads  # biases; of q and v only, and scales
    learnt = 4 * width**2 + width + qkv + 2 * width * hidden + hidden + width
    learnt += 2 * NORMS[config.norm] * 2 * width
    learnt += offsets * heads if config.bias == "table" else BIAS_HIDDEN * (config.axes + 1 + heads)

    # Padded tokens are projected too (they leave after that); the MLP does not see them.
    linear = padded * 4 * width**2 + tokens * 2 * width * hidden
    attention = 2 * padded * prod(window) * width
    bias = 0 if config.bias == "table" else offsets * BIAS_HIDDEN * (config.axes + heads)

    norms = _extra_norms(config, stage) + config.level_norms
    return Row(
        f"stage {stage + 1}",
        grid,
        window,
        parameters=depth * learnt + norms * 2 * width,
        macs=depth * (linear + attention + bias),
        attention=depth * attention,
        bias=depth * bias,
    )


def _extra_norms(config: SwinConfig, stage: int) -> int:
    """How many blocks of a stage are followed by a norm on the main branch."""
    if not config.extra_norm_every:
        return 0
    first = 0 if config.extra_norm_scope == "stage" else sum(config.depths[:stage])
    return (first + config.depths[stage]) // config.extra_norm_every - first // config.extra_norm_every


def _merge(config: SwinConfig, stage: int) -> Row:
    """The merging behind a stage: 4C channels to 2C, and a norm on either side."""
    width, grid = config.width * 2**stage, config.grids[stage + 1]
    norm = 2 * (4 if config.merge_norm == "before" else 2) * width
    return Row(f"merge {stage + 1}", grid, (), 8 * width**2 + norm, prod(grid) * 8 * width**2)
