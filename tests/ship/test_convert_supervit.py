"""SuperViT weights in and out: the official names and shapes, both sets of weights in a file, a ViT that becomes one, errors."""

import argparse
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import manyscale as ms
from manyscale.cli import main
from manyscale.config import Setting
from manyscale.models.kin import to_supervit, to_vit
from manyscale.ship.convert import VIT_SOURCES
from tests.conftest import loud

SMALL = {"sizes": (32, 48, 64), "width": 12, "depth": 4, "heads": 2, "mlp_width": 20, "drop_blocks": (1, 2)}
NAMES = ("supervit_deit_small", "supervit_lvvit_small")
DEIT = NAMES[0]


def made(name: str, **fields) -> torch.nn.Module:
    """A net whose every tensor is random, running statistics too."""
    model = loud(ms.create_model(name, **{**SMALL, "classes": 5, **fields})).eval()
    generator = torch.Generator().manual_seed(1)
    for norm in model.sized_norms():
        norm.mean.normal_(generator=generator)
        norm.variance.uniform_(0.5, 2, generator=generator)
    return model


def moved(weights: dict, by: float = 1.0) -> dict:
    """Weights of the same names and shapes with other numbers."""
    return {key: tensor + by if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key


def convert(weights, name: str = DEIT, **fields):
    return ms.convert(weights, source="supervit", name=name, **{**SMALL, **fields})


# --- the layout --------------------------------------------------------------------------------------------------------------


def official(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official nets, written out by hand."""
    lvvit = "lvvit" in name
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 384), "head.weight": (1000, 384), "head.bias": (1000,)}
    shapes |= {f"pos_embed_list.{i}": (1, places, 384) for i, places in enumerate((65, 101, 145, 197))}
    shapes |= {"patch_embed.proj.weight": (384, 64, 8, 8) if lvvit else (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    for i in range(16 if lvvit else 12):
        hidden = 1152 if lvvit else 1536
        block = {"attn.qkv.weight": (1152, 384), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "mlp.fc2.bias": (384,),
                 "mlp.fc1.weight": (hidden, 384), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (384, hidden)}  # fmt: skip
        block |= {f"norm{n}.{leaf}": (384,) for n in (1, 2) for leaf in ("weight", "bias")}
        block |= {} if lvvit else {"attn.qkv.bias": (1152,)}
        shapes |= {f"blocks.{i}.{leaf}": shape for leaf, shape in block.items()}
    shapes |= {"norm.weight": (384,), "norm.bias": (384,)}
    if lvvit:
        shapes |= {"aux_head.weight": (1000, 384), "aux_head.bias": (1000,), "patch_embed.conv1.weight": (64, 3, 7, 7)}
        for n in (1, 2, 3):
            shapes |= {f"patch_embed.bn{n}.{leaf}": (64,) for leaf in ("weight", "bias", "running_mean", "running_var")}
            shapes |= {f"patch_embed.bn{n}.num_batches_tracked": ()}
            shapes |= {f"patch_embed.conv{n}.weight": (64, 64, 3, 3)} if n > 1 else {}
    return shapes


@pytest.mark.parametrize(("name", "tensors", "parameters"), [(NAMES[0], 155, 22_170_088), (NAMES[1], 207, 26_271_248)])
def test_full_size_names_shapes_and_totals(name, tensors, parameters):
    model = ms.create_model(name)
    weights = ms.export_weights(model, "supervit")
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == official(name)
    assert len(weights) == tensors
    learnt = [tensor for key, tensor in weights.items() if "running" not in key and "tracked" not in key]
    assert sum(map(torch.numel, learnt)) == parameters == sum(p.numel() for p in model.parameters())
    counters = [tensor for key, tensor in weights.items() if "tracked" in key]
    assert all(tensor.dtype == torch.int64 and tensor.item() == 0 for tensor in counters) and len(counters) == (3 if tensors > 200 else 0)
    back = ms.convert(weights, source="supervit", name=name)
    assert back.config == model.config
    assert_same(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_round_trips_bit_for_bit(name, dtype):
    model = made(name).to(dtype)
    weights = ms.export_weights(model, "supervit")
    back = convert(weights, name)
    assert back.config == model.config and not back.training and all(p.requires_grad for p in back.parameters())
    assert_same(back.state_dict(), model.state_dict())
    assert_same(ms.export_weights(back, "supervit"), weights)
    weights["cls_token"].zero_()
    assert back.token.abs().sum() > 0, "copies, not views"
    bare = convert(weights, name, classes=0)
    assert bare.config.classes == 0 and not {key for key in ms.export_weights(bare, "supervit") if "head" in key}


def test_tables_find_their_sizes():
    """From small to large in the file; else as long as they must be."""
    weights = ms.export_weights(made(DEIT), "supervit")
    assert [weights[f"pos_embed_list.{i}"].shape[1] for i in range(3)] == [5, 10, 17]
    turned = convert(weights, sizes=(64, 32, 48))
    assert [len(table) for table in turned.positions] == [17, 5, 10]
    assert_same(ms.export_weights(turned, "supervit"), weights)
    shuffled = {**weights, **{f"pos_embed_list.{i}": weights[f"pos_embed_list.{j}"] for i, j in enumerate((2, 0, 1))}}
    assert_same(convert(shuffled).state_dict(), convert(weights).state_dict())
    alike = {"sizes": ((32, 48), 64, (48, 32))}  # two tables of one length: in the order of `sizes`
    model = made(DEIT, **alike)
    assert_same(convert(ms.export_weights(model, "supervit"), **alike).state_dict(), model.state_dict())


def test_statistics_for_each_size_begin_as_the_files():
    weights = ms.export_weights(made(NAMES[1]), "supervit")
    model = convert(weights, NAMES[1], stem_statistics="per-size")
    for i, norm in enumerate(model.sized_norms(), 1):
        assert norm.mean.shape == (3, 64) and all(torch.equal(mean, weights[f"patch_embed.bn{i}.running_mean"]) for mean in norm.mean)
    images, setting = torch.randn(2, 3, 64, 64), Setting(size=48, keep=0.5)
    with torch.no_grad():
        assert torch.equal(model(images, setting), convert(weights, NAMES[1])(images, setting))


# --- files as training leaves them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "averaged", "name", "usual"),
    [("model", "model_ema", NAMES[0], "raw"), ("state_dict", "state_dict_ema", NAMES[1], "averaged")],
)
def test_raw_and_averaged_weights(raw, averaged, name, usual, tmp_path):
    first = ms.export_weights(made(name), "supervit")
    second = moved(first)
    torch.save({raw: first, averaged: second, "optimizer": {"state": {}}, "epoch": 299}, tmp_path / "both.pth")
    expected = {False: first, True: second, None: second if usual == "averaged" else first}
    for ema, weights in expected.items():
        assert_same(ms.export_weights(convert(tmp_path / "both.pth", name, ema=ema), "supervit"), weights)
    for ema, only, there, asked in ((True, {raw: first}, raw, "moving average"), (False, {averaged: second}, averaged, "raw weights")):
        with pytest.raises(ValueError, match=rf"the state dict: no {asked}.* in it \(.*\), but {there}; leave `ema` out"):
            convert(only, name, ema=ema)
        assert convert(only, name).config.classes == 5
    with pytest.raises(ValueError, match="but one set of weights without a name; leave `ema` out"):
        convert(first, name, ema=True)
    assert_same(ms.export_weights(convert(first, name, ema=False), "supervit"), first)


def test_ema_of_other_layouts():
    first = ms.export_weights(ms.create_model("vit_tiny_patch16", depth=1), "timm")
    both, fields = {"state_dict": first, "state_dict_ema": moved(first)}, {"source": "timm", "name": "vit_tiny_patch16", "depth": 1}
    for ema, weights in ((None, first), (False, first), (True, moved(first))):
        assert torch.equal(ms.convert(both, ema=ema, **fields).norm.weight, weights["norm.weight"])


def test_prefix_of_parallel_training():
    weights = ms.export_weights(made(NAMES[1]), "supervit")
    wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
    assert_same(ms.export_weights(convert({"state_dict_ema": wrapped}, NAMES[1]), "supervit"), weights)
    with pytest.raises(ValueError, match=r"missing: cls_token .*[\s\S]*unknown: module\.cls_token"):
        convert({**wrapped, "more": torch.zeros(1)}, NAMES[1])


def test_a_checkpoint_with_its_command_line_is_read(tmp_path):
    weights = ms.export_weights(made(DEIT), "supervit")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "model_ema": moved(weights), "args": argparse.Namespace(lr=1e-3), "epoch": 299}, path)
    assert_same(ms.export_weights(convert(path), "supervit"), weights)
    assert_same(ms.export_weights(convert(path, ema=True), "supervit"), moved(weights))
    torch.save({"model": weights, "args": argparse.Namespace(callback=print)}, path)  # code, even behind a command line
    with pytest.raises(ValueError, match=r"refused, nothing was run: a pickle that names code .*print"):
        convert(path)


def test_numbers_of_numpy_in_a_checkpoint_are_refused_with_a_way_in(tmp_path):
    weights = ms.export_weights(made(DEIT), "supervit")
    path = tmp_path / "it's a checkpoint.pth"
    torch.save({"model": weights, "best": np.float64(0.8), "args": argparse.Namespace(lr=1e-3)}, path)
    with pytest.raises(ValueError, match=r"refused, nothing was run: a pickle that names code \(numpy\.\S+scalar\)") as error:
        convert(path)
    *_, command = str(error.value).splitlines()
    program, *arguments = shlex.split(command)
    assert program == "python" and "weights_only=True" in command
    subprocess.run([sys.executable, *arguments], check=True, timeout=120)
    assert_same(ms.export_weights(convert(tmp_path / "weights_of_it's a checkpoint.pth"), "supervit"), weights)
    torch.save({"model": weights, "best": print}, path)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and "print" in done.stderr


# --- a ViT as a SuperViT and back ------------------------------------------------------------------------------------------------

VIT = {key: value for key, value in SMALL.items() if key in ("width", "depth", "heads", "mlp_width")}


@pytest.mark.parametrize("source", VIT_SOURCES)
def test_a_vit_of_any_layout_becomes_one(source):
    vit = loud(ms.create_model("vit_base_patch16", **VIT, image_size=64, pool="token", classes=5)).double().eval()
    weights = ms.export_weights(vit, source)
    read = ms.convert(weights, source=source, name="vit_base_patch16", **VIT, image_size=64)
    model = ms.convert(weights, source=source, name=DEIT, **SMALL)
    assert model.config.sizes == (32, 48, 64) and model.config.drop_blocks == (1, 2) and not model.training
    assert (model.config.gelu, model.config.norm_eps) == (read.config.gelu, read.config.norm_eps)  # the source's
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), read(images), rtol=1e-12, atol=1e-12)
        small = images[..., :48, :48]
        torch.testing.assert_close(model(small), ms.transfer(read, image_size=48)(small), rtol=1e-12, atol=1e-12)
    back = ms.export_weights(model, source)
    assert_same(back, ms.export_weights(to_vit(model), source))
    with torch.no_grad():
        again = ms.convert(back, source=source, name="vit_base_patch16", **VIT, image_size=64)
        torch.testing.assert_close(again(images), model(images), rtol=1e-12, atol=1e-12)


def test_fields_and_another_image_size():
    vit = loud(ms.create_model("vit_base_patch16", **VIT, image_size=96, pool="token", classes=5, gelu="exact")).eval()
    weights = ms.export_weights(vit, "timm")
    with pytest.raises(ValueError, match=rf"does not hold {DEIT} in the layout of timm[\s\S]*for 6 x 6 patches: pass image_size=96"):
        ms.convert(weights, source="timm", name=DEIT, **SMALL)
    model = ms.convert(weights, source="timm", name=DEIT, **SMALL, image_size=96, registers=1, keeps=(0.25, 1.0), classes=0)
    assert (model.config.registers, model.config.keeps, model.config.classes) == (1, (0.25, 1.0), 0)
    whole = ms.convert(weights, source="timm", name=DEIT, **SMALL, image_size=96)
    expected = to_supervit(ms.convert(weights, source="timm", name="vit_base_patch16", **VIT, image_size=96), whole.config)
    assert_same(whole.state_dict(), expected.state_dict())
    turned = ms.convert(weights, source="timm", name=DEIT, **SMALL, image_size=96, gelu="tanh", norm_eps=1e-3)
    assert (turned.config.gelu, turned.config.norm_eps) == ("tanh", 1e-3)


def test_vits_that_cannot():
    gap = ms.export_weights(ms.create_model("vit_base_patch16", **VIT, image_size=64, pool="gap"), "timm")
    with pytest.raises(ValueError, match="attention of its class token; this ViT has pool=gap"):
        ms.convert(gap, source="timm", name=DEIT, **SMALL)
    with pytest.raises(ValueError, match=r"supervit_lvvit_small has stem=conv, qkv_bias=False.*take a supervit_deit_"):
        ms.convert(gap, source="timm", name=NAMES[1], **SMALL)
    with pytest.raises(ValueError, match=r"a ViT has no stem=conv, .*token_head=0\.25"):
        ms.export_weights(made(NAMES[1]), "timm")


# --- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_misfit_is_named_at_once(name):
    weights = ms.export_weights(made(name), "supervit")
    del weights["blocks.3.mlp.fc1.weight"]
    lines = ["missing: blocks.3.mlp.fc1.weight (20, 12)", "unknown: extra.weight (2, 2)", "shape: pos_embed_list.1 is (7, 12)",
             "unknown: epoch int", "dtype: norm.bias is torch.int8"]  # fmt: skip
    weights |= {"extra.weight": torch.ones(2, 2), "pos_embed_list.1": torch.ones(1, 7, 12), "epoch": 3, "norm.bias": torch.zeros(12).char()}
    if "lvvit" in name:
        del weights["aux_head.bias"]
        weights["patch_embed.bn2.running_var"] = torch.ones(3)
        lines += ["missing: aux_head.bias (5,)", "shape: patch_embed.bn2.running_var is (1, 3), the model's is (1, 64)"]
    with pytest.raises(ValueError) as error:
        convert(weights, name)
    for line in lines:
        assert line in str(error.value)


def test_hints():
    weights = ms.export_weights(made(DEIT), "supervit")
    with pytest.raises(ValueError, match=r"are for 3 square image sizes: pass sizes=\(32, 48, 64\)"):
        convert(weights, sizes=(32, 64))
    with pytest.raises(ValueError) as error:
        convert({**weights, "extra": torch.ones(1)})
    assert "pass sizes" not in str(error.value)
    tiny = ms.export_weights(ms.create_model("supervit_deit_tiny", depth=2, drop_blocks=(1,)), "supervit")
    with pytest.raises(ValueError) as error:
        ms.convert(tiny, source="timm", name="vit_small_patch16", depth=2)
    assert "missing: pos_embed (196, 384)" in str(error.value) and "pass image_size" not in str(error.value)
    for source, name in (("supervit", DEIT), ("timm", "supervit_deit_tiny")):
        with pytest.raises(ValueError, match='It fits source="supervit", name="supervit_deit_tiny"'):
            ms.convert(tiny, source=source, name=name, depth=2, drop_blocks=(1,))
    vit = ms.export_weights(ms.create_model("vit_tiny_patch16", pool="token"), "timm")
    with pytest.raises(ValueError, match='It fits source="timm", name="supervit_deit_tiny"'):
        ms.convert(vit, source="supervit", name="supervit_deit_tiny")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"registers": 2}, "have no registers=2; keep it with"),
        ({"positions": "interpolated"}, "have no positions=interpolated; keep it with"),
        ({"stem_statistics": "per-size"}, "have no stem_statistics=per-size; keep it with"),
    ],
)
def test_nets_that_the_layout_cannot_hold(fields, message):
    with pytest.raises(ValueError, match=message):
        ms.export_weights(made(NAMES[1], **fields), "supervit")


def test_unknown_sources():
    model = made(DEIT)
    with pytest.raises(ValueError, match="unknown source `supervits` of a SuperViT; did you mean `supervit`"):
        ms.export_weights(model, "supervits")
    with pytest.raises(ValueError, match="unknown source `official` of a SuperViT; known: big_vision, supervit, timm, transformers"):
        ms.convert({}, source="official", name=DEIT)
    with pytest.raises(ValueError, match="unknown source `supervit` of a ViT"):
        ms.export_weights(to_vit(model), "supervit")


# --- the command line ----------------------------------------------------------------------------------------------------------------


def test_converted_and_transferred_from_the_command_line(tmp_path, capsys):
    weights = ms.export_weights(loud(ms.create_model("supervit_deit_tiny", sizes=(32, 64), classes=3)), "supervit")
    torch.save({"model": weights, "model_ema": moved(weights)}, tmp_path / "both.pth")
    flags = ["--source", "supervit", "--name", "supervit_deit_tiny", "--sizes", "32", "64"]
    main(["convert", str(tmp_path / "both.pth"), *flags, "--ema", "True", "--out", str(tmp_path / "m")])
    model = ms.load(tmp_path / "m")
    assert model.preprocess.image_size == (64, 64)
    assert_same(ms.export_weights(model, "supervit"), moved(weights))
    main(["transfer", str(tmp_path / "m"), "--sizes", "32", "48", "96"])
    assert "sizes (32, 64) -> (32, 48, 96)" in capsys.readouterr().out
    new = ms.load(tmp_path / "m_32_48_96")
    assert new.preprocess.image_size == (96, 96) and torch.equal(new.positions[0], model.positions[0])
    images, setting = torch.randn(1, 3, 96, 96), Setting(size=32, keep=0.5)
    with torch.no_grad():
        assert torch.equal(new(images, setting), model(images, setting)) and new(images, Setting(size=48)).shape == (1, 3)
    for arguments, message in (([], "give --image-size, or of a SuperViT --sizes"), (["--image-size", "96"], "give `sizes`")):
        with pytest.raises(SystemExit):
            main(["transfer", str(tmp_path / "m"), *arguments])
        assert message in capsys.readouterr().err
    vit = ms.export_weights(ms.create_model("vit_tiny_patch16", image_size=64, classes=3, pool="token"), "timm")
    torch.save(vit, tmp_path / "vit.pth")
    flags = ["--source", "timm", "--name", "supervit_deit_tiny", "--image-size", "64", "--sizes", "48", "96"]
    main(["convert", str(tmp_path / "vit.pth"), *flags, "--out", str(tmp_path / "v")])
    assert ms.load(tmp_path / "v")(images, Setting(size=48, keep=0.7)).shape == (1, 3)
