"""The papers' tables as plain dicts, and the one function that turns a name into a configuration.

Sources: Swin V1 (arXiv 2103.14030, section 3.3), Swin V2 (arXiv 2111.09883 v2, section 4.1), the SimMIM model zoo, and Scaling
Vision Transformers (arXiv 2106.04560, Table 2), with the further sizes of its public code. SuperViT (arXiv 2205.11397) has two
nets, on DeiT-S and LV-ViT-S; the others have the shapes of DeiT (arXiv 2012.12877, Table 1) and LV-ViT (arXiv 2104.10858, Table 1).
"""

from fnmatch import fnmatchcase
from typing import Any

from manyscale.config import NetConfig, SuperViTConfig, SwinConfig, ViTConfig, from_dict, nearest

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

SHAPES: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {  # the paper's letter -> name here, shape, patches
    "s": ("xsmall", {"width": 256, "depth": 6, "heads": 8, "mlp_width": 1024}, (16, 28)),
    "Ti": ("tiny", {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768}, (16,)),
    "S": ("small", {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536}, (16, 32)),
    "M": ("medium", {"width": 512, "depth": 12, "heads": 8, "mlp_width": 2048}, (16, 32)),  # not in the paper
    "B": ("base", {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}, (16, 28, 32)),
    "L": ("large", {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}, (16,)),
    "H": ("huge", {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120}, (14,)),  # not in the paper
    "So400m": ("so400m", {"width": 1152, "depth": 27, "heads": 16, "mlp_width": 4304}, (14,)),  # arXiv 2305.13035
    "g": ("giant", {"width": 1408, "depth": 40, "heads": 16, "mlp_width": 6144}, (14,)),
    "G": ("gigantic", {"width": 1664, "depth": 48, "heads": 16, "mlp_width": 8192}, (14,)),
    "e": ("enormous", {"width": 1792, "depth": 56, "heads": 16, "mlp_width": 15360}, (14,)),  # arXiv 2209.06794
}
VIT: dict[str, dict[str, Any]] = {
    f"vit_{name}_patch{patch}": {"image_size": 224, "patch": patch, **shape}
    for name, shape, patches in SHAPES.values()
    for patch in patches
}
PAPER_NAMES = {f"{letter}/{patch}": f"vit_{name}_patch{patch}" for letter, (name, _, patches) in SHAPES.items() for patch in patches}

LVVIT = {"stem": "conv", "skip": 2.0, "token_head": 0.25, "qkv_bias": False, "norm_eps": 1e-5, "drop_path": 0.1}
SUPERVIT: dict[str, dict[str, Any]] = {
    "supervit_deit_tiny": {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768, "drop_path": 0.1},
    "supervit_deit_small": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536, "drop_path": 0.1},
    "supervit_deit_base": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072, "drop_path": 0.1},
    "supervit_lvvit_tiny": {**LVVIT, "width": 240, "depth": 12, "heads": 4, "mlp_width": 720},
    "supervit_lvvit_small": {**LVVIT, "width": 384, "depth": 16, "heads": 6, "mlp_width": 1152},
    "supervit_lvvit_medium": {**LVVIT, "width": 512, "depth": 20, "heads": 8, "mlp_width": 1536},
}

PRESETS: dict[str, dict[str, Any]] = {**SWIN, **VIT, **SUPERVIT}


def list_models(pattern: str = "*") -> list[str]:
    """The names of the presets that match a shell-style `pattern`, sorted: `list_models("swinv2*")`."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def model_config(name: str, **fields: Any) -> NetConfig:
    """The configuration of preset `name`, or of the ViT paper's name such as `B/16`, with any of its fields replaced.

    Raises:
        ValueError: an unknown preset or field, named with the nearest known one, or a value the configuration refuses.
    """
    if name not in PRESETS and name not in PAPER_NAMES:
        raise ValueError(f"unknown model `{name}`; {nearest(name, (*PRESETS, *PAPER_NAMES) if '/' in name else PRESETS)}")
    name = PAPER_NAMES.get(name, name)
    kind = SwinConfig if name in SWIN else SuperViTConfig if name in SUPERVIT else ViTConfig
    return from_dict(kind, {**PRESETS[name], **fields}, name)
