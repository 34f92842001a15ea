"""The layout of microsoft/Swin-Transformer, V1 and V2, and of its SimMIM files."""

from collections.abc import Collection

from manyscale.config import SwinConfig
from manyscale.ship.convert.layout import BUFFERS, Layout, in_block, rows

NET = {
    "patch.proj": "patch_embed.proj",
    "patch.norm": "patch_embed.norm",
    "norm": "norm",
}
BLOCK = {
    "attention.branch.qkv": "attn.qkv",
    "attention.branch.q_bias": "attn.q_bias",
    "attention.branch.v_bias": "attn.v_bias",
    "attention.branch.logit_scale": "attn.logit_scale",
    "attention.branch.proj": "attn.proj",
    "attention.branch.bias.table": "attn.relative_position_bias_table",
    "attention.norm_in": "norm1",  # V1
    "attention.norm_out": "norm1",  # V2
    "mlp.branch.fc1": "mlp.fc1",
    "mlp.branch.fc2": "mlp.fc2",
    "mlp.norm_in": "norm2",
    "mlp.norm_out": "norm2",
}
MERGE = {
    "stages.{i}.merge.reduction": "layers.{i}.downsample.reduction",
    "stages.{i}.merge.norm_in": "layers.{i}.downsample.norm",
    "stages.{i}.merge.norm_out": "layers.{i}.downsample.norm",
}
SIMMIM_DROPPED = ("encoder.mask_token", "decoder.*")
"""What a SimMIM file holds besides its encoder, named as in the file: not loaded, and only there."""


def layout(config: SwinConfig, names: Collection[str] = ()) -> Layout:
    """The layout of a file that holds `names`; without, the one its own code loads.

    SimMIM files keep the net under `encoder.`; the earliest of them call the bias network `rpe_mlp`
    (microsoft/Swin-Transformer#271). The official code keeps index, coordinates and masks in its files too; they are
    not written, and its loader (strict=False) does not ask for them.
    """
    simmim = any(name.startswith("encoder.") for name in names)
    prefix = "encoder." if simmim else ""
    network = "rpe_mlp" if any(".rpe_mlp." in name for name in names) else "cpb_mlp"
    block = prefix + "layers.{i}.blocks.{j}"
    bias = {"attention.branch.bias.fc1": f"attn.{network}.0", "attention.branch.bias.fc2": f"attn.{network}.2"}
    return Layout(
        rows=[*rows({**NET, **MERGE, "head": "head"}, prefix), *in_block({**BLOCK, **bias}, block)],
        attention=block + ".attn",
        dropped=BUFFERS + SIMMIM_DROPPED if simmim else BUFFERS,
    )
