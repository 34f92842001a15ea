"""The layouts of huggingface/transformers: Swin and Swinv2ForImageClassification, ViTForImageClassification, SiglipVisionModel."""

from collections.abc import Collection
from functools import partial
from math import prod

import torch

from manyscale.config import SwinConfig, ViTConfig
from manyscale.ship.convert import vit
from manyscale.ship.convert.layout import Layout, Row, State, in_block, rows, version

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


VIT_OLD = {
    "attention.norm_in": "layernorm_before",
    "attention.branch.proj": "attention.output.dense",
    "mlp.norm_in": "layernorm_after",
    "mlp.branch.fc1": "intermediate.dense",
    "mlp.branch.fc2": "output.dense",
}
VIT_NEW = {**VIT_OLD, "attention.branch.proj": "attention.o_proj", "mlp.branch.fc1": "mlp.fc1", "mlp.branch.fc2": "mlp.fc2"}
SIGLIP = {
    "attention.norm_in": "layer_norm1",
    "attention.branch.proj": "self_attn.out_proj",
    "mlp.norm_in": "layer_norm2",
    "mlp.branch.fc1": "mlp.fc1",
    "mlp.branch.fc2": "mlp.fc2",
}
SIGLIP_NET = {
    "patch": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "pool.attention.q": "head.attention.q_proj",
    "pool.attention.kv": "head.attention.kv_proj",
    "pool.attention.proj": "head.attention.out_proj",
    "pool.norm": "head.layernorm",
    "pool.mlp.fc1": "head.mlp.fc1",
    "pool.mlp.fc2": "head.mlp.fc2",
    "head": "classifier",
}
SIGLIP_ALONE = vit.Names("none", "embeddings.position_embedding.weight", "head.probe")


def vit_layout(config: ViTConfig, names: Collection[str] = ()) -> Layout:
    """The layout of a file that holds `names`; without, of transformers 5.23: a ViT with a class token, or SigLIP's with MAP pooling.

    ViT changed its names within version 5: both are read, the new ones written. Its pooler, a layer of its own behind the
    class token, is not read. Of a whole SigLIP the text tower is left out.

    Raises:
        ValueError: a net that it cannot hold.
    """
    if any("layer_norm1" in name for name in names) or (not names and config.pool == "map"):
        return _siglip(config)
    vit.refuse(config, "transformers", pools=("token", "map") if not names else ("token", "gap", "map"))
    prefix = "vit." if not names or any(name.startswith("vit.") for name in names) else ""
    old = any(".attention.attention." in name for name in names)
    block = prefix + ("encoder.layer.{i}" if old else "layers.{i}")
    qkv = ("attention.attention.query", "attention.attention.key", "attention.attention.value") if old else NEW_QKV
    net = {"patch": prefix + "embeddings.patch_embeddings.projection", "norm": prefix + "layernorm", "head": "classifier"}
    return vit.torch_layout(
        config,
        [
            *rows(net),
            *vit.in_blocks(VIT_OLD if old else VIT_NEW, block),
            Row(("blocks.{i}.attention.branch.qkv",), tuple(f"{block}.{name}" for name in qkv)),
        ],
        vit.Names(prefix + "embeddings.cls_token", prefix + "embeddings.position_embeddings", "none", token_row=True),
        {"gelu": "exact", "norm_eps": 1e-12, "position_resize": "bicubic"},
        dropped=("*pooler.*", "*mask_token"),
    )


def _siglip(config: ViTConfig) -> Layout:
    block = "encoder.layers.{i}"
    qkv = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    rows_ = [*rows(SIGLIP_NET), *vit.in_blocks(SIGLIP, block), Row(("blocks.{i}.attention.branch.qkv",), qkv)]
    layout = vit.torch_layout(config, rows_, SIGLIP_ALONE, {"gelu": "tanh", "position_resize": "bicubic"}, flat=True)
    return layout._replace(enter=partial(_enter_siglip, places=prod(config.grid)), leave=_leave_siglip)


def _enter_siglip(state: State, places: int) -> State:
    """Without the text tower and its prefix, the pooling's one matrix as two."""
    if any(name.startswith("vision_model.") for name in state):
        state = {name.removeprefix("vision_model."): t for name, t in state.items() if name.startswith(("vision_model.", "classifier."))}
    state = dict(state)
    for leaf in ("weight", "bias"):
        if f"head.attention.in_proj_{leaf}" in state:
            whole = state.pop(f"head.attention.in_proj_{leaf}")
            third = len(whole) // 3
            state[f"head.attention.q_proj.{leaf}"], state[f"head.attention.kv_proj.{leaf}"] = whole[:third], whole[third:]
    return vit.even_out(state, SIGLIP_ALONE, places)


def _leave_siglip(state: State) -> State:
    state = vit.restore(state, SIGLIP_ALONE, flat=True)
    for leaf in ("weight", "bias"):
        parts = [state.pop(f"head.attention.{name}_proj.{leaf}", None) for name in ("q", "kv")]
        if parts[0] is not None and parts[1] is not None:
            state[f"head.attention.in_proj_{leaf}"] = torch.cat([parts[0], parts[1]])
    return state
