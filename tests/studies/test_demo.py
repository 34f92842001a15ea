"""The demo's story on a net that takes seconds, and what it says of numbers."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import manyscale as ms
from manyscale.config import SwinConfig
from manyscale.recipes import RECIPES
from manyscale.studies.demo import demo, verdict
from manyscale.studies.grid import Outcome
from manyscale.train.loop import train


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Its runs in this process: `tests/studies/test_grid.py` has those that have one of their own."""
    out = tmp_path_factory.mktemp("demo") / "out"
    recipe = RECIPES["digits"]()
    model = SwinConfig(image_size=32, patch=4, window=4, width=8, depths=(1, 1), heads=(1, 2), mlp_ratio=1.0)
    schedule = replace(recipe.schedule, epochs=1, evaluate_every=1, warmup=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyscale.studies.demo.run_grid", lambda runs, console: [Outcome(run, train(run)) for run in runs])
        return out, demo(out, replace(recipe, model=model, schedule=schedule, batch=359), seeds=2)


def test_it_measures_both_nets_at_every_size(told):
    out, result = told
    assert json.loads((out / "report.json").read_text()) == result
    assert [(row["image_size"], row["window"]) for row in result["transfer"]] == [(32, 4), (48, 6), (64, 8)]
    for bias in ("log-cpb", "table"):
        trained = [json.loads((out / f"{bias}-{seed}" / "summary.json").read_text())["best"]["accuracy"] for seed in (0, 1)]
        assert result["transfer"][0][bias] == pytest.approx(trained)
    best = ms.load(out / "best")
    assert best.config.bias == "log-cpb" and best.config.width == 8 and best.labels == tuple("0123456789")


def test_the_page_stands_alone(told):
    out, result = told
    page = (out / "report.html").read_text()
    assert result["verdict"] in page and "{" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3 + 24 and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert Path(out / "transfer.png").stat().st_size > 1000


def rows(log, table):
    return [
        {"image_size": 32, "window": 4, "log-cpb": log[0], "table": table[0]},
        {"image_size": 64, "window": 8, "log-cpb": log[1], "table": table[1]},
    ]


LESS, MORE, TWICE = "the log-spaced bias loses less", "here the log-spaced bias does not lose less", "more than twice its standard error"


@pytest.mark.parametrize(
    ("log", "table", "words"),
    [
        (
            ([0.98, 0.98], [0.95, 0.95]),
            ([0.97, 0.97], [0.90, 0.91]),
            f"lose 3.0 and 6.5 points: {LESS}, a difference of 3.5 points ({TWICE}",
        ),
        (([0.98, 0.96], [0.95, 0.90]), ([0.97, 0.95], [0.92, 0.86]), f"{LESS}, a difference of 2.5 points (within twice"),
        (([0.98, 0.98], [0.90, 0.90]), ([0.97, 0.97], [0.95, 0.95]), f"{MORE}, a difference of 6.0 points ({TWICE}"),
        (
            ([0.98], [0.95]),
            ([0.97], [0.90]),
            f"mean of 1 seed. Untouched at 64 px and window 8 they lose 3.0 and 7.0 points: {LESS} (one seed).",
        ),
    ],
)
def test_the_verdict_says_what_the_numbers_say(log, table, words):
    assert words in verdict(rows(log, table))
