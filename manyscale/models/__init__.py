"""Architectures: one file each, read top to bottom."""

from manyscale.models.build import Net, build, create_model
from manyscale.models.features import Features
from manyscale.models.files import load, save
from manyscale.models.paths import set_attention
from manyscale.models.recalibrate import recalibrated
from manyscale.models.settings import compile_settings
from manyscale.models.supervit import SuperViT
from manyscale.models.swin import Swin
from manyscale.models.transfer import transfer
from manyscale.models.vit import ViT

__all__ = [
    "Features",
    "Net",
    "SuperViT",
    "Swin",
    "ViT",
    "build",
    "compile_settings",
    "create_model",
    "load",
    "recalibrated",
    "save",
    "set_attention",
    "transfer",
]
