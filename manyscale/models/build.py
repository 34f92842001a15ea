"""From a name or a configuration to a model."""

from typing import Any

from torch import nn

from manyscale.config import SwinConfig
from manyscale.models.swin import Swin
from manyscale.presets import model_config


def create_model(name: str, **fields: Any) -> Swin:
    """The model of preset `name`, freshly initialised, with any field of its configuration replaced.

    Example: `create_model("swinv2_tiny", classes=10, image_size=256, window=8)`.

    Raises:
        ValueError: an unknown name or field, or a value the configuration refuses.
    """
    return build(model_config(name, **fields))


def build(config: SwinConfig) -> Swin:
    """The model of a configuration."""
    return MODELS[type(config)](config)


MODELS: dict[type, type[nn.Module]] = {SwinConfig: Swin}
