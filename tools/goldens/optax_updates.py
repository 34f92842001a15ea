"""Write tests/train/optax.npz: parameters after 20 steps of optax, as big_vision composes it, for every shape a ViT has.

Needs jax and optax, which the package does not: `pip install jax optax`, then `python tools/goldens/optax_updates.py`.
Gradients are a formula (`gradient`), the same in the test: no random numbers to agree on.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS, RATE, DECAY = 20, 1e-2, 0.1
SHAPES = {  # as flax has them
    "tall": (96, 40),
    "wide": (40, 96),
    "square": (64, 64),
    "thin": (200, 31),  # too thin to be factored
    "vector": (80,),
    "convolution": (8, 8, 3, 48),
    "convolution, large": (33, 34, 3, 36),
    "query": (72, 3, 40),
    "query, narrow heads": (72, 6, 12),
    "out": (3, 40, 72),
    "positions": (1, 49, 48),
}


def gradient(shape: tuple[int, ...], step: int) -> np.ndarray:
    """Waves, with rows and columns of very different size, and a change of sign now and then."""
    flat = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    scale = np.ones(shape)
    for axis, length in enumerate(shape):
        ramp = np.exp(2.0 * np.sin(1.7 * np.arange(length) + axis)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        scale = scale * ramp
    return (np.sin(0.37 * flat + 1.3 * step) * scale * 1e-2).astype(np.float32)


def initial(shape: tuple[int, ...]) -> np.ndarray:
    """Where the parameters start."""
    return (0.1 * np.cos(0.11 * np.arange(np.prod(shape)))).reshape(shape).astype(np.float32)


def adafactor(momentum: str | None, cap: float) -> optax.GradientTransformation:
    """big_vision's `scale_by_adafactor`: no parameter scale, no relative step, no clipping by root mean square."""

    def rate(count, exponent):
        return jnp.minimum(cap, 1.0 - jnp.array(count + 1, jnp.float32) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(True, 0.8, 0, 32, 1e-30, rate),
        optax.ema(0.9, debias=False, accumulator_dtype=momentum),
    )


METHODS = {
    "adafactor bfloat16": adafactor("bfloat16", 0.999),
    "adafactor float32": adafactor(None, 0.999),
    "adafactor cap 0.8": adafactor("bfloat16", 0.8),
    "adamw bfloat16": optax.scale_by_adam(0.9, 0.999, 1e-8, mu_dtype="bfloat16"),
    "sgd bfloat16": optax.trace(0.9, accumulator_dtype="bfloat16"),
}


def main() -> None:
    """Run every method on every shape."""
    arrays = {}
    for name, method in METHODS.items():
        for kind, shape in SHAPES.items():
            parameters = jnp.asarray(initial(shape))
            state = method.init(parameters)
            for step in range(STEPS):
                update, state = method.update(jnp.asarray(gradient(shape, step)), state, parameters)
                parameters = parameters - RATE * (update + DECAY * parameters)
            moved = np.asarray(parameters, dtype=np.float64) - initial(shape)
            keep = max(1, moved.size // 400)  # some hundred numbers of each say it all
            arrays[f"{name}/{kind}"] = moved.reshape(-1)[::keep].astype(np.float32)
    np.savez_compressed(Path(__file__).parents[2] / "tests" / "train" / "optax.npz", **arrays)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
