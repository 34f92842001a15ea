"""A measure is fair where the nets are the same and take turns."""

import json
import re
from dataclasses import replace

import pytest
import torch

from manyscale.cli import main
from manyscale.config import Setting, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.models import build
from manyscale.plan.count import count
from manyscale.ship import bench as benching
from manyscale.ship import peers
from manyscale.ship.bench import OURS, bench, draw
from manyscale.ship.peers import PEERS, NoSuchNet, peer, randomise

CPU = torch.device("cpu")
V2 = SwinConfig(image_size=64, patch=4, window=4, width=16, depths=(2, 2), heads=(2, 4), classes=7, drop_path=0.0)
V1 = SwinConfig(
    image_size=64, patch=4, window=4, width=16, depths=(2, 2), heads=(2, 4), classes=7, drop_path=0.0, similarity="dot", norm="pre",
    bias="table", merge_norm="before",
)  # fmt: skip
VIT = ViTConfig(image_size=32, patch=8, width=16, depth=2, heads=2, mlp_width=32, classes=7, pool="token", gelu="tanh")
SUPER = SuperViTConfig(sizes=(16, 32), patch=8, width=16, depth=3, heads=2, mlp_width=32, drop_blocks=(1,), classes=7)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("config", [V2, V1, VIT, SUPER], ids=["v2", "v1", "vit", "supervit"])
@torch.no_grad()
def test_peers_compute_the_same(config, name):
    ours = randomise(build(config)).eval()
    images = torch.randn(2, 3, *config.size)
    if name == "torchvision" and not isinstance(config, SwinConfig):
        with pytest.raises(NoSuchNet, match="another layout"):
            peer(name, ours)
        return
    pytest.importorskip(name, reason=f"{name} is not installed: pip install manyscale[peers]")
    expected = ours(images)
    assert expected.std() > 0.1, "a silent net agrees with anything"
    torch.testing.assert_close(peer(name, ours)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_table_has_every_net(precision, training, tmp_path):
    said: list[str] = []
    found = bench(
        "tiny",
        V2,
        ("torchvision", "torchvision"),
        batch=2,
        device=CPU,
        precision=precision,
        training=training,
        rounds=2,
        report=said.append,
    )
    assert [row.name for row in found.rows] == [OURS, "torchvision"] and not said and found.product > 0
    for row in found.rows:
        assert row.p25 <= row.p50 <= row.p75 and row.difference < 1e-4
        assert row.macs == count(V2).macs * 2 * (3 if training else 1)
    ours, other = found.rows
    assert found.ratio(other) == 1 and found.ratio(ours) == other.p50 / ours.p50
    draw(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_compiled_nets_are_rows_of_their_own(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiled.append(net) or net)
    found = bench("tiny", V2, ("torchvision",), batch=1, device=CPU, compiled=True, rounds=1)
    assert [row.label for row in found.rows] == [OURS, f"{OURS}, compiled", "torchvision", "torchvision, compiled"] and len(compiled) == 2
    assert all(found.fastest(way).compiled == way and found.fastest(way).name == "torchvision" for way in (False, True))


@pytest.mark.parametrize("training", [False, True])
def test_paths_are_rows_of_their_own(training):
    paths = ("auto", "sequential", "sequential", "reference")
    found = bench("tiny", V2, ("torchvision",), batch=1, device=CPU, training=training, paths=paths, rounds=1)
    assert [row.name for row in found.rows] == [OURS, f"{OURS}, sequential", f"{OURS}, reference", "torchvision"]
    assert [row.is_ours for row in found.rows] == [True, True, True, False] and found.fastest(False).name == "torchvision"
    assert len({row.macs for row in found.rows}) == 1
    with pytest.raises(ValueError, match="kernel needs Triton and a CUDA device"):
        bench("tiny", V2, ("torchvision",), batch=1, device=CPU, paths=("kernel",), rounds=1)


def test_a_setting_is_beside_the_whole_net():
    pytest.importorskip("timm", reason="timm is not installed: pip install manyscale[peers]")
    found = bench("super", SUPER, ("timm",), batch=1, device=CPU, setting=Setting(size=16, keep=0.5), rounds=1)
    assert [row.macs for row in found.rows] == [count(SUPER, Setting(size=16, keep=0.5)).macs, count(SUPER).macs]


def test_nets_that_answer_otherwise_are_no_measure(monkeypatch):
    real = benching.peer

    @torch.no_grad()
    def wrong(name, model):
        built = real(name, model)
        built.head.bias.add_(0.01)
        return built

    monkeypatch.setattr(benching, "peer", wrong)
    with pytest.raises(ValueError, match=r"torchvision answers otherwise than this net, by 0\.0"):
        bench("tiny", V2, ("torchvision",), batch=1, device=CPU, rounds=1)


def test_what_is_refused(monkeypatch, capsys):
    with pytest.raises(ValueError, match="field `against`: unknown package `timmm`; did you mean `timm`"):
        bench("tiny", V2, ("timmm",), batch=1, device=CPU)
    said: list[str] = []
    with pytest.raises(ValueError, match="field `against`: none of torchvision has this net"):
        bench("tiny", VIT, ("torchvision",), batch=1, device=CPU, report=said.append)
    assert said == ["left out torchvision: torchvision's ViT has another layout of weights"]
    said.clear()  # a size that windows do not fill: peers attend the padding
    with pytest.raises(ValueError, match="field `against`: none of torchvision has this net"):
        bench("tiny", replace(V2, image_size=V2.image_size + 4), ("torchvision",), batch=1, device=CPU, report=said.append)
    assert said == ["left out torchvision: it attends padding, this net masks it; give an image size that windows fill, such as 32"]
    for field in ("batch", "rounds"):
        with pytest.raises(ValueError, match=f"field `{field}`: 0 must be at least 1"):
            bench("tiny", V2, ("torchvision",), device=CPU, **{"batch": 1, "rounds": 1, field: 0})

    def missing(config):
        raise ImportError("No module named 'timm'")

    monkeypatch.setitem(peers.PEERS, "timm", missing)
    with pytest.raises(ValueError, match=r"field `against`: timm is not installed: pip install manyscale\[peers\]"):
        bench("tiny", V2, ("timm",), batch=1, device=CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swinv2_tinny"], "did you mean `swinv2_tiny`"),
        (["swinv2_tiny", "--against", "jax"], "unknown package `jax`"),
        (["swinv2_tiny", "--device", "cuda:7"], "field `device`: 'cuda:7' cannot be used here"),
        (["swinv2_tiny", "--device", "meta"], "field `device`: 'meta' computes nothing; give cpu"),
        (["swinv2_tiny", "--device", "cpu:9"], "field `device`: 'cpu:9' computes nothing; give cpu"),
        (["supervit_lvvit_small", "--against", "timm"], "none of timm has this net"),
        (["swinv2_tiny", "--setting", "160/0.7"], "field `setting`: swinv2_tiny has no settings"),
        (["swinv2_tiny", "--threads", "-1"], "field `threads`: -1"),
    ],
)
def test_calls_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_the_table_as_it_is_printed(tmp_path, capsys):
    main(["bench", "swinv2_tiny", "--against", "torchvision", "--image-size", "64", "--window", "2", "--batch", "1", "--rounds", "1",
          "--out", str(tmp_path / "b")])  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"^torchvision .* 1\.00 ", out, re.MULTILINE) and "a large matrix product" in out
    values = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert values["model"] == "swinv2_tiny" and [row["name"] for row in values["rows"]] == [OURS, "torchvision"]
    assert values["manyscale"].startswith("0.") and values["date"] and values["command"]
    assert (tmp_path / "b" / "bench.png").exists()
