"""From a name or a configuration to a model."""

from typing import Any

from manyscale.config import NetConfig, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.models.supervit import SuperViT
from manyscale.models.swin import Swin
from manyscale.models.vit import ViT
from manyscale.presets import model_config

Net = Swin | ViT | SuperViT


def create_model(name: str, **fields: Any) -> Net:
    """The model of preset `name`, freshly initialised, with any field of its configuration replaced.

    Example: `create_model("swinv2_tiny", classes=10, image_size=256, window=8)`.

    Raises:
        ValueError: an unknown name or field, or a value the configuration refuses.
    """
    return build(model_config(name, **fields))


def build(config: NetConfig) -> Net:
    """The model of a configuration."""
    return MODELS[type(config)](config)


MODELS: dict[type, type[Net]] = {SwinConfig: Swin, ViTConfig: ViT, SuperViTConfig: SuperViT}
