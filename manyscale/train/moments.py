"""Optimisers with small states: the modified Adafactor of "Scaling Vision Transformers", Adam and SGD with half-precision momentum.

As optax composes them in the original code (arXiv 2106.04560, section 3.4): p <- p - rate · (direction + weight_decay · p), with
the decay outside of the moments. Means are over steps t = 1, 2, ...; m is the momentum, g the gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Momentum = Literal["float32", "bfloat16", "bfloat16-jax"]

LEAST = 32  # the original's: both factored axes are at least this long
TINY = 1e-30  # joins squared gradients, so that a row of zeros divides
GROWTH = 0.8  # of Adafactor's beta2, 1 - t^-0.8


class Lean(torch.optim.Optimizer, ABC):
    """The step that the optimisers of this file share.

    Args:
        groups: as every torch optimiser takes them.
        lr: the rate until a scheduler sets it.
        betas: of the momentum, and of the squares.
        momentum: how m is stored. `bfloat16-jax` also rounds as JAX does: beta m in bfloat16, with beta in bfloat16 too
            (0.9 becomes 0.8984); without it the two are multiplied in float32. The direction is never rounded.
    """

    def __init__(self, groups: Iterable[Any], *, lr: float, betas: tuple[float, float], momentum: Momentum) -> None:
        self.momentum = momentum
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                state["step"] += 1
                exact = torch.promote_types(p.dtype, torch.float32)
                direction = self.direction(p, p.grad.to(exact), state, *group["betas"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(p.dtype), alpha=-group["lr"])
        return loss

    @abstractmethod
    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], beta1: float, beta2: float) -> Tensor:
        """Where the parameter goes, without rate and decay, in the gradient's precision."""

    def remember(self, state: dict[str, Tensor], new: Tensor, beta: float, weight: float) -> Tensor:
        """m <- beta m + weight new; m before it is rounded for storage."""
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(new, dtype=new.dtype if self.momentum == "float32" else torch.bfloat16)
        old = state["momentum"]
        if self.momentum == "bfloat16-jax":
            decayed = (old * torch.tensor(beta, dtype=old.dtype).item()).to(new.dtype)
        else:
            decayed = old.to(new.dtype) * beta
        m = decayed.add_(new * weight)  # not in one call, which would round once less than the original
        old.copy_(m)
        return m


class Adafactor(Lean):
    """The paper's Adafactor: squares kept as row and column means, momentum in half precision, no rate of its own.

    Against the first one (arXiv 1804.04235): beta2 = 1 - t^-0.8 stops growing at `betas[1]` (0.999, reached at step 5,624),
    there is a momentum, of the direction and without bias correction, and neither are parameters' sizes looked at nor
    directions clipped. A weight of two axes of at least 32 is factored over its two longest, any other is kept whole.

    Args:
        shapes: for parameters whose storage is not how the original has them, (lead, *shape): `lead` matrices of that shape
            in one. Fused q, k and v of a ViT are (3, heads, d, C), factored over C and d for each head.
    """

    def __init__(
        self, groups: Iterable[Any], *, lr: float, betas: tuple[float, float], momentum: Momentum, shapes: dict[Tensor, Any]
    ) -> None:
        self.shapes = shapes
        super().__init__(groups, lr=lr, betas=betas, momentum=momentum)

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], beta1: float, beta2: float) -> Tensor:
        """The momentum of g / sqrt(row column / mean(row))."""
        g = whole(gradient).view(self.shapes.get(p, (1, *p.shape)))
        squares, share = g.square() + TINY, (state["step"] ** -GROWTH).clamp(min=1 - beta2).to(g.dtype)  # share: 1 - beta2 of this step
        axes = factored(g.shape)
        if axes is None:
            square = state.setdefault("square", torch.zeros_like(g)).lerp_(squares, share)
            scaled = g * square.rsqrt()
        else:
            long, short = axes
            row = _mean(state, "row", squares, long, share)
            column = _mean(state, "column", squares, short, share)
            scaled = g * (row / row.mean(short, keepdim=True)).rsqrt() * column.rsqrt()
        return self.remember(state, shared_as(p, scaled.view(p.shape)), beta1, 1 - beta1)


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of a sharded one: means over rows and columns need it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_as(p: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor that every rank has, what this rank has of `p`."""
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def factored(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The longest and the second longest axis behind the first, where both are long enough; of equals the last."""
    by_length = sorted(range(1, len(shape)), key=lambda axis: shape[axis])
    return (by_length[-1], by_length[-2]) if len(by_length) > 1 and shape[by_length[-2]] >= LEAST else None


def _mean(state: dict[str, Tensor], name: str, squares: Tensor, axis: int, share: Tensor) -> Tensor:
    """The running mean of the squares' mean over an axis, which stays with length 1."""
    now = squares.mean(axis, keepdim=True)
    return state.setdefault(name, torch.zeros_like(now)).lerp_(now, share)


class Adam(Lean):
    """Adam with decoupled decay (arXiv 1711.05101) whose first moment may be kept in half precision."""

    def __init__(self, groups: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, momentum: Momentum) -> None:
        self.eps = eps
        super().__init__(groups, lr=lr, betas=betas, momentum=momentum)

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], beta1: float, beta2: float) -> Tensor:
        """m / (sqrt(v) + eps), both free of the bias of their start at zero."""
        m = self.remember(state, gradient, beta1, 1 - beta1)
        square = state.setdefault("square", torch.zeros_like(gradient)).lerp_(gradient.square(), 1 - beta2)
        step = state["step"].to(gradient.dtype)
        return (m / (1 - beta1**step)).div_((square / (1 - beta2**step)).sqrt_().add_(self.eps))


class Sgd(Lean):
    """Steepest descent with heavy-ball momentum, m <- beta m + g, and decoupled decay."""

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], beta1: float, beta2: float) -> Tensor:
        """m."""
        return self.remember(state, gradient, beta1, 1.0)
