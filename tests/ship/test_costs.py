"""`plan cost` and the verbs that use its answers: what is measured, printed, written and refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import manyscale as ms
from manyscale.cli import main
from manyscale.config import Input, Preprocess, Run, Setting, SuperViTConfig, to_dict
from manyscale.models import build
from manyscale.plan.count import count
from manyscale.plan.switch import read_costs
from manyscale.ship import measure as measuring
from manyscale.ship.cascade import read_cascade
from manyscale.ship.evaluate import evaluate
from manyscale.ship.measure import Allocations, device_name, fingerprint, measure, size_of
from manyscale.storage import write_json
from tests.conftest import loud

CPU = torch.device("cpu")
TINY = SuperViTConfig(sizes=(8, 16), keeps=(0.5, 1.0), patch=4, width=16, depth=3, heads=2, mlp_width=24, drop_blocks=(1, 2), classes=10)
QUICK = ["--rounds", "2", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def run(tmp_path):
    """A run's folder: a random net that knows the digits' labels, and a recipe that names them."""
    model = loud(build(TINY))
    model.preprocess = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_ratio=1.0)
    model.labels = tuple("0123456789")
    ms.save(model, tmp_path / "best")
    write_json(tmp_path / "best" / "recipe.json", to_dict(Run(recipe="digits", input=Input(data="digits", statistics="half"))))
    return tmp_path


def said(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    words = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in words.err, words
    return words.err


def test_settings_take_turns_in_an_order_drawn_anew(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(measuring, "run_at", lambda model, images, setting: calls.append((setting, images.shape)))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock) ** 2 / 1e3)
    settings = TINY.settings
    found = measure(build(TINY), settings, batch=5, device=CPU, rounds=7, seed=1)
    assert calls[::2][: 4 * (measuring.WARM_UP + 7)] == calls[1::2][: 4 * (measuring.WARM_UP + 7)], "each twice in a row"
    rounds = [calls[2 * i : 2 * i + 8 : 2] for i in range(0, 4 * (measuring.WARM_UP + 7), 4)]
    assert all({setting for setting, _ in one} == set(settings) for one in rounds), "each in every round"
    assert len({tuple(setting for setting, _ in one) for one in rounds}) > 3, "not always in one order"
    assert all(shape == (5, 3, setting.size, setting.size) for setting, shape in calls)
    generator, at, seconds = random.Random(1), 0, {setting: [] for setting in settings}
    for number in range(measuring.WARM_UP + 7):
        for setting in generator.sample(list(settings), 4):
            if number >= measuring.WARM_UP:
                seconds[setting].append(((at + 1) ** 2 - at**2) / 1e3)
            at += 2
    for setting in settings:
        assert found[setting].p50 == pytest.approx(np.median(seconds[setting]))
        assert found[setting].p50 < found[setting].p95 == pytest.approx(np.quantile(seconds[setting], 0.95))


def test_the_most_memory_at_once():
    """64 floats come, 64 more while they are needed, a view costs nothing, and then both go."""
    x = torch.ones(8, 8)
    with Allocations() as held:
        y = x * 2
        assert held.now == held.peak == 256
        y.t().add_(1)
        assert held.now == 256, "neither views nor what is written in place"
        z = y + 1
        assert held.now == held.peak == 512
        del y, z
        assert held.now == 0 and held.peak == 512
        assert x.view(64)[0] == 1


def test_memory_grows_with_the_batch_and_the_size():
    model = loud(build(TINY))
    small, large = (measure(model, TINY.settings, batch=batch, device=CPU, rounds=1) for batch in (1, 4))
    peaks = [small[setting].peak for setting in (Setting(size=8), Setting(size=16))]
    tokens = 16 + 1
    assert tokens * TINY.mlp_width * 4 < peaks[1] < 60 * tokens * TINY.mlp_width * 4
    assert peaks[0] < peaks[1] and all(3 * small[setting].peak < large[setting].peak for setting in TINY.settings)


def test_measuring_a_compiled_net(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = measure(loud(build(TINY)), TINY.settings, batch=1, device=CPU, compiled=True, rounds=1)
    assert set(found) == set(TINY.settings) and all(timing.peak is None for timing in found.values())


def test_what_cannot_be_measured():
    for fields, message in (({"batch": 0}, "`batch`: 0"), ({"batch": 1, "rounds": 0}, "`rounds`: 0")):
        with pytest.raises(ValueError, match=message):
            measure(build(TINY), TINY.settings, device=CPU, **fields)


def test_a_fingerprint_is_of_every_weight_and_of_the_configuration():
    model = loud(build(TINY))
    first = fingerprint(model)
    assert first == fingerprint(loud(build(TINY))) and len(first) == 32
    assert fingerprint(loud(build(replace(TINY, norm_eps=1e-5)))) != first
    for parameter in model.parameters():
        with torch.no_grad():
            before = parameter.flatten()[-1].item()
            parameter.view(-1)[-1] = before + 1
            assert fingerprint(model) != first
            parameter.view(-1)[-1] = before
    assert fingerprint(model) == first
    scalar = nn.Module()
    scalar.config, scalar.weight = TINY, nn.Parameter(torch.tensor(1.0))
    assert len(fingerprint(scalar)) == 32
    assert device_name(CPU) and size_of(TINY, Setting()) == (16, 16)


def test_the_verb(run, capsys):
    words = said(capsys, "plan", "cost", run, "--batch", "2", "3", *QUICK, "--throughput", "0.001", "--cascade")
    tables = read_costs(run / "costs.json")
    assert [table.batch for table in tables.values()] == [2, 3] and (run / "costs.png").stat().st_size > 10_000
    table = next(iter(tables.values()))
    assert [str(cell.setting) for cell in table.cells] == ["8/0.5", "8/1", "16/0.5", "16/1"] and table.pictures == 359
    assert table.key in words.out and "the least speed-up / GFLOPs saved is " in words.out
    for cell in table.cells:
        assert cell.macs == count(TINY, cell.setting).macs and 0 < cell.p50 <= cell.p95 and cell.peak
        assert f"{1e3 * cell.p50:.2f}" in words.out and f"{cell.accuracy:.2%}" in words.out
        scores = evaluate(str(run), lambda *bad: None, setting=str(cell.setting), workers=0, device="cpu")
        assert cell.accuracy == pytest.approx(scores["accuracy"])
        assert cell.ece <= cell.raw_ece + 0.05 and cell.temperature > 0 and abs(cell.reported - cell.accuracy) < 0.1
    best = max(cell.accuracy for cell in table.cells)
    assert words.out.count(f"0.001 images/s at batch {2}:") == 1 and f"top-1 {best:.2%};" in words.out
    cascade = read_cascade(run / "cascade.json", table.model)
    assert cascade.aim == "0.001 images/s" and cascade.place == table.key and cascade.data == "digits, val"
    assert f"top-1 {cascade.accuracy:.2%} at {cascade.cost} on average" in words.out and "run on real batches" in words.out
    assert "wrote costs.json, costs.png, cascade.json" in words.err

    before, batches = (run / "costs.json").read_bytes(), list(tables)
    words = said(
        capsys, "plan", "cost", run, "--measured", run / "costs.json", "--batch", "3", "--gflops", "1", "--out", run / "later", *QUICK
    )
    assert batches[1] in words.out and batches[0] not in words.out and "1 GFLOPs at batch 3: " in words.out
    assert (run / "costs.json").read_bytes() == before and [file.name for file in (run / "later").iterdir()] == ["costs.png"]
    said(capsys, "plan", "cost", run, "--batch", "1", *QUICK)
    assert [table.batch for table in read_costs(run / "costs.json").values()] == [2, 3, 1], "one more table in the same file"


def test_predict_and_eval_at_a_setting_and_through_a_cascade(run, capsys):
    from manyscale.data.sources import open_split

    source = open_split(Input(data="digits"), "val", 0).source
    files = []
    for index in range(12):
        files.append(run / f"{index:02d}.png")
        source.read(index).save(files[-1])
    words = said(capsys, "predict", run, *files, "--setting", "8/0.5", "--json-lines", "--device", "cpu")
    assert (run / "predictions" / "kept.png").stat().st_size > 5000
    rows = [json.loads(line) for line in words.out.splitlines()]
    assert rows[0].keys() == {"path", "top"} and len(rows) == 12
    (run / "predictions" / "kept.png").unlink()
    whole = [json.loads(line) for line in said(capsys, "predict", run, *files, "--json-lines", "--device", "cpu").out.splitlines()]
    assert not (run / "predictions" / "kept.png").exists(), "nothing left"
    assert whole != rows
    assert "no such file; `manyscale plan cost RUN --cascade` writes one" in refused(capsys, "predict", run, *files, "--cascade")

    said(capsys, "plan", "cost", run, *QUICK, "--cascade")
    chosen = read_cascade(run / "cascade.json", fingerprint(ms.load(run)))
    half = float(np.median([row["top"][0]["probability"] for row in rows]))
    both = replace(chosen, settings=(Setting(size=8, keep=0.5), Setting(size=16)), temperatures=(1.0, 1.0), thresholds=(half,))
    write_json(run / "mine.json", to_dict(both))
    words = said(capsys, "predict", run, *files, "--json-lines", "--device", "cpu", "--cascade", run / "mine.json")
    told = [json.loads(line) for line in words.out.splitlines()]
    assert {row["setting"] for row in told} == {"8/0.5", "16/1"}, "some were sure enough"
    for row, cheap, dear in zip(told, rows, whole, strict=True):
        source_row = cheap if row["setting"] == "8/0.5" else dear
        assert row["top"][0]["label"] == source_row["top"][0]["label"]
        assert row["top"][0]["probability"] == pytest.approx(source_row["top"][0]["probability"], abs=2e-6)
        assert (cheap["top"][0]["probability"] >= half) == (row["setting"] == "8/0.5")
    said(capsys, "predict", run, *files, "--cascade", "--device", "cpu")
    assert "give --setting or --cascade" in refused(capsys, "predict", run, *files, "--cascade", "--setting", "8")
    assert "field `cascade`: give one file" in refused(capsys, "predict", run, files[0], "--cascade", "a.json", files[1])
    words = said(capsys, "eval", run, "--setting", "8/0.5", "--workers", "0", "--device", "cpu", "--json-lines")
    assert json.loads(words.out)["setting"] == "8/0.5"
    assert f"{run} at 8/0.5 on val: top-1" in said(capsys, "eval", run, "--setting", "8/0.5", "--workers", "0", "--device", "cpu").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gflops", "0.000001"], "field `gflops`: no setting meets 1e-06 GFLOPs; the nearest, 8/0.5, has"),
        (["--latency", "1us"], "field `latency`: no setting meets 0.001 ms; the nearest"),
        (["--latency", "1us", "--cascade"], "field `latency`: no cascade of two of these settings meets 0.001 ms"),
        (["--throughput", "1e12"], "field `throughput`: no setting meets 1e+12 images/s; the nearest"),
        (["--accuracy", "1"], "field `accuracy`: no setting reaches 100.00%; the best, "),
        (["--accuracy", "70"], "field `accuracy`: 70 must be at most 1"),
        (["--latency", "20"], "field `latency`: '20' is no time; write 20ms"),
        (["--latency", "20ms", "--gflops", "2"], "give one budget: --latency or --gflops"),
        (["--settings", "8/0"], "keep"),
        (["--settings", "8/1.5"], "keep"),
        (["--settings", "8/nan"], "keep"),
        (["--settings", "10"], "must be a multiple of the patch 4"),
        (["--settings", "12"], "12 has no position table; there are tables for 8, 16"),
        (["--settings", "8/tokens=2,0"], "field `tokens`: (2, 0): every dropping block must leave at least one"),
        (["--settings", "small"], "setting 'small': write size/keep"),
        (["--batch", "0"], "field `batch`: 0 must be at least 1"),
        (["--batch"], "field `batch`: give at least one"),
        (["--batch", "2", "0"], "field `batch`: 0 must be at least 1"),
        (["--settings", "8/window=2"], "a SuperViT has no windows"),
        (["--rounds", "0"], "field `rounds`: 0 must be at least 1"),
        (["--data", "/no/such/place"], "no folder '/no/such/place'"),
        (["--split", "tset"], "has no split `tset`"),
        (["--device", "sundial"], "field `device`: 'sundial'"),
        (["--measured", "/no/such/costs.json"], "/no/such/costs.json: cannot be read"),
        (["--measured", "x", "--settings", "8"], "give --settings or --measured"),
    ],
)
def test_wrong_words_are_explained(run, capsys, arguments, words):
    given = [] if "--rounds" in arguments else ["--rounds", "1"]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert words in refused(capsys, "plan", "cost", run, "--workers", "0", *given, *device, *arguments)


def test_what_cannot_be_written_or_judged_is_said_before_anything_is_measured(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("manyscale.ship.costs.measure", None)
    (tmp_path / "file").touch()
    refused(capsys, "plan", "cost", run, *QUICK, "--out", tmp_path / "file" / "below")
    model = ms.load(run)
    model.preprocess = None
    ms.save(model, tmp_path / "bare")
    words = refused(capsys, "plan", "cost", tmp_path / "bare", *QUICK, "--data", "digits")
    assert "does not know how its pictures are prepared" in words


def test_labels_that_are_missing(run, capsys, tmp_path):
    (run / "best" / "recipe.json").unlink()
    for more in (["--cascade"], ["--accuracy", "0.5"]):
        assert "field `data`: no labels to calibrate with" in refused(capsys, "plan", "cost", run, *QUICK, *more)
    loose = tmp_path / "loose" / "val"
    loose.mkdir(parents=True)
    (loose / "a.png").touch()
    assert "no class folders" in refused(capsys, "plan", "cost", run, "--data", loose, "--cascade", *QUICK)
    words = said(capsys, "plan", "cost", run, *QUICK, "--latency", "1000s")
    assert "no accuracy: no data given" in words.out and "16/1, of those that meet it the one that computes most" in words.out
    assert all(cell.accuracy is None for cell in next(iter(read_costs(run / "costs.json").values())).cells)
    assert (run / "costs.png").exists()


def test_measured_on_another_device_or_other_weights(run, capsys):
    said(capsys, "plan", "cost", run, *QUICK)
    file = run / "costs.json"
    values = json.loads(file.read_text())
    (table,) = values["tables"].values()
    elsewhere = {**table, "device": "slide rule"}
    key = " | ".join(("slide rule", *next(iter(values["tables"])).split(" | ")[1:]))
    write_json(run / "elsewhere.json", {"format": 1, "tables": {key: elsewhere}})
    message = refused(capsys, "plan", "cost", run, "--measured", run / "elsewhere.json", "--latency", "1s", "--device", "cpu")
    assert "measured elsewhere or otherwise: `device` is slide rule there and" in message

    message = refused(capsys, "plan", "cost", run, "--measured", file, "--cascade", "--seed", "1", *QUICK)
    assert "field `measured`: its accuracies are of digits, val, seed 0, not of digits, val, seed 1; give the same" in message
    said(capsys, "plan", "cost", run, "--measured", file, "--cascade", *QUICK)
    model = ms.load(run)
    with torch.no_grad():
        model.head.bias.add_(1)
    ms.save(model, run / "best")
    for more in ([], ["--measured", file]):
        assert "costs.json: field `model`: measured on other weights" in refused(capsys, "plan", "cost", run, *QUICK, *more)
    (run / "a.png").touch()
    assert "cascade.json: field `model`: calibrated for other weights" in refused(capsys, "predict", run, run / "a.png", "--cascade")


def test_nets_of_other_kinds(tmp_path, capsys):
    swin = loud(ms.create_model("swinv2_tiny", image_size=16, patch=2, window=4, width=8, depths=(1, 1), heads=(1, 2), classes=10))
    vit = loud(ms.create_model("vit_tiny_patch16", image_size=16, patch=4, width=12, depth=1, heads=2, mlp_width=16, classes=10))
    for name, model, settings in (("swin", swin, ["12/window=3", "16/window=8"]), ("vit", vit, ["8", "16"])):
        model.preprocess = Preprocess(image_size=(16, 16), crop_ratio=1.0)
        ms.save(model, tmp_path / name)
        said(capsys, "plan", "cost", tmp_path / name, "--data", "digits", "--settings", *settings, *QUICK, "--cascade")
        (table,) = read_costs(tmp_path / name / "costs.json").values()
        assert [cell.setting for cell in table.cells] == list(map(Setting.read, settings))
        assert "only a SuperViT has some of its own; give --settings" in refused(capsys, "plan", "cost", tmp_path / name, *QUICK)
        wrong = "16/0.5"
        assert "keeps every token" in refused(capsys, "plan", "cost", tmp_path / name, "--settings", wrong, *QUICK)
        assert "keeps every token" in refused(capsys, "eval", tmp_path / name, "--data", "digits", "--setting", wrong, "--workers", "0")
