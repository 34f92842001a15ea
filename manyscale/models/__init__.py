"""Architectures: one file each, read top to bottom."""

from manyscale.models.build import build, create_model
from manyscale.models.files import load, save
from manyscale.models.swin import Features, Swin
from manyscale.models.transfer import transfer

__all__ = ["Features", "Swin", "build", "create_model", "load", "save", "transfer"]
