"""Architectures: one file each, read top to bottom."""

from manyscale.models.build import create_model

from manyscale.models.swin import Features, Swin


__all__ = ["Features", "Swin", "create_model", "load", "save", "transfer"]
