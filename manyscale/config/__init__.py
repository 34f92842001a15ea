"""Every setting of the house: frozen, keyword-only dataclasses that hold values only, and their strict reader and writer.

No torch here: recipes, planners and the command line read this room without paying for the engine.
Each class checks its own values when it is made; a `ValueError` names the field and the fix.
"""

from manyscale.config.durations import Duration, in_steps, seconds
from manyscale.config.memory import Memory, read_bytes
from manyscale.config.nets import NetConfig, Size, SwinConfig, ViTConfig, Windows
from manyscale.config.parallel import Parallel
from manyscale.config.run import Augment, Input, Optim, Preprocess, Probe, Run, Schedule, SimMIM, Supernet
from manyscale.config.supervit import Setting, SuperViTConfig
from manyscale.config.values import from_dict, nearest, to_dict

__all__ = [
    "Augment",
    "Duration",
    "Input",
    "Memory",
    "NetConfig",
    "Optim",
    "Parallel",
    "Preprocess",
    "Probe",
    "Run",
    "Schedule",
    "Setting",
    "SimMIM",
    "Size",
    "SuperViTConfig",
    "Supernet",
    "SwinConfig",
    "ViTConfig",
    "Windows",
    "from_dict",
    "in_steps",
    "nearest",
    "read_bytes",
    "seconds",
    "to_dict",
]
