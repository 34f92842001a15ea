"""The papers' tables as plain dicts, and the one function that turns a name into a configuration.

Sources: Swin V1 (arXiv 2103.14030, section 3.3), Swin V2 (arXiv 2111.09883 v2, section 4.1) and the SimMIM model zoo.
"""

from fnmatch import fnmatchcase
from typing import Any

from manyscale.config import SwinConfig, from_dict, nearest

V1 = {"image_size": 224, "window": 7, "similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"}
V2 = {"image_size": 256, "window": 8}
# "an additional layer normalization unit on the main branch every 6 layers" (V2 section 3.2), counted in each stage:
# the paper does not say from where, nor how many heads H and G have; a head is 32 wide in every released model.
LARGE = {**V2, "extra_norm_every": 6}

SWIN: dict[str, dict[str, Any]] = {
    "swin_tiny": {**V1, "width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "swin_small": {**V1, "width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "swin_base": {**V1, "width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "swin_large": {**V1, "width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "drop_path": 0.2},
    "swinv2_tiny": {**V2, "width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "swinv2_small": {**V2, "width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "swinv2_base": {**V2, "width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "swinv2_large": {**V2, "width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "drop_path": 0.2},
    "swinv2_huge": {**LARGE, "width": 352, "depths": (2, 2, 18, 2), "heads": (11, 22, 44, 88), "drop_path": 0.2},
    # 3.0 billion. The paper's first version (November 2021) says depths (2, 2, 42, 2), which counts 2.6 billion:
    # create_model("swinv2_giant", depths=(2, 2, 42, 2)).
    "swinv2_giant": {**LARGE, "width": 512, "depths": (2, 2, 42, 4), "heads": (16, 32, 64, 128), "drop_path": 0.3},
    # The SimMIM zoo's "SwinV2-giant" is another, smaller net: 1.06 billion, window 12 at 192 px, no extra norm.
    "swinv2_simmim_1b": {
        **V2, "image_size": 192, "window": 12, "width": 448, "depths": (2, 2, 18, 2), "heads": (14, 28, 56, 112), "drop_path": 0.2,
    },
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {**SWIN}


def list_models(pattern: str = "*") -> list[str]:
    """The names of the presets that match a shell-style `pattern`, sorted: `list_models("swinv2*")`."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def model_config(name: str, **fields: Any) -> SwinConfig:
    """The configuration of preset `name`, with any of its fields replaced.

    Raises:
        ValueError: an unknown preset or field, named with the nearest known one, or a value the configuration refuses.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model `{name}`; {nearest(name, PRESETS)}")
    return from_dict(SwinConfig, {**PRESETS[name], **fields}, name)
