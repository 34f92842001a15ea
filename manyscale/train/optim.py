"""AdamW with the official parameter groups: what is not decayed, and rates that fall from the head to the pixels."""

from collections import defaultdict

import torch
from torch import nn

from manyscale.config import Optim

# Besides vectors and biases. Position biases and the logit scale are what the official `no_weight_decay_keywords` mean
# to name; in its SimMIM pre-training the names do not match and they are decayed by mistake (`Optim.decay_position_bias`).
NOT_DECAYED = (".bias.", "logit_scale")


def is_decayed(name: str, parameter: nn.Parameter, position_bias: bool = False) -> bool:
    """Whether weight decay pulls on this parameter; with `position_bias`, on position biases and logit scales too."""
    return parameter.ndim > 1 and (position_bias or not any(part in name for part in NOT_DECAYED))


def groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Parameter groups, each with `scale`, its share of the schedule's rate: layer_decay to the layers above it.

    The model says how many `layers` it has, and the `layer` of a parameter's name.
    """
    parameters = defaultdict(list)
    for name, parameter in model.named_parameters():
        above = model.layers - 1 - model.layer(name)
        parameters[above, is_decayed(name, parameter, optim.decay_position_bias)].append(parameter)
    return [
        {"params": members, "scale": optim.layer_decay**above, "weight_decay": optim.weight_decay if decayed else 0.0}
        for (above, decayed), members in sorted(parameters.items())
    ]


def make_optimiser(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over `groups`; its rates are set before every step by `set_rate`."""
    return torch.optim.AdamW(groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
