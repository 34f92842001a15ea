"""The layout of huggingface/transformers: SwinForImageClassification and Swinv2ForImageClassification."""

from collections.abc import Collection

from manyscale.config import SwinConfig
from manyscale.ship.convert.layout import Layout, Row, in_block, rows, version

NET = {
    "patch.proj": "embeddings.patch_embeddings.projection",
    "patch.norm": "embeddings.norm",
    "stages.{i}.merge.reduction": "encoder.layers.{i}.downsample.reduction",
    "stages.{i}.merge.norm_in": "encoder.layers.{i}.downsample.norm",
    "stages.{i}.merge.norm_out": "encoder.layers.{i}.downsample.norm",
    "norm": "layernorm",
}
BLOCK = {
    "attention.branch.q_bias": "attention.self.query.bias",
    "attention.branch.v_bias": "attention.self.value.bias",
    "attention.branch.logit_scale": "attention.self.logit_scale",
    "attention.branch.bias.fc1": "attention.self.continuous_position_bias_mlp.0",
    "attention.branch.bias.fc2": "attention.self.continuous_position_bias_mlp.2",
    "attention.norm_in": "layernorm_before",
    "attention.norm_out": "layernorm_before",
    "mlp.norm_in": "layernorm_after",
    "mlp.norm_out": "layernorm_after",
}
OLD = {
    "attention.branch.bias.table": "attention.self.relative_position_bias_table",
    "attention.branch.proj": "attention.output.dense",
    "mlp.branch.fc1": "intermediate.dense",
    "mlp.branch.fc2": "output.dense",
}
OLD_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
NEW = {
    "attention.branch.bias.table": "attention.relative_position_bias.relative_position_bias_table",
    "attention.branch.proj": "attention.o_proj",
    "mlp.branch.fc1": "mlp.fc1",
    "mlp.branch.fc2": "mlp.fc2",
}
NEW_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def layout(config: SwinConfig, names: Collection[str] = ()) -> Layout:
    """The layout of a file that holds `names`; without, the one a model of transformers 5.23 has.

    V1 changed its names within version 5: the files on the hub and those `save_pretrained` writes have the old ones,
    the model in memory the new ones. Both are read; the new ones are written, for `load_state_dict`. V2 has one set.
    A bare SwinModel or Swinv2Model has no prefix and no head. No buffers are in its files, or asked for.
    """
    prefix = {1: "swin.", 2: "swinv2."}[version(config)]
    if names and not any(name.startswith(prefix) for name in names):
        prefix = ""
    block = prefix + "encoder.layers.{i}.blocks.{j}"
    old = version(config) == 2 or any(".attention.self." in name for name in names)
    table, qkv = (OLD, OLD_QKV) if old else (NEW, NEW_QKV)
    return Layout(
        rows=[
            *rows(NET, prefix),
            *rows({"head": "classifier"}),
            *in_block({**BLOCK, **table}, block),
            Row(("stages.{i}.blocks.{j}.attention.branch.qkv",), tuple(f"{block}.{name}" for name in qkv)),
        ],
        attention=block + ".attention.self",
    )
