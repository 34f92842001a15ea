"""Manyscale: vision transformers at many scales of capacity, resolution and cost.

Names are loaded when first used (PEP 562), so that `import manyscale` and the command line's help cost no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Setting": "manyscale.config",
    "list_models": "manyscale.presets",
    "create_model": "manyscale.models",
    "transfer": "manyscale.models",
    "load": "manyscale.models",
    "save": "manyscale.models",
    "Features": "manyscale.models",
    "convert": "manyscale.ship.convert",
    "export_weights": "manyscale.ship.convert",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `manyscale` has no `{name}`; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
