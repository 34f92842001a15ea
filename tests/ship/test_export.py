"""A file is what the net is: read back, run by its own engine, at other batch sizes than it was made with."""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

import manyscale as ms
from manyscale.cli import main
from manyscale.config import Augment, Optim, Preprocess, Setting, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.models import build, save, set_attention
from manyscale.ship import export as exporting
from manyscale.ship.export import CARD, FILES, export, open_engine
from manyscale.train.loop import train
from tests.conftest import loud, shorter

SWIN = {"image_size": 32, "patch": 4, "window": 4, "width": 16, "depths": (2, 2), "heads": (1, 2), "classes": 7, "drop_path": 0.0}
TABLE = {"similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"}
VIT = {"image_size": 32, "patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "classes": 7}
SUPER = {"sizes": (16, 32), "patch": 8, "width": 16, "depth": 3, "heads": 2, "mlp_width": 32, "drop_blocks": (1, 2), "classes": 7}
LABELLED = {"stem": "conv", "stem_width": 8, "token_head": 0.5}
CASES = {
    "v2": (SwinConfig(**SWIN), None),
    "v2 at a larger size and window": (SwinConfig(**SWIN), "48/window=6"),
    "v2 padded": (SwinConfig(**SWIN), "40x36"),
    "v1": (SwinConfig(**SWIN, **TABLE), None),
    "clips": (SwinConfig(**{**SWIN, "image_size": (4, 16, 32), "patch": (2, 4, 4), "window": (2, 4, 4)}), None),
    "vit token": (ViTConfig(**VIT, pool="token"), None),
    "vit map": (ViTConfig(**VIT, pool="map"), None),
    "deit": (SuperViTConfig(**SUPER), "32/0.7"),
    "deit, small and fused": (SuperViTConfig(**SUPER, fuse=True), "16/0.5"),
    "lvvit": (SuperViTConfig(**SUPER, **LABELLED), "32/0.7"),
}


def net_of(name: str):
    config, setting = CASES[name]
    return loud(build(config)).eval(), setting and Setting.read(setting)


def shape_of(folder) -> list[int]:
    return json.loads((folder / CARD).read_text())["images"][1:]


def needs(format: str) -> None:
    for package in exporting.NEEDS[format]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'manyscale[export]'")


# openvino goes through the other two; the rest, of 5 to 10 seconds each, is `-m slow`
QUICK = [("openvino", "v2"), ("openvino", "deit"), ("onnx", "vit map"), ("torch", "v2 padded")]
MORE = [*(("openvino", name) for name in CASES), *(("onnx", name) for name in CASES), *(("torch", name) for name in CASES)]


@pytest.mark.parametrize(("format", "name"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in QUICK)])
@torch.no_grad()
def test_a_file_answers_as_the_net(format, name, tmp_path):
    needs(format)
    net, setting = net_of(name)
    written = export(net, tmp_path, format=format, setting=setting)
    assert written.difference < 2e-6
    engine = open_engine(tmp_path, threads=1)
    for count in (1, 5):
        images = torch.randn(count, *json.loads((tmp_path / CARD).read_text())["images"][1:])
        expected = net(images) if setting is None else net(images, setting=setting)
        assert expected.std() > 0.05, "a silent net agrees with anything"
        torch.testing.assert_close(engine(images), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("format", "dtype", "low", "high"),
    [
        pytest.param("torch", "bfloat16", 1e-4, 0.05, marks=pytest.mark.slow),
        ("onnx", "float16", 1e-6, 0.01),
        pytest.param("openvino", "float16", 1e-6, 0.01, marks=pytest.mark.slow),
        pytest.param("openvino", "bfloat16", 0, 0.05, marks=pytest.mark.slow),  # 0: on a CPU that has no bfloat16
    ],
)
def test_other_types(format, dtype, low, high, tmp_path):
    needs(format)
    net, _ = net_of("v2")
    before = net.state_dict()["head.weight"].clone()
    written = export(net, tmp_path, format=format, dtype=dtype)
    assert low <= written.difference < high
    assert written.card["dtype"] == dtype and torch.equal(net.head.weight, before), "the net keeps its own type"
    assert open_engine(tmp_path)(torch.zeros(2, 3, 32, 32)).dtype == torch.float32


