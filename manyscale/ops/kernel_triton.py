"""The programs of `ops.kernel`, in Triton.

Logits are in base 2 throughout. `heads` of an array is how many vectors of d channels a token has in it.
"""

import triton
import triton.language as tl
from triton.language import constexpr

INTERPRETED = constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when this file was imported: on any device, and slow

# One compiled kernel for all values of these, which change from batch to batch and from stage to stage.
launched = triton.jit(do_not_specialize=["tokens", "windows", "total", "heads"])

# --- What the kernels share ----------------------------------------------------------------------------------------------------
# All programs are along the first axis of the launch grid: the others end at 65,535. Heads run fastest, so that a token's heads,
# which lie side by side, are fetched at about the same time. What grows with the batch is counted in 64 bits.


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # whose product would take the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _mine(heads, TILES: constexpr):
    """A program's head, tile, and place among those that share both."""
    program = tl.program_id(0)
    return program % heads, program // heads % TILES, program // heads // TILES


@triton.jit
def _tokens(places, labels, window, windows, tokens, place, N: constexpr):
    """The tokens of a window's places, counted over the batch (-1: none), and their labels.

    What is no token has label -1, and attends its like: of zeros, with a gradient of zeros, so that nothing comes of it but rows
    of which none is masked whole.
    """
    at = window % windows * N + place
    token = tl.load(places + at, mask=place < N, other=-1)
    if labels is None:
        label = tl.where(place < N, 0, -1)
    else:
        label = tl.load(labels + at, mask=place < N, other=-1)
    return tl.where(token < 0, -1, window // windows * tokens + token), label


@triton.jit
def _read(x, token, heads, D: constexpr, WIDTH: constexpr):
    """(BLOCK, WIDTH) of tokens that have `heads` vectors each, the first's at `x`; zeros where there is no token or channel."""
    channel = tl.arange(0, WIDTH)
    at = x + token[:, None] * heads * D + channel[None, :]
    return tl.load(at, mask=(token >= 0)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _write(x, token, heads, value, D: constexpr, WIDTH: constexpr):
    channel = tl.arange(0, WIDTH)
    at = x + token[:, None] * heads * D + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(token >= 0)[:, None] & (channel < D)[None, :])


@triton.jit
def _row(x, window, heads, head, place, N: constexpr):
    """Where the numbers of a window's rows lie in (B, W, H, N)."""
    return x + (window * heads + head) * N + place


@triton.jit
def _bias(bias, head, row, column, N: constexpr):
    """The bias of rows and columns, which broadcast; in base 2."""
    if bias is None:
        added = None
    else:
        at = bias + head.to(tl.int64) * N * N + row * N + column
        added = tl.load(at, mask=(row < N) & (column < N), other=0.0).to(tl.float32) * 1.4426950408889634
    return added


@triton.jit
def _rate(scale, head, D: constexpr):
    if scale is None:
        rate = D**-0.5
    else:
        rate = tl.load(scale + head)
    return rate


@triton.jit
def _inverse(x, scale):
    """One over each row's length, 0 for what counts as zero (`ops.unit`); without cosines 1."""
    if scale is None:
        inverse = tl.full((x.shape[0],), 1.0, tl.float32)
    else:
        wide = x.to(tl.float32)
        length = tl.sqrt(tl.sum(wide * wide, axis=1))
        inverse = 1.0 / tl.where(length < 1e-6, float("inf"), length)
    return inverse


@triton.jit
def _unit(x, inverse):
    # as a factor of a product, in the type of x: 1 / |x| itself can leave float16
    return (x.to(tl.float32) * inverse[:, None]).to(x.dtype)


@triton.jit
def _logits(a, b, from_a, from_b, label_a, label_b, added, MASKED: constexpr):
    """(a b^T + bias) of raw vectors, whose lengths come in as factors afterwards, in float32; in base 2."""
    logits = _dot(a, tl.trans(b)) * (from_a * 1.4426950408889634)[:, None] * from_b[None, :]
    if added is not None:
        logits += added
    if MASKED:
        logits = tl.where(label_a[:, None] == label_b[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _unscaled(u, x, inverse, rate, scale):
    """From the gradient `u` of rate x / |x|: that of x, and each row's part of that of the rate."""
    along = tl.sum(u * (x.to(tl.float32) * inverse[:, None]), axis=1)
    if scale is not None:  # what lies along x would change its length, on which the cosine does not depend
        u = (u - along[:, None] * (x.to(tl.float32) * inverse[:, None])) * inverse[:, None]
    return u * rate, along


# --- A program has whole windows -----------------------------------------------------------------------------------------------


@launched
def whole_forward(
    qkv, places, labels, bias, scale, out, sums,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """One head of every `step`-th window of the batch."""
    head, _tile, first = _mine(heads, 1)
    step = tl.num_programs(0) // heads
    place = tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    added = _bias(bias, head, place[:, None], place[None, :], N)
    for index in range(first, total, step):
        window = tl.cast(index, tl.int64)
        token, label = _tokens(places, labels, window, windows, tokens, place, N)
        q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
        k = _read(qkv + (heads + head) * D, token, 3 * heads, D, WIDTH)
        v = _read(qkv + (2 * heads + head) * D, token, 3 * heads, D, WIDTH)
        logits = _logits(q, k, rate * _inverse(q, scale), _inverse(k, scale), label, label, added, MASKED)
        top = tl.max(logits, axis=1)
        weights = tl.exp2(logits - top[:, None])
        sum = tl.sum(weights, axis=1)
        seen = _dot(weights.to(v.dtype), v) / sum[:, None]
        _write(out + head * D, token, heads, seen, D, WIDTH)
        tl.store(_row(sums, window, heads, head, place, N), top + tl.log2(sum), mask=place < N)


@launched
def whole_backward(
    qkv, places, labels, bias, scale, grad, sums, grad_qkv, bias_parts, scale_parts,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The same windows; the program's sums of the bias's and the scale's gradient are written once, at the end."""
    head, _tile, first = _mine(heads, 1)
    step = tl.num_programs(0) // heads
    place = tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    added = _bias(bias, head, place[:, None], place[None, :], N)
    bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(first, total, step):
        window = tl.cast(index, tl.int64)
        token, label = _tokens(places, labels, window, windows, tokens, place, N)
        q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
        k = _read(qkv + (heads + head) * D, token, 3 * heads, D, WIDTH)
        v = _read(qkv + (2 * heads + head) * D, token, 3 * heads, D, WIDTH)
        above = _read(grad + head * D, token, heads, D, WIDTH)
        from_q, from_k = _inverse(q, scale), _inverse(k, scale)
        logits = _logits(q, k, rate * from_q, from_k, label, label, added, MASKED)
        weights = tl.exp2(logits - tl.load(_row(sums, window, heads, head, place, N), mask=place < N, other=0.0)[:, None])
        grad_logits = _dot(above, tl.trans(v))
        inner = tl.sum(weights * grad_logits, axis=1)  # what softmax's gradient takes off each row
        grad_logits = weights * (grad_logits - inner[:, None])
        if bias is not None:
            bias_sum += grad_logits
        grad_v = _dot(tl.trans(weights.to(v.dtype)), above)
        grad_logits = grad_logits.to(q.dtype)
        grad_q = _dot(grad_logits, _unit(k, from_k))
        grad_k = _dot(tl.trans(grad_logits), _unit(q, from_q))
        grad_q, along = _unscaled(grad_q, q, from_q, rate, scale)
        grad_k, _along = _unscaled(grad_k, k, from_k, rate, scale)
        scale_sum += along
        _write(grad_qkv + head * D, token, 3 * heads, grad_q, D, WIDTH)
        _write(grad_qkv + (heads + head) * D, token, 3 * heads, grad_k, D, WIDTH)
        _write(grad_qkv + (2 * heads + head) * D, token, 3 * heads, grad_v, D, WIDTH)
    if bias is not None:
        at = bias_parts + (first.to(tl.int64) * heads + head) * N * N + place[:, None] * N + place[None, :]
        tl.store(at, bias_sum, mask=(place[:, None] < N) & (place[None, :] < N))
    if scale is not None:
        tl.store(scale_parts + first * heads + head, tl.sum(scale_sum, axis=0))


# --- A program has a tile ------------------------------------------------------------------------------------------------------


@launched
def tile_forward(
    qkv, places, labels, bias, scale, out, sums,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """Some rows of a window, over its columns tile by tile; what was summed is rescaled when a larger logit comes up."""
    head, tile, window = _mine(heads, (N + BLOCK - 1) // BLOCK)
    window = window.to(tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    token, label = _tokens(places, labels, window, windows, tokens, row, N)
    q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
    from_q = rate * _inverse(q, scale)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, as the logits of a whole tile may all be -inf
    sum = tl.zeros((BLOCK,), tl.float32)
    seen = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other, others = _tokens(places, labels, window, windows, tokens, column, N)
        k = _read(qkv + (heads + head) * D, other, 3 * heads, D, WIDTH)
        v = _read(qkv + (2 * heads + head) * D, other, 3 * heads, D, WIDTH)
        added = _bias(bias, head, row[:, None], column[None, :], N)
        logits = _logits(q, k, from_q, _inverse(k, scale), label, others, added, MASKED)
        before, top = top, tl.maximum(top, tl.max(logits, axis=1))
        kept = tl.exp2(before - top)
        weights = tl.exp2(logits - top[:, None])
        sum = sum * kept + tl.sum(weights, axis=1)
        seen = seen * kept[:, None] + _dot(weights.to(v.dtype), v)
    _write(out + head * D, token, heads, seen / sum[:, None], D, WIDTH)
    tl.store(_row(sums, window, heads, head, row, N), top + tl.log2(sum), mask=row < N)


@launched
def tile_backward_rows(
    qkv, places, labels, bias, scale, grad, out, sums, inner, grad_qkv, scale_parts,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The gradient of q, and for the kernels after this one what softmax's gradient takes off each row."""
    head, tile, window = _mine(heads, (N + BLOCK - 1) // BLOCK)
    scale_parts += tl.program_id(0)
    window = window.to(tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    token, label = _tokens(places, labels, window, windows, tokens, row, N)
    q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
    above = _read(grad + head * D, token, heads, D, WIDTH)
    taken = tl.sum(above.to(tl.float32) * _read(out + head * D, token, heads, D, WIDTH).to(tl.float32), axis=1)
    tl.store(_row(inner, window, heads, head, row, N), taken, mask=row < N)
    log = tl.load(_row(sums, window, heads, head, row, N), mask=row < N, other=0.0)
    from_q = _inverse(q, scale)
    grad_q = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other, others = _tokens(places, labels, window, windows, tokens, column, N)
        k = _read(qkv + (heads + head) * D, other, 3 * heads, D, WIDTH)
        v = _read(qkv + (2 * heads + head) * D, other, 3 * heads, D, WIDTH)
        from_k = _inverse(k, scale)
        added = _bias(bias, head, row[:, None], column[None, :], N)
        weights = tl.exp2(_logits(q, k, rate * from_q, from_k, label, others, added, MASKED) - log[:, None])
        grad_logits = weights * (_dot(above, tl.trans(v)) - taken[:, None])
        grad_q += _dot(grad_logits.to(k.dtype), _unit(k, from_k))
    grad_q, along = _unscaled(grad_q, q, from_q, rate, scale)
    _write(grad_qkv + head * D, token, 3 * heads, grad_q, D, WIDTH)
    if scale is not None:
        tl.store(scale_parts, tl.sum(along, axis=0))


@launched
def tile_backward_columns(
    qkv, places, labels, bias, scale, grad, sums, inner, grad_qkv,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The gradients of k and v: some columns of a window, over its rows tile by tile, all transposed."""
    head, tile, window = _mine(heads, (N + BLOCK - 1) // BLOCK)
    window = window.to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    other, others = _tokens(places, labels, window, windows, tokens, column, N)
    k = _read(qkv + (heads + head) * D, other, 3 * heads, D, WIDTH)
    v = _read(qkv + (2 * heads + head) * D, other, 3 * heads, D, WIDTH)
    from_k = _inverse(k, scale)
    grad_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    grad_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        token, label = _tokens(places, labels, window, windows, tokens, row, N)
        q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
        above = _read(grad + head * D, token, heads, D, WIDTH)
        log = tl.load(_row(sums, window, heads, head, row, N), mask=row < N, other=0.0)
        taken = tl.load(_row(inner, window, heads, head, row, N), mask=row < N, other=0.0)
        from_q = _inverse(q, scale)
        added = _bias(bias, head, row[None, :], column[:, None], N)
        weights = tl.exp2(_logits(k, q, rate * from_k, from_q, others, label, added, MASKED) - log[None, :])
        grad_v += _dot(weights.to(v.dtype), above)
        grad_logits = weights * (_dot(v, tl.trans(above)) - taken[None, :])
        grad_k += _dot(grad_logits.to(q.dtype), _unit(q, from_q))
    grad_k, _along = _unscaled(grad_k, k, from_k, rate, scale)
    _write(grad_qkv + (heads + head) * D, other, 3 * heads, grad_k, D, WIDTH)
    _write(grad_qkv + (2 * heads + head) * D, other, 3 * heads, grad_v, D, WIDTH)


@launched
def tile_backward_bias(
    qkv, places, labels, bias, scale, grad, sums, inner, bias_parts,
    tokens, windows, total, heads, N: constexpr, D: constexpr, WIDTH: constexpr, BLOCK: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The gradient of a tile of the bias, summed over every `step`-th window of the batch."""
    TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    head, tile, first = _mine(heads, TILES * TILES)
    step = tl.num_programs(0) // (heads * TILES * TILES)
    row = tile // TILES * BLOCK + tl.arange(0, BLOCK)
    column = tile % TILES * BLOCK + tl.arange(0, BLOCK)
    rate = _rate(scale, head, D)
    added = _bias(bias, head, row[:, None], column[None, :], N)
    bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for index in range(first, total, step):
        window = tl.cast(index, tl.int64)
        token, label = _tokens(places, labels, window, windows, tokens, row, N)
        other, others = _tokens(places, labels, window, windows, tokens, column, N)
        q = _read(qkv + head * D, token, 3 * heads, D, WIDTH)
        k = _read(qkv + (heads + head) * D, other, 3 * heads, D, WIDTH)
        v = _read(qkv + (2 * heads + head) * D, other, 3 * heads, D, WIDTH)
        above = _read(grad + head * D, token, heads, D, WIDTH)
        log = tl.load(_row(sums, window, heads, head, row, N), mask=row < N, other=0.0)
        taken = tl.load(_row(inner, window, heads, head, row, N), mask=row < N, other=0.0)
        weights = tl.exp2(_logits(q, k, rate * _inverse(q, scale), _inverse(k, scale), label, others, added, MASKED) - log[:, None])
        bias_sum += weights * (_dot(above, tl.trans(v)) - taken[:, None])
    at = bias_parts + (first.to(tl.int64) * heads + head) * N * N + row[:, None] * N + column[None, :]
    tl.store(at, bias_sum, mask=(row[:, None] < N) & (column[None, :] < N))
