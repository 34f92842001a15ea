"""The layout of pytorch/vision: `swin_t` to `swin_b` and `swin_v2_t` to `swin_v2_b`."""

from collections.abc import Collection

from manyscale.config import SwinConfig
from manyscale.ship.convert.layout import Layout, Row, in_block, rows

NET = {
    "patch.proj": "features.0.0",
    "patch.norm": "features.0.2",
    "stages.{i}.merge.reduction": "features.{even}.reduction",
    "stages.{i}.merge.norm_in": "features.{even}.norm",
    "stages.{i}.merge.norm_out": "features.{even}.norm",
    "norm": "norm",
    "head": "head",
}
BLOCK = {
    "attention.branch.qkv": "attn.qkv",
    "attention.branch.logit_scale": "attn.logit_scale",
    "attention.branch.bias.table": "attn.relative_position_bias_table",
    "attention.branch.bias.fc1": "attn.cpb_mlp.0",
    "attention.branch.bias.fc2": "attn.cpb_mlp.2",
    "attention.branch.proj": "attn.proj",
    "attention.norm_in": "norm1",
    "attention.norm_out": "norm1",
    "mlp.branch.fc1": "mlp.0",
    "mlp.branch.fc2": "mlp.3",
    "mlp.norm_in": "norm2",
    "mlp.norm_out": "norm2",
}


def layout(config: SwinConfig, names: Collection[str] = ()) -> Layout:
    """The layout.

    V2's qkv bias is (q, k, v) with a k that torchvision zeroes before use: not loaded, and written as zeros. Its files
    hold the relative positions, and its loader wants them: they are written. It has no pretrained window, but reads the
    coordinates from the file, so that one with a pretrained window computes the same there too.
    """
    block, ours = "features.{odd}.{j}", "stages.{i}.blocks.{j}.attention.branch"
    joint = Row((f"{ours}.q_bias", None, f"{ours}.v_bias"), (f"{block}.attn.qkv.bias",))
    return Layout(rows=[*rows(NET), *in_block(BLOCK, block), joint], attention=block + ".attn", writes_buffers=True)
