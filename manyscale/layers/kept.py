"""What follows from a net's shape, or from few of its weights, computed once and used until one of them changes."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

LIMIT = 8  # values: a net that runs at many sizes in turns keeps those of the last few


class _Steps:
    """How many steps optimisers have taken, of any net: fused ones write weights without a trace."""

    taken = 0

    @classmethod
    def count(cls, *_: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class Kept:
    """Values by key, made of parameters, and forgotten when one of these is another or was written into, or an optimiser has stepped.

    What `tensor.data.copy_()` writes has no trace in torch and is not seen here; `train()` and `eval()` of the layer call `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def get(self, key: Hashable, make: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> Any:
        """The value of `key`, made where it is not there, without gradient."""
        now = [(p, p._version, p.data_ptr(), _Steps.taken) for p in parameters]
        marks, values, _ = self.held
        if len(now) != len(marks) or any(new is not old or rest != before for (new, *rest), (old, *before) in zip(now, marks, strict=True)):
            values = {}
            # the memory is held too: freed, its address could be that of what comes in its place
            self.held = now, values, [p.detach() for p, *_ in now]
        if (value := values.get(key)) is None:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training later
                value = make()
            if len(values) >= LIMIT:
                values.pop(next(iter(list(values))), None)
            values[key] = value
        return value

    def forget(self) -> None:
        """Drop all values."""
        # in one, for threads that share a net: no value stands beside marks of other parameters, nor goes while it is fetched
        self.held: tuple[list[tuple[Tensor, int, int, int]], dict[Hashable, Any], list[Tensor]] = [], {}, []


def can_keep(like: Tensor, parameters: Iterable[Tensor] = ()) -> bool:
    """Whether values of real tensors are computed now: not shapes alone, a graph that is traced, or what torch.func transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(like) is not Tensor or like.is_meta:
        return False
    tensors = (like, *parameters)
    return not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors) and not any(
        tensor.is_inference() for tensor in tensors[1:]
    )
