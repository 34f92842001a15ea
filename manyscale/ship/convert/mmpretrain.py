"""The layout of open-mmlab/mmpretrain: an ImageClassifier with SwinTransformer or SwinTransformerV2 as its backbone."""

from collections.abc import Collection

from manyscale.config import SwinConfig
from manyscale.ship.convert.layout import Layout, Row, in_block, merge_order, rows, version

NET = {
    "patch.proj": "patch_embed.projection",
    "patch.norm": "patch_embed.norm",
    "norm": "norm{last}",  # one norm for each stage that is an output; a classifier has the last
}
BLOCK = {
    "attention.branch.qkv": "attn.w_msa.qkv",
    "attention.branch.q_bias": "attn.w_msa.q_bias",
    "attention.branch.v_bias": "attn.w_msa.v_bias",
    "attention.branch.logit_scale": "attn.w_msa.logit_scale",
    "attention.branch.bias.table": "attn.w_msa.relative_position_bias_table",
    "attention.branch.bias.fc1": "attn.w_msa.cpb_mlp.0",
    "attention.branch.bias.fc2": "attn.w_msa.cpb_mlp.2",
    "attention.branch.proj": "attn.w_msa.proj",
    "attention.norm_in": "norm1",
    "attention.norm_out": "norm1",
    "mlp.branch.fc1": "ffn.layers.0.0",
    "mlp.branch.fc2": "ffn.layers.1",
    "mlp.norm_in": "norm2",
    "mlp.norm_out": "norm2",
    "extra_norm": "norm3",
}


def layout(config: SwinConfig, names: Collection[str] = ()) -> Layout:
    """The layout of a file that holds `names`; without, a classifier's. A bare backbone has no prefix and no head.

    Merging is by torch's Unfold, whose columns come by channel: the linear layer, and V1's norm before it, are permuted.
    V1 keeps it at the end of a stage, V2 at the start of the next. Its relative positions are in its files, but are not
    written: V2 deletes them on load, V1 loads without them (strict=False, mmengine's default) at the same window.
    """
    prefix = "" if names and not any(name.startswith("backbone.") for name in names) else "backbone."
    block = prefix + "stages.{i}.blocks.{j}"
    merge = prefix + {1: "stages.{i}", 2: "stages.{next}"}[version(config)] + ".downsample"
    return Layout(
        rows=[
            *rows(NET, prefix),
            *rows({"head": "head.fc"}),
            *in_block(BLOCK, block),
            Row(("stages.{i}.merge.reduction",), (f"{merge}.reduction",), merge_order),
            Row(("stages.{i}.merge.norm_in",), (f"{merge}.norm",), merge_order),
            Row(("stages.{i}.merge.norm_out",), (f"{merge}.norm",)),
        ],
        attention=block + ".attn.w_msa",
    )
