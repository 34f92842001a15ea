"""Write tests/parity/flax_vit.npz: a small ViT in flax, as big_vision builds it, with random weights, pictures and logits.

Needs jax and flax, which the package does not: `pip install jax flax`, then `python tools/goldens/flax_vit.py`.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, CLASSES = 16, 2, 2, 24, 8, 5


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(WIDTH)(x)


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x = EncoderBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, WIDTH))
        x = nn.MultiHeadDotProductAttention(num_heads=HEADS)(jnp.tile(probe, (len(x), 1, 1)), x)
        return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class ViT(nn.Module):
    pool: str

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, WIDTH)
        x = x + self.param("pos_embedding", nn.initializers.normal(WIDTH**-0.5), (1, x.shape[1], WIDTH))
        if self.pool == "token":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = Encoder(name="Transformer")(x)
        x = {"gap": lambda: x.mean(axis=1), "token": lambda: x[:, 0], "map": lambda: MAPHead(name="MAPHead_0")(x)}[self.pool]()
        x = nn.tanh(nn.Dense(12, name="pre_logits")(x))
        return nn.Dense(CLASSES, name="head")(x)


def main() -> None:
    """Every parameter random, in float64."""
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 16, 24, 3)).astype(np.float32)
    arrays = {"images": images}
    for pool in ("token", "gap", "map"):
        model = ViT(pool)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        weights = jax.tree.map(lambda leaf: random.normal(size=leaf.shape) * 0.4, shapes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
            name = "/".join(str(part.key) for part in path)
            arrays[f"{pool}/{name}"] = leaf.astype(np.float32)
        single = jax.tree.map(lambda leaf: leaf.astype(np.float32).astype(np.float64), weights)
        arrays[f"{pool}/logits"] = np.asarray(model.apply(single, images.astype(np.float64)))
    np.savez_compressed(Path(__file__).parents[2] / "tests" / "parity" / "flax_vit.npz", **arrays)


if __name__ == "__main__":
    main()