def test_equal_scores_keep_the_earlier_token(tmp_path):
    """Which of equals stays must not depend on the engine: with q at zero all patches score alike, and those of the top rows stay."""
    needs("openvino")
    net, setting = net_of("deit")
    with torch.no_grad():
        for block in net.blocks:
            block.attention.qkv.weight[:16] = 0
            block.attention.qkv.bias[:16] = 0
    assert export(net, tmp_path / "a name, with a comma", format="openvino", setting=setting).difference < 2e-6


def test_engines_are_given_what_they_run_quickly(tmp_path):
    """Of a shifted block: a look-up in, one out; keys transposed once; norms of tokens in a row; nothing compared, cut or rolled."""
    needs("onnx")
    import onnx

    net, _ = net_of("v2")
    export(net, tmp_path, format="onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / FILES["onnx"])).graph
    ops = Counter(node.op_type for node in graph.node)
    assert not ops.keys() & {"GatherND", "ScatterND", "Less", "Concat", "Split", "TopK"}
    assert ops["Slice"] == 4 * 3 and ops["Where"] == 1  # q, k and v; a mask into its bias, which is of weights alone
    # patches; of 4 blocks qkv, keys, heads and position bias; into windows and out where none is shifted; merging
    assert ops["Transpose"] == 1 + 4 * 4 + 3 * 2 + 1
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[node.input[0]] for node in graph.node if node.op_type == "LayerNormalization"} == {3}


# --- 8 bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8_says_what_it_costs(format, micro, tmp_path, capsys):
    needs(format)
    pytest.importorskip("nncf", reason="nncf is not installed: pip install 'manyscale[export]'")
    net = replace(micro.model, width=16, depths=(1, 1), heads=(1, 2), mlp_ratio=2.0, drop_path=0.0)
    learns = replace(micro, model=net, augment=Augment(scale=(0.8, 1.0)), optim=Optim(lr=8e-3), batch=64, accumulate=1)
    train(shorter(learns, epochs=5))
    main(["export", micro.out, "--format", format, "--int8", "--pictures", "100"])
    said, card = capsys.readouterr().out, json.loads((tmp_path / "run" / "export" / f"{format}-int8" / CARD).read_text())
    assert f"accuracy on 100 pictures of digits, val: {card['accuracy']['net']:.4f} in float32" in said
    assert card["accuracy"]["net"] > 0.3 and abs(card["accuracy"]["net"] - card["accuracy"]["file"]) < 0.1 and card["difference"] > 1e-4
    quantised = tmp_path / "run" / "export" / f"{format}-int8" / FILES[format]
    assert b"QuantizeLinear" in quantised.read_bytes() or b"FakeQuantize" in quantised.read_bytes()


