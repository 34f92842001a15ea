"""Every study from end to end on a net of a second, and the arithmetic of its doubt."""

import json
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from rich.console import Console

from manyscale.config import Schedule, SwinConfig
from manyscale.models import build
from manyscale.studies import STUDIES, Terms, amplitudes, bias_maps, norms, position_bias, simmim, stability
from manyscale.studies.amplitudes import loudness, spread
from manyscale.studies.bias_maps import bias_map, roughness
from manyscale.studies.grid import Outcome
from manyscale.studies.study import cell, compare, half_width, small
from manyscale.train.loop import Stopped, train
from tests.conftest import loud


@pytest.fixture
def quickly(monkeypatch, tmp_path):
    """Studies on digits with a micro net, their runs in this process: `tests/studies/test_grid.py` has the real ones."""
    ran = []

    def here(runs, console, *, jobs=0):
        outcomes = []
        for run in runs:
            ran.append(run)
            wild = run.optim.lr > 0.1
            try:
                outcomes.append(
                    Outcome(run, train(replace(run, optim=replace(run.optim, lr=1e30, clip=0.0, warmup_lr=1e30) if wild else run.optim)))
                )
            except Stopped as stopped:
                outcomes.append(Outcome(run, None, str(stopped)))
        return outcomes

    def tiny(terms, *, pictures, shown, batch=64):
        run = small(terms, pictures=pictures, shown=shown)
        model = replace(run.model, width=8, heads=(1, 2), depths=(1, 2), mlp_ratio=1.0)
        return replace(run, model=model, batch=200, schedule=Schedule(epochs=2, warmup=0, evaluate_every=2))

    monkeypatch.setattr("manyscale.tasks.classify.Classify.draw", lambda self, model, path: path.touch())  # a second each
    monkeypatch.setattr("manyscale.train.log.Log.curves", lambda self: None)
    for module in ("amplitudes", "bias_maps", "norms", "position_bias", "simmim", "stability"):
        monkeypatch.setattr(f"manyscale.studies.{module}.run_grid", here)
        monkeypatch.setattr(f"manyscale.studies.{module}.small", tiny)
    return Terms(tmp_path / "study", "digits", 1, True, Console(quiet=True), "manyscale study"), ran


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_ends_with_a_table_and_a_picture(name, quickly, monkeypatch):
    terms, ran = quickly
    # nets as shallow as the micro one, and presets that take no minute
    monkeypatch.setattr("manyscale.studies.amplitudes.PRESETS", {"V1": ("swin_tiny",), "V2": ("swinv2_tiny",)})
    monkeypatch.setattr("manyscale.studies.simmim.SHARES", (0.25, 1.0))
    result = STUDIES[name](terms)
    assert json.loads((terms.out / "table.json").read_text()) == json.loads(json.dumps(result))
    text = (terms.out / "table.md").read_text()
    assert text.startswith("# ") and "## The paper" in text and "manyscale study" in text and "nan" not in text
    for section in result["tables"]:
        assert section["rows"] and all(len(row) == len(section["header"]) for row in section["rows"])
    assert all(f"- {finding}" in text for finding in result["findings"]) and result["findings"]
    assert (terms.out / "picture.png").stat().st_size > 5000
    assert len({run.out for run in ran}) == len(ran), "two runs in one folder"
    if name == "stability":
        assert any(fates["fates"] == ["diverged"] for fates in result["values"].values()) == any(run.optim.lr > 0.1 for run in ran)


def test_what_the_studies_ask_of_their_runs(quickly):
    """The grids themselves, without training: the cases the issue names, seeds, and where a fine-tuning starts."""
    terms, _ = quickly
    base = small(replace(terms, data="digits"), pictures=1000, shown=5000)
    assert base.input.share == pytest.approx(1000 / 1438) and base.schedule.epochs == 5 == base.schedule.evaluate_every
    cases = {
        (norm, s): norms._run(terms, base, norm, s, 0.25 if norm == "post" else 1.0, 0) for norm in norms.NORMS for s in norms.SIMILARITIES
    }
    assert len(cases) == 8 and cases["post", "dot"].optim.lr == base.optim.lr / 4 and cases["pre", "dot"].optim.lr == base.optim.lr
    assert set(position_bias.BIASES) == {"table", "linear-cpb", "log-cpb"} and len(position_bias.SIZES) == 5
    assert [window / 4 for _, window in position_bias.SIZES] == [1, 1.5, 2, 2.5, 3]
    assert simmim.SHARES == (0.01, 0.1, 1.0) and len(stability.RATES) == 5 and bias_maps.BIASES is position_bias.BIASES
    assert amplitudes.PRESETS["V2"][-1] == "swinv2_huge" and amplitudes.PRESETS["V1"][-1] == "swin_large"


def test_the_doubt_is_students():
    values = [1.0, 2.0, 4.0]
    assert half_width(values) == pytest.approx(4.302653 * stdev(values) / 3**0.5, rel=1e-6)  # t of 97.5 % at 2 degrees
    assert half_width([1.0]) == float("inf")
    assert cell(values, scale=1) == f"{fmean(values):.1f} ± 1.5 [-1.5, 6.1]"
    assert (cell([0.5]), cell([])) == ("50.0", "")
    assert compare("a over b", [0.9, 0.92, 0.91], [0.8, 0.81, 0.82]) == "a over b: +10.0 points [+7.5, +12.5], clear at 95 %"
    assert "not clear" in compare("a over b", [0.9, 0.8, 0.7], [0.8, 0.81, 0.72])
    assert "one seed" in compare("a over b", [0.9], [0.8])


def test_loudness_is_measured_at_every_block():
    model = loud(build(SwinConfig(image_size=32, width=8, depths=(2, 3), heads=(1, 2), window=4, classes=0)))
    images = torch.randn(2, 3, 32, 32)
    found = loudness(model, images)
    assert len(found) == 5 and not model.stages[0].blocks[0]._forward_hooks
    tokens = model.tokens(images)
    assert found[1] == pytest.approx(tokens[0].square().mean().sqrt().item(), rel=1e-5)
    assert found[4] == pytest.approx(tokens[1].square().mean().sqrt().item(), rel=1e-5)
    assert spread([2.0, 0.5, 1.0]) == 4.0


def test_roughness_is_one_for_noise_and_small_for_slopes():
    assert roughness(torch.randn(64, 15, 15, generator=torch.Generator().manual_seed(0))) == pytest.approx(1.0, abs=0.05)
    slope = torch.arange(15.0)[None, :, None].expand(4, 15, 15)
    assert roughness(slope) == pytest.approx((1 / 2 / (2 * slope[0].var(correction=0).item())) ** 0.5)


@pytest.mark.parametrize("bias", ["table", "log-cpb"])
def test_a_bias_map_is_the_bias_of_each_offset(bias):
    model = loud(build(SwinConfig(image_size=16, width=8, depths=(1, 1), heads=(2, 2), window=(2, 4), bias=bias, classes=0)))
    found = bias_map(model, 0, 0)
    assert found.shape == (2, 3, 7)
    if bias == "table":
        assert torch.equal(found.flatten(1).T, model.stages[0].blocks[0].attention.branch.bias.table)
