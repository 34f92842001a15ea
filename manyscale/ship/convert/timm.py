"""The layout of huggingface/pytorch-image-models (timm 1.0): the official names, but merging opens the next stage."""

from collections.abc import Collection

from manyscale.config import SwinConfig
from manyscale.ship.convert.layout import Layout, in_block, rows
from manyscale.ship.convert.official import BLOCK, NET

BIAS = {"attention.branch.bias.fc1": "attn.cpb_mlp.0", "attention.branch.bias.fc2": "attn.cpb_mlp.2"}
MERGE = {
    "stages.{i}.merge.reduction": "layers.{next}.downsample.reduction",
    "stages.{i}.merge.norm_in": "layers.{next}.downsample.norm",
    "stages.{i}.merge.norm_out": "layers.{next}.downsample.norm",
}


def layout(config: SwinConfig, names: Collection[str] = ()) -> Layout:
    """The layout; timm keeps no buffers in its files, and loads what is written here strictly."""
    block = "layers.{i}.blocks.{j}"
    return Layout(rows=[*rows({**NET, **MERGE, "head": "head.fc"}), *in_block({**BLOCK, **BIAS}, block)], attention=block + ".attn")
