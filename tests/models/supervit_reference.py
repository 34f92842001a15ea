"""SuperViT once more, slowly and in other words: one image at a time, whole attention matrices, numpy, float64.

Reads the state dict by the names of this package; shares no code with it.
"""

import math

import numpy as np

COUNTS = {  # patches left behind blocks 3, 6 and 9: (size, keep) -> counts, worked out by hand from ceil(keep x (N + 1))
    (128, 0.5): (33, 17, 9), (128, 0.7): (46, 33, 24), (128, 1.0): (64, 64, 64),
    (160, 0.5): (51, 26, 14), (160, 0.7): (71, 51, 37), (160, 1.0): (100, 100, 100),
    (192, 0.5): (73, 37, 19), (192, 0.7): (102, 73, 52), (192, 1.0): (144, 144, 144),
    (224, 0.5): (99, 50, 26), (224, 0.7): (138, 98, 70), (224, 1.0): (196, 196, 196),
}  # fmt: skip
ERF = np.vectorize(math.erf)


def run(state, image, *, patch, heads, drops, rule="supervit", fuse=False, registers=0, eps=1e-6, skip=1.0, token_head=None, table=0):
    """The logits of one image (3, H, W) that already has its size, and the places left behind each dropping block.

    Args:
        drops: {block: keep rate}.
        table: which position table.
    """
    p = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    x = np.asarray(image, dtype=np.float64)
    if "stem.conv1.weight" in p:
        for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
            x = conv(x, p[f"stem.conv{i}.weight"], stride, padding)
            mean, variance = p[f"stem.norm{i}.mean"][0], p[f"stem.norm{i}.variance"][0]
            x = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
            x = np.maximum(x * p[f"stem.norm{i}.weight"][:, None, None] + p[f"stem.norm{i}.bias"][:, None, None], 0)
        patch //= 2
    x = conv(x, p["patch.weight"], patch, 0) + p["patch.bias"][:, None, None]  # (C, h, w)
    patches = x.reshape(len(x), -1).T
    position = p[f"positions.{table}"]
    first = [p["token"] + position[0], *(p["registers"] if registers else [])]
    tokens = [*first, *(patches + position[1:])]
    places = list(range(len(patches)))
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    prefix, kept = 1 + registers, []
    for i in range(depth):
        q = f"blocks.{i}."
        y = np.stack([norm(t, p[q + "norm1.weight"], p[q + "norm1.bias"], eps) for t in tokens])
        out, matrix = attention(y, p, q + "attention.", heads)
        tokens = [t + o / skip for t, o in zip(tokens, out, strict=True)]
        keep = drops.get(i, 1)
        if keep < 1:
            scores = matrix[:, 0, prefix:].mean(0)
            count = math.ceil(keep * (len(scores) + (rule == "supervit")))
            order = sorted(range(len(scores)), key=lambda j: -scores[j])
            stay, go = order[:count], order[count:]
            patches = [tokens[prefix + j] for j in stay]
            left = [places[j] for j in stay]
            if fuse and go:
                patches.append(sum(scores[j] * tokens[prefix + j] for j in go))
                left.append(-1)
            tokens, places = [*tokens[:prefix], *patches], left
            kept.append(left)
        tokens = [t + mlp(norm(t, p[q + "norm2.weight"], p[q + "norm2.bias"], eps), p, q + "mlp.") / skip for t in tokens]
    tokens = [norm(t, p["norm.weight"], p["norm.bias"], eps) for t in tokens]
    logits = p["head.weight"] @ tokens[0] + p["head.bias"]
    if token_head is not None:
        answers = [p["token_head.weight"] @ t + p["token_head.bias"] for t in tokens[prefix:]]
        logits = logits + token_head * np.max(answers, axis=0)
    return logits, kept


def conv(x, kernel, stride, padding):
    """(c, H, W) by (C, c, k, k), window by window."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    k = kernel.shape[-1]
    rows, columns = (range(0, size - k + 1, stride) for size in x.shape[1:])
    return np.stack([np.stack([np.tensordot(kernel, x[:, r : r + k, c : c + k], 3) for c in columns], -1) for r in rows], 1)


def norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + eps) * weight + bias


def attention(x, p, prefix, heads):
    """(N, C) -> what is added to it, and the whole matrix of every head (heads, N, N)."""
    qkv = x @ p[prefix + "qkv.weight"].T + p.get(prefix + "qkv.bias", 0)
    q, k, v = np.split(qkv, 3, axis=1)
    d = q.shape[1] // heads
    outs, matrices = [], []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        logits = q[:, part] @ k[:, part].T / math.sqrt(d)
        matrix = np.exp(logits - logits.max(1, keepdims=True))
        matrix /= matrix.sum(1, keepdims=True)
        outs.append(matrix @ v[:, part])
        matrices.append(matrix)
    return np.concatenate(outs, 1) @ p[prefix + "proj.weight"].T + p[prefix + "proj.bias"], np.stack(matrices)


def mlp(x, p, prefix):
    h = p[prefix + "fc1.weight"] @ x + p[prefix + "fc1.bias"]
    return p[prefix + "fc2.weight"] @ (h * 0.5 * (1 + ERF(h / math.sqrt(2)))) + p[prefix + "fc2.bias"]