# --- What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit", {"setting": Setting(size=20)}, "20"),
        ("deit", {"setting": Setting(size=24)}, "24"),
        ("v1", {"setting": Setting(size=48, window=6)}, "field `window`: 48/window=6: this net's bias is a table"),
        ("vit map", {"setting": Setting(size=32, keep=0.5)}, "a ViT keeps every token"),
        ("v2", {"format": "onnx", "dtype": "bfloat16"}, "field `dtype`: ONNX Runtime has few operations in bfloat16"),
        ("v2", {"calibration": []}, "field `int8`: int8 is made of float32 in ONNX or OpenVINO, not of float32 in torch"),
        ("v2", {"format": "onnx", "dtype": "float16", "calibration": []}, "field `int8`: .* leave --dtype out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(net_of(name)[0], tmp_path / "out", **{"format": "torch", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_says_how_to_install(format, package, tmp_path, monkeypatch):
    for other in exporting.NEEDS[format]:
        if other != package:
            pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"field `format`: {format} needs {package}: pip install 'manyscale\[export\]'"):
        export(net_of("v2")[0], tmp_path / "out", format=format)


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    net, _ = net_of("v2")
    first = export(net, tmp_path / "out", format="torch")
    kept = {file.name: file.read_bytes() for file in first.folder.iterdir()}
    true = exporting.open_engine
    monkeypatch.setattr(exporting, "open_engine", lambda folder: lambda images: true(folder)(images) * 1.01)
    with pytest.raises(ValueError, match=r"field `format`: logits of the torch file differ by 0\.0\d of the largest; it was not written"):
        export(net, tmp_path / "out", format="torch")
    assert {file.name: file.read_bytes() for file in first.folder.iterdir()} == kept
    monkeypatch.setattr(exporting, "write_engine", lambda *given, **named: (given[2] / "half").touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(net, tmp_path / "new" / "below", format="torch")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: set_attention(net, "sequential"), "field `attention`: sequential is an operation of this package alone"),
        (lambda net: net.double(), "field `model`: its weights are torch.float64 on cpu; an export is made of float32"),
        (lambda net: net.to("meta"), "field `model`: its weights are torch.float32 on meta; an export is made of float32 on the CPU"),
    ],
)
def test_nets_that_cannot_go_out_say_what_to_do(spoil, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(spoil(net_of("v2")[0]), tmp_path / "out", format="torch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "onxx"}, "field `format`: 'onxx' is none of torch"), ({"dtype": "half"}, "field `dtype`: 'half' is none of float32")],
)
def test_words_that_are_not_known(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(net_of("v2")[0], tmp_path / "out", **{"format": "torch", **options})


def test_a_net_that_has_not_learnt_goes_out(tmp_path):
    """A fresh ViT's classifier is zero, and so are its logits: nothing to divide a difference by."""
    assert export(build(ViTConfig(**VIT)), tmp_path, format="torch").difference == 0


def test_a_wrong_split_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    save(net_of("v2")[0], tmp_path / "net")
    monkeypatch.setattr(exporting, "calibration", lambda *given: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "net"), "--int8", "--data", "digits", "--split", "vall"])
    assert left.value.code == 2 and "vall" in capsys.readouterr().err


def test_int8_wants_pictures(tmp_path):
    needs("openvino")
    pytest.importorskip("nncf", reason="nncf is not installed: pip install 'manyscale[export]'")
    with pytest.raises(ValueError, match="field `calibration`: no images to choose the ranges of int8 on"):
        export(net_of("v2")[0], tmp_path, format="openvino", calibration=iter([]))


@pytest.mark.parametrize("harm", ["gone", "cut short", "a type is missing"])
@pytest.mark.parametrize("format", FILES)
def test_a_damaged_export_is_named(format, harm, tmp_path):
    for package in (*exporting.NEEDS[format],):
        pytest.importorskip(package)
    file = tmp_path / FILES[format]
    (tmp_path / CARD).write_text(json.dumps({"format": format} | ({} if harm == "a type is missing" else {"dtype": "float32"})))
    if harm != "gone":
        file.write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: {format} cannot run it .*; export the net again"):
        open_engine(tmp_path)


def test_what_is_half_written_is_no_export(tmp_path, monkeypatch):
    """Where a file cannot be put in its place, no card stands beside: neither the old one nor the new."""
    net, true = net_of("v2")[0], os.replace
    export(net, tmp_path, format="torch")

    def full(source, target):
        if target == tmp_path / FILES["torch"]:
            raise OSError("no space left")
        true(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        export(net, tmp_path, format="torch")
    assert [file.name for file in tmp_path.iterdir()] == [FILES["torch"]]


def test_a_folder_without_an_export_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"export\.json: cannot be read"):
        open_engine(tmp_path)
    (tmp_path / CARD).write_text('{"format": "gguf"}')
    with pytest.raises(ValueError, match="field `format`: 'gguf' is none of torch, onnx, openvino"):
        open_engine(tmp_path)


def test_the_card_says_how_pictures_are_prepared(tmp_path):
    net, setting = net_of("v2 at a larger size and window")
    net.preprocess, net.labels = Preprocess(image_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)), tuple("abcdefg")
    ms.save(net, tmp_path / "net")
    main(["export", str(tmp_path / "net"), "--format", "torch", "--setting", str(setting)])
    card = json.loads((tmp_path / "net" / "export" / "torch-48-window=6" / CARD).read_text())
    assert card["images"] == ["batch", 3, 48, 48] and card["labels"] == list("abcdefg") and card["setting"] == "48/window=6"
    assert card["preprocess"]["image_size"] == [48, 48] and card["preprocess"]["mean"] == [0.5, 0.4, 0.3]
