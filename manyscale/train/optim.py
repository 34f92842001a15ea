"""Which optimiser, and its parameter groups: what decays how much, and rates that fall from the head to the pixels."""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from manyscale.config import Optim
from manyscale.layers.attention import Attention, CrossAttention, WindowAttention
from manyscale.train.moments import Adafactor, Adam, Sgd

# Besides vectors and biases. Position biases and the logit scale are what Swin's official `no_weight_decay_keywords` mean
# to name; in its SimMIM pre-training the names do not match and they are decayed by mistake (`Optim.decay_position_bias`).
SWIN_NOT_DECAYED = (".bias.", "logit_scale")
# ViT's original decays kernels only. (timm's list forgets the query of MAP pooling; SuperViT's official code means to spare its
# positions, and decays them, since its list has the name of their list.)
VIT_NOT_DECAYED = {"position", "positions", "probe", "registers"}
HEADS = ("head.weight", "token_head.weight")  # the classifiers; MAP pooling, which ViT's code calls a head too, is body


def is_decayed(name: str, parameter: nn.Parameter, position_bias: bool = False) -> bool:
    """Whether weight decay pulls on this parameter where no rule says so; with `position_bias`, on Swin's position biases too."""
    if parameter.ndim < 2 or VIT_NOT_DECAYED.intersection(name.split(".")):
        return False
    return position_bias or not any(part in name for part in SWIN_NOT_DECAYED)


def decays(model: nn.Module, optim: Optim) -> dict[str, float]:
    """The weight decay of every parameter by name: of the first rule that matches, of the head, of the body, or none.

    Raises:
        ValueError: a rule that decides nothing, because it matches no name or earlier rules match them all; a decay of the head for a net
            that has none.
    """
    rules = [(re.compile(pattern), decay, []) for pattern, decay in optim.decay_rules]
    found = {}
    named = dict(model.named_parameters())
    if optim.head_decay is not None and not named.keys() & set(HEADS):
        raise ValueError(
            f"field `head_decay`: the net has no classifier ({' or '.join(HEADS)}) to decay by {optim.head_decay:g}; leave it out"
        )
    for name, parameter in named.items():
        rule = next((rule for rule in rules if rule[0].fullmatch(name)), None)
        if rule:
            rule[2].append(name)
            found[name] = rule[1]
        elif not is_decayed(name, parameter, optim.decay_position_bias):
            found[name] = 0.0
        else:
            found[name] = optim.head_decay if name in HEADS and optim.head_decay is not None else optim.weight_decay
    for pattern, _, names in rules:
        if not names:
            some = ", ".join(list(found)[:3])
            raise ValueError(
                f"field `decay_rules`: {pattern.pattern!r} matches no parameter that an earlier rule leaves; it must match a whole name, "
                f"such as {some}"
            )
    return found


def groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Parameter groups, each with `scale`, its share of the schedule's rate: layer_decay to the layers above it.

    The model says how many `layers` it has, and the `layer` of a parameter's name.

    Raises:
        ValueError: as `decays`.
    """
    decay, parameters = decays(model, optim), defaultdict(list)
    for name, parameter in model.named_parameters():
        parameters[model.layers - 1 - model.layer(name), decay[name]].append(parameter)
    return [
        {"params": members, "scale": optim.layer_decay**above, "weight_decay": decay}
        for (above, decay), members in sorted(parameters.items(), key=lambda item: item[0])
    ]


def original_shapes(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The fused and flattened weights of attention as the original code has them, for an Adafactor that factors as it does.

    (lead, heads, d, C) of q, k and v, each a matrix of its own; (1, C, heads, d) of what follows attention.
    """
    shapes: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if not isinstance(module, (WindowAttention, Attention, CrossAttention)):
            continue
        for name, lead in (("qkv", 3), ("q", 1), ("kv", 2)):
            if linear := getattr(module, name, None):
                per_head = (lead, module.heads, linear.out_features // lead // module.heads)
                shapes[linear.weight] = (*per_head, linear.in_features)
                if linear.bias is not None:
                    shapes[linear.bias] = per_head
        shapes[module.proj.weight] = (1, module.proj.out_features, module.heads, module.proj.in_features // module.heads)
    return shapes


def make_optimiser(model: nn.Module, optim: Optim, made: Callable[..., torch.optim.Optimizer] | None = None) -> torch.optim.Optimizer:
    """The optimiser over `groups`; its rates are set before every step by `set_rate`.

    Args:
        made: called with an optimiser's class, groups and options; None: makes it.

    Raises:
        ValueError: as `decays`.
    """
    made = made or (lambda kind, groups, **options: kind(groups, **options))
    common = {"lr": optim.lr, "betas": optim.betas}
    if optim.method == "adafactor":
        return made(Adafactor, groups(model, optim), momentum=optim.momentum, shapes=original_shapes(model), **common)
    if optim.method == "sgd":
        return made(Sgd, groups(model, optim), momentum=optim.momentum, **common)
    if optim.momentum != "float32":
        return made(Adam, groups(model, optim), eps=optim.eps, momentum=optim.momentum, **common)
    return made(torch.optim.AdamW, groups(model, optim), eps=optim.eps, fused=True, **common)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
