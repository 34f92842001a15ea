"""SimMIM files whole, as microsoft/SimMIM and microsoft/Swin-Transformer keep them: `encoder.`, its mask token, `decoder.0`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from manyscale.heads.pixels import MaskedImages
from manyscale.models import Swin, build

TOKEN = "encoder.mask_token"
DECODER = {"proj.weight": "decoder.0.weight", "proj.bias": "decoder.0.bias"}


def put_together(encoder: Swin, state: Mapping[str, Any], where: str) -> MaskedImages:
    """The net of a file whose encoder has been read: with the file's mask token and decoder, in its dtype.

    Raises:
        ValueError: one of them is missing or of another shape.
    """
    config = replace(encoder.config, mask_token=True)
    model = MaskedImages(build(config))
    own = model.head.state_dict()
    expected = {TOKEN: (1, 1, config.width), **{theirs: tuple(own[ours].shape) for ours, theirs in DECODER.items()}}
    found = {name: tuple(state[name].shape) if isinstance(state.get(name), Tensor) else None for name in expected}
    wrong = [f"{name} is {found[name] or 'missing'}, the model's is {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise ValueError(
            "\n  ".join([f"{where} is no whole SimMIM file of this model (source `official` reads its encoder alone):", *wrong])
        )
    model.encoder.load_state_dict({**encoder.state_dict(), "mask_token.token": state[TOKEN].flatten().clone()}, assign=True)
    model.head.load_state_dict({ours: state[theirs].clone() for ours, theirs in DECODER.items()}, assign=True)
    return model.eval()


def take_apart(model: MaskedImages) -> dict[str, Tensor]:
    """What a SimMIM file holds besides the encoder's layers."""
    head = {theirs: model.head.state_dict()[ours].detach().clone() for ours, theirs in DECODER.items()}
    assert model.encoder.mask_token
    return {TOKEN: model.encoder.mask_token.token.detach().clone().reshape(1, 1, -1), **head}
