"""Less memory, the same step: attention paths and activation checkpointing put on a net from outside."""

import copy
from dataclasses import replace

import pytest
import torch

from manyscale.config import Memory, SuperViTConfig, SwinConfig, ViTConfig, read_bytes
from manyscale.heads.pixels import MaskedImages
from manyscale.models import build
from manyscale.train.loop import train
from manyscale.train.shard import blocks, fit
from tests.conftest import loud
from tests.train.test_loop import fingerprint, shorter

NETS = {
    "swin": SwinConfig(image_size=16, patch=2, window=4, width=8, depths=(2, 2), heads=(2, 2), drop_path=0.3, classes=5),
    "vit": ViTConfig(image_size=16, patch=4, width=16, depth=3, heads=2, mlp_width=32, drop_path=0.3, classes=5),
    "supervit": SuperViTConfig(sizes=(16,), patch=4, width=16, depth=3, heads=2, mlp_width=32, drop_blocks=(1,), drop_path=0.3, classes=5),
}
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of a training step with drop path, and the bytes kept for its backward pass."""
    torch.manual_seed(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model.train()(IMAGES).square().mean()
    kept = sum(
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )  # freed ones are negative
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


@pytest.mark.parametrize("name", NETS)
def test_checkpointing_changes_no_gradient_and_keeps_less(name):
    plain = loud(build(NETS[name])).double()
    found = {"none": step(copy.deepcopy(plain))}
    for kind in ("selective", "blocks"):
        found[kind] = step(fit(copy.deepcopy(plain), Memory(checkpointing=kind)))
    for loss, grads, _ in found.values():
        torch.testing.assert_close(loss, found["none"][0], rtol=1e-12, atol=0)
        assert list(grads) == list(found["none"][1])
        for key, grad in grads.items():
            torch.testing.assert_close(grad, found["none"][1][key], rtol=1e-9, atol=1e-12)
    assert found["blocks"][2] < 0.6 * found["selective"][2] and found["selective"][2] < 0.8 * found["none"][2]


@pytest.mark.parametrize("name", NETS)
def test_sequential_attention_changes_no_gradient(name):
    plain = loud(build(NETS[name])).double()
    one, two = step(copy.deepcopy(plain)), step(fit(copy.deepcopy(plain), Memory(attention="sequential", attention_memory="2KiB")))
    for key, grad in two[1].items():
        torch.testing.assert_close(grad, one[1][key], rtol=1e-9, atol=1e-12)


def test_a_copy_has_forwards_of_its_own():
    """A moving average is a deep copy: it must not run the blocks of the net that is trained."""
    model = fit(loud(build(replace(NETS["vit"], drop_path=0.0))).double(), Memory(checkpointing="blocks"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    other(IMAGES).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in other.blocks.parameters())
    with torch.no_grad():
        assert not torch.allclose(model(IMAGES), other(IMAGES))


def test_the_first_stages_alone_are_sequential():
    model = fit(build(NETS["swin"]), Memory(sequential=1, attention_memory="1MiB"))
    paths = [[block.attention.branch.attention_path for block in stage.blocks] for stage in model.stages]
    assert paths == [["sequential"] * 2, ["auto"] * 2] and model.stages[0].blocks[0].attention.branch.attention_budget == 2**20
    masked = fit(MaskedImages(build(replace(NETS["swin"], mask_token=True, classes=0))), Memory(sequential=2, checkpointing="blocks"))
    assert len(blocks(masked)) == 4 and masked.encoder.stages[1].blocks[1].attention.branch.attention_path == "sequential"


def test_a_run_with_all_of_it_ends_with_the_same_loss(micro):
    micro = shorter(micro, epochs=2)
    memory = Memory(sequential=1, attention_memory="16KiB", checkpointing="selective")
    plain, lean = train(micro), train(replace(micro, memory=memory, out=micro.out + "_lean"))
    assert lean["last"]["val_loss"] == pytest.approx(plain["last"]["val_loss"], rel=1e-4)
    train(shorter(replace(micro, memory=memory), epochs=2))  # a finished run is the same run, however it computed
    assert fingerprint(micro.out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequential": -1}, "field `sequential`: -1 must be 0"),
        ({"sequential": 1, "attention": "fused"}, "field `sequential`: 1 stages, but --attention fused"),
        ({"attention_memory": "0MiB"}, "field `attention_memory`: '0MiB' is no number of bytes"),
        ({"attention_memory": "much"}, "field `attention_memory`: 'much' is no number of bytes"),
    ],
)
def test_what_memory_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Memory(**fields)


def test_what_a_net_refuses():
    with pytest.raises(ValueError, match="field `attention`: unknown path `sequentail`; did you mean `sequential`"):
        fit(build(NETS["swin"]), Memory(attention="sequentail"))
    with pytest.raises(ValueError, match="field `sequential`: 3 stages, but Swin has 2"):
        fit(build(NETS["swin"]), Memory(sequential=3))
    with pytest.raises(ValueError, match="field `sequential`: 1 stages, but ViT has 0"):
        fit(build(NETS["vit"]), Memory(sequential=1))
    with pytest.raises(ValueError, match="field `checkpointing`: Linear has no blocks"):
        fit(torch.nn.Linear(2, 2), Memory(checkpointing="blocks"))
    with pytest.raises(ValueError, match="field `attention`: kernel is attention inside windows, which ViT has none of; give fused"):
        fit(build(NETS["vit"]), Memory(attention="kernel"))
    with pytest.raises(ValueError, match="field `attention`: kernel needs Triton and a CUDA device"):
        fit(build(NETS["swin"]), Memory(attention="kernel"))(IMAGES.float())
    with pytest.raises(ValueError, match="field `attention`: kernel keeps no attention weights that it could drop"):
        fit(build(replace(NETS["swin"], dropout=0.1)), Memory(attention="kernel"))(IMAGES.float())
    with pytest.raises(ValueError, match="field `attention_memory`: 10 bytes"):
        fit(build(NETS["vit"]), Memory(attention="sequential", attention_memory="10"))(IMAGES.float())


def test_bytes_are_read_as_people_write_them():
    assert [read_bytes(text) for text in ("4096", "64MiB", "40GB", "1.5 gib", "2k", ".5 KB")] == [
        4096, 64 * 2**20, 40 * 10**9, 3 * 2**29, 2000, 500]  # fmt: skip
