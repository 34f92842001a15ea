"""The layouts of huggingface/pytorch-image-models (timm 1.0). Swin: the official names, but merging opens the next stage."""

from collections.abc import Collection

from manyscale.config import SwinConfig, ViTConfig
from manyscale.ship.convert import vit
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


VIT = {
    "patch": "patch_embed.proj",
    "norm": "norm",
    "pool.attention.q": "attn_pool.q",
    "pool.attention.kv": "attn_pool.kv",
    "pool.attention.proj": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.fc1": "attn_pool.mlp.fc1",
    "pool.mlp.fc2": "attn_pool.mlp.fc2",
    "head": "head",
}
VIT_ALONE = vit.Names("cls_token", "pos_embed", "attn_pool.latent", token_row=True)


def vit_layout(config: ViTConfig, names: Collection[str] = ()) -> Layout:
    """The layout of its VisionTransformer. Pooling gap is its `global_pool="avg", class_token=False, fc_norm=False`: it can
    also put the norm behind the mean (`fc_norm`), which is another function, and not read.

    Raises:
        ValueError: a net that it cannot hold.
    """
    vit.refuse(config, "timm")
    fields = {"gelu": "exact", "position_resize": "bicubic"}
    return vit.torch_layout(config, [*rows(VIT), *vit.in_blocks(vit.BLOCK, "blocks.{i}")], VIT_ALONE, fields)
