import re
from dataclasses import replace

import pytest
import torch

import manyscale as ms
from manyscale.config import Optim
from manyscale.heads.pixels import MaskedImages
from manyscale.tasks import Classify
from manyscale.train.loop import _Training
from manyscale.train.optim import decays, groups, is_decayed, make_optimiser, set_rate

MICRO = {"image_size": 32, "patch": 4, "window": 4, "width": 16, "depths": (2, 2), "heads": (2, 4), "classes": 5}


@pytest.mark.parametrize("name", ["swin_tiny", "swinv2_tiny"])
def test_not_decayed_is_what_the_official_code_names(name):
    model = ms.create_model(name, **MICRO)
    free = {n for n, p in model.named_parameters() if not is_decayed(n, p)}
    for n, p in model.named_parameters():
        official = p.ndim == 1 or n.endswith(".bias") or "attention.branch.bias." in n or "logit_scale" in n
        assert (n in free) == official, n
    assert any("logit_scale" in n for n in free) == (name == "swinv2_tiny")


def test_the_official_simmim_mistake_is_off_and_has_a_name():
    model = MaskedImages(ms.create_model("swinv2_tiny", **{**MICRO, "classes": 0, "mask_token": True}))

    def decayed(**fields):
        return {n for g in groups(model, Optim(**fields)) if g["weight_decay"] for n in names(model, g)}

    extra = decayed(decay_position_bias=True) - decayed()
    assert extra == {n for n, p in model.named_parameters() if p.ndim > 1 and (".bias.fc" in n or "logit_scale" in n)}
    assert not any("mask_token" in n or n.endswith(("q_bias", "norm.weight")) for n in decayed(decay_position_bias=True))


VIT = {"image_size": 32, "patch": 8, "width": 64, "depth": 2, "heads": 2, "mlp_width": 128, "classes": 7, "pool": "map", "mask_token": True}


def test_a_vit_decays_kernels_only_and_its_head_on_its_own():
    model = ms.create_model("vit_tiny_patch16", **VIT)
    found = decays(model, Optim(weight_decay=0.03, head_decay=3.0))
    assert {n for n, d in found.items() if d == 3.0} == {"head.weight"}  # not the MAP head, which is of the body
    assert {n for n, d in found.items() if d == 0.03} == {n for n in found if n.endswith(".weight") and "norm" not in n} - {"head.weight"}
    assert found["pool.mlp.fc1.weight"] == 0.03 and found["pool.probe"] == found["position"] == found["mask_token.token"] == 0
    assert decays(model, Optim(weight_decay=0.03))["head.weight"] == 0.03
    assert decays(model, Optim(weight_decay=0.03, head_decay=0.0))["head.weight"] == 0.0
    with pytest.raises(ValueError, match="field `head_decay`: the net has no classifier"):
        decays(ms.create_model("vit_tiny_patch16", **{**VIT, "classes": 0}), Optim(weight_decay=0.03, head_decay=3.0))


def test_the_first_rule_that_matches_decides():
    model = ms.create_model("vit_tiny_patch16", **VIT)
    rules = ((r"blocks\.0\..*", 0.5), (r"blocks\..*bias", 0.25), (r"position", 0.125))
    found = decays(model, Optim(weight_decay=0.03, decay_rules=rules))
    for name, decay in found.items():
        by_rule = 0.5 if name.startswith("blocks.0.") else 0.25 if name.startswith("blocks") and name.endswith("bias") else None
        by_rule = 0.125 if name == "position" else by_rule
        assert by_rule is None or decay == by_rule, name
    made = groups(model, Optim(decay_rules=rules, layer_decay=0.5))
    assert sum(len(group["params"]) for group in made) == len(found)
    for wrong in ("head", r"blocks\.0\.attention.*"):  # a part of a name only; all decided by an earlier rule
        with pytest.raises(ValueError, match=rf"field `decay_rules`: .*{re.escape(repr(wrong))} matches no parameter"):
            groups(model, Optim(decay_rules=(*rules, (wrong, 1.0))))
    for wrong in (((".*", -1.0),), (("(", 0.1),), ((".*", float("nan")),)):
        with pytest.raises(ValueError, match="field `decay_rules`"):
            Optim(decay_rules=wrong)
    with pytest.raises(ValueError, match="field `head_decay`"):
        Optim(head_decay=-0.1)


def names(model, group):
    members = set(map(id, group["params"]))
    return {n for n, p in model.named_parameters() if id(p) in members}


def test_layers_count_from_the_pixels_to_the_head():
    model = ms.create_model("swinv2_tiny", **{**MICRO, "depths": (2, 3), "level_norms": True})
    assert model.layers == 2 + 3 + 2
    ids = {n: model.layer(n) for n, _ in model.named_parameters()}
    assert ids["patch.proj.weight"] == ids["patch.norm.bias"] == 0
    assert ids["stages.0.blocks.0.mlp.branch.fc1.weight"] == 1
    assert ids["stages.0.blocks.1.attention.branch.qkv.weight"] == 2
    assert ids["stages.0.merge.reduction.weight"] == 2  # official: sum(depths[:1])
    assert ids["stages.1.blocks.2.mlp.norm_out.weight"] == 5
    assert ids["norm.weight"] == ids["head.weight"] == ids["level_norms.0.weight"] == 6


def test_groups_cover_every_parameter_once_and_rates_fall_towards_the_pixels():
    model = ms.create_model("swinv2_tiny", **MICRO)
    made = groups(model, Optim(layer_decay=0.5))
    assert sum(len(g["params"]) for g in made) == len(list(model.parameters()))
    scale = {id(p): g["scale"] for g in made for p in g["params"]}
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.patch.proj.weight)] == 0.5**5
    optimiser = make_optimiser(model, Optim(layer_decay=0.5))
    set_rate(optimiser, 0.1)
    assert {g["lr"] for g in optimiser.param_groups} == {0.1 * 0.5**k for k in range(6)}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_and_clipping_make_the_step_of_the_whole_batch(micro, tmp_path, clip):
    """Clipping acts on the whole step's gradient, never on a part's: 1, 2 and 4 parts give the same weights."""
    plain = replace(
        micro,
        model=replace(micro.model, drop_path=0.0),
        optim=replace(micro.optim, clip=clip, ema=0.0),
        augment=replace(micro.augment, mixup=0, cutmix=0),
    )
    weights = []
    for parts in (1, 2, 4):
        run = replace(plain, accumulate=parts, batch=64, out=str(tmp_path / str(parts)))
        training = _Training(tmp_path, Classify(run), 0.0)
        training.clock = training.state.clock
        training._share_out([])
        for step, batch in zip(range(3), training.task.train_batches(0, 3, training.device), strict=True):
            training.clock.step = step
            training._step(batch, 0.01)
        weights.append(torch.cat([p.detach().flatten() for p in training.state.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(weights[2], weights[0], atol=2e-4, rtol=0)
    assert not torch.equal(weights[1], weights[0])  # they did go other ways
