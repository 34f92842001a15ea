"""Every study from end to end on a net of a second, and the arithmetic of its doubt."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from rich.console import Console

from manyscale.config import Run, Schedule, Setting, SimMIM, SwinConfig, to_dict
from manyscale.data.loader import steps_per_epoch
from manyscale.data.sources import open_splits
from manyscale.models import build
from manyscale.plan.count import count
from manyscale.studies import STUDIES, Terms, amplitudes, norms, position_bias, run_study, scaling, simmim, stability
from manyscale.studies.amplitudes import loudness, spread
from manyscale.studies.bias_maps import bias_map, roughness
from manyscale.studies.fate import VisibleMean, fate, fate_cell, guessed_accuracy, guessed_painting
from manyscale.studies.grid import Outcome
from manyscale.studies.study import begin, cell, compare, compare_ratio, describe, half_width, provenance, small
from manyscale.studies.vits import Upstream, trained, upstream, vit
from manyscale.train.branches import _branches, train
from manyscale.train.loop import Stopped
from manyscale.train.schedule import total_rate
from tests.conftest import loud
from tests.pictures import make_set

FALLEN = {"log-cpb seed 1", "res-post-cosine seed 1", "V1 slim seed 1", "pre-train seed 1", "scratch-1-rate0.001 seed 0",
          "w32 on 100% seed 1", "body4-head4 seed 1", "gap-decay0.3 seed 1", "24 px seed 1"}  # fmt: skip


@pytest.fixture
def quickly(monkeypatch, tmp_path):
    """Studies on digits with a micro net, their runs in this process: `tests/studies/test_grid.py` has the real ones.

    Of every study some run diverges: those in `FALLEN`, and what has a rate above 0.05.
    """
    ran = []

    def here(runs, console, *, jobs=0):
        outcomes = []
        for run in runs:
            ran.append(run)
            wild = run.optim.lr > 0.05 or run.recipe in FALLEN
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
        return replace(run, model=model, batch=200, schedule=Schedule(epochs=2, warmup=0, evaluate_every=2), log_every=1)

    monkeypatch.setattr("manyscale.tasks.classify.Classify.draw", lambda self, model, path: path.touch())  # a second each
    monkeypatch.setattr("manyscale.train.log.Log.curves", lambda self: None)
    slim = {"slim": {"width": 8, "heads": (1, 2), "depths": (1, 1)}, "wide": {"width": 16, "heads": (1, 2), "depths": (1, 2)}}
    monkeypatch.setattr("manyscale.studies.amplitudes.TRAINED", slim)
    # presets that take no minute, and one that no memory holds
    monkeypatch.setattr("manyscale.studies.amplitudes.PRESETS", {"V1": ("swin_tiny",), "V2": ("swinv2_tiny", "swinv2_giant")})
    monkeypatch.setattr("manyscale.studies.amplitudes._free_memory", lambda: 2**30)
    monkeypatch.setattr("manyscale.studies.bias_maps.QUICK", ((32, 4), (64, 8)))
    monkeypatch.setattr("manyscale.studies.simmim.QUICK", simmim.FULL)  # so that there is a better one

    def tiny_vit(terms, sets, size, **options):
        run = vit(terms, sets, size, **options)
        width = int(size[1:]) // 8
        model = replace(run.model, width=width, depth=1, heads=1, mlp_width=width, patch=16)
        return replace(run, model=model, batch=350, fewshot=replace(run.fewshot, draws=1, shots=(5, 10, 25)), log_every=1)

    for module in ("amplitudes", "bias_maps", "norms", "position_bias", "simmim", "stability"):
        monkeypatch.setattr(f"manyscale.studies.{module}.small", tiny)
    for module in ("scaling", "weight_decay", "heads"):
        monkeypatch.setattr(f"manyscale.studies.{module}.vit", tiny_vit)
    for module in (
        "amplitudes",
        "bias_maps",
        "norms",
        "position_bias",
        "simmim",
        "stability",
        "scaling",
        "weight_decay",
        "heads",
        "supervit",
    ):
        monkeypatch.setattr(f"manyscale.studies.{module}.run_grid", here)
    net = {"width": 8, "depth": 3, "heads": 1, "mlp_width": 8, "drop_blocks": (0, 1)}
    monkeypatch.setattr("manyscale.studies.supervit.NET", net)
    monkeypatch.setattr("manyscale.studies.supervit.QUICK", (1_000, 1_000))
    lengths = ("8k-images", "16k-images")
    monkeypatch.setattr("manyscale.studies.scaling.QUICK", {"w32": lengths, "w64": lengths, "w128": lengths[:1]})
    probe = str(make_set(tmp_path / "noise", side=8, train=25, val=10))
    terms = Terms(
        tmp_path / "study", data="digits", probe=probe, seeds=2, quick=True, console=Console(quiet=True), command="manyscale study"
    )
    return terms, ran


def test_few_shots_are_of_other_pictures_than_the_training(tmp_path):
    with pytest.raises(ValueError, match="field `probe`: digits is the set that is learnt from; give one of other classes"):
        upstream(Terms(tmp_path, data="digits", probe="digits", seeds=1, quick=True, console=Console(quiet=True)))


def test_nets_are_counted_with_the_classes_they_are_trained_on(tmp_path):
    probe = str(make_set(tmp_path / "noise", side=8, train=25, val=10))
    terms = Terms(tmp_path, data="digits", probe=probe, seeds=1, quick=True, console=Console(quiet=True))
    sets = upstream(terms)
    assert trained(vit(terms, sets, "w32", length="10-steps"), sets).classes == 10


@pytest.mark.parametrize("quick", [True, False])
def test_every_rung_warms_up_before_its_first_cooldown(tmp_path, quick):
    terms = Terms(tmp_path, data="tiny-imagenet", seeds=1, quick=quick, console=Console(quiet=True))
    sets, plan = Upstream("tiny-imagenet", "cifar10", 20_000, 200), scaling.QUICK if quick else scaling.FULL
    for size, share in itertools.product(plan, scaling.SHARES):
        run = scaling.run(terms, sets, plan, size, share, 0)
        assert tuple(_branches(run, steps_per_epoch(round(share * sets.pictures), run.batch))) == plan[size]


def test_what_more_pictures_give_is_compared_after_as_many_images():
    plan = {"small": ("20k-images", "60k-images"), "middle": ("20k-images",), "large": ("20k-images",)}
    ends = {("small", "20k-images"): (0.10, 0.11), ("small", "60k-images"): (0.10, 0.30), ("middle", "20k-images"): (0.05, 0.10)}
    values = {
        scaling.Case(size, share, length): [top1] * 2
        for (size, length), both in ends.items()
        for share, top1 in zip((0.25, 1.0), both, strict=True)
    }
    values[scaling.Case("large", 1.0, "20k-images")] = [0.2, 0.2]
    gains = [finding for finding in scaling._claims(plan, values, "top-1") if "four times" in finding]
    assert gains == [
        "top-1 after 20k images, what four times the pictures give middle over what they give small: +4.0 points [+4.0, +4.0]: appears"
    ]


LONG = {*STUDIES} - {"supervit", "amplitudes"}  # a quarter or half a minute each: `-m slow`


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in STUDIES])
def test_a_study_ends_with_a_table_and_a_picture(name, quickly):
    terms, ran = quickly
    result = run_study(name, terms)
    assert json.loads((terms.out / "table.json").read_text()) == json.loads(json.dumps(result))
    text = (terms.out / "table.md").read_text()
    assert text.startswith("# ") and "## The paper" in text and "`manyscale study`: manyscale 0" in text
    assert "nan" not in text and "None" not in text
    for section in result["tables"]:
        assert section["rows"] and all(len(row) == len(section["header"]) for row in section["rows"])
    assert all(f"- {finding}" in text for finding in result["findings"]) and result["findings"]
    assert (terms.out / "picture.png").stat().st_size > 5000
    assert len({run.out for run in ran}) == len(ran), "two runs in one folder"
    assert "1 of 2 fell" in text or "1 of 2 diverged" in text or "2 of 2 diverged" in text
    CHECKS[name](ran, result)


def alike(left: Run, right: Run, *but: str) -> bool:
    """Two runs that differ in the fields named, and in no other but name and folder."""
    flat = [{k: v for part, whole in to_dict(run).items() for k, v in (whole if isinstance(whole, dict) else {part: whole}).items()}
            for run in (left, right)]  # fmt: skip
    return {key for key in flat[0] if flat[0][key] != flat[1][key]} == {"recipe", "out", *but}


def many_settings(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    for seed in (0, 1):
        assert alike(runs[f"all settings seed {seed}"], runs[f"24 px seed {seed}"], "sizes", "keeps")
    assert len(result["values"]) == 4 * 12 and all(len(values) == 2 for values in result["values"].values())
    assert [value is None for value in result["values"]["24, 16/0.5"]] == [False, True]
    rows = {row[0]: row for row in result["tables"][0]["rows"]}
    assert [row[1] for row in rows.values()] == ["3", "5", "10", "16", "4", "10", "19", "36", "7", "17", "33", "64"]
    front = {setting for setting, row in rows.items() if row[-1] == "yes"}
    assert front and set(result["findings"][0].partition(": ")[2].split(", ")) == front
    net = runs["all settings seed 0"].model
    points = {s: (count(net, Setting.read(s)).macs, fmean(v or 0 for v in result["values"][f"all, {s}"])) for s in rows}
    for setting, (cost, mean) in points.items():
        assert any(c <= cost and m >= mean and (c, m) != (cost, mean) for c, m in points.values()) != (setting in front)


def position_biases(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    for seed in (0, 1):
        assert alike(runs[f"table seed {seed}"], runs[f"log-cpb seed {seed}"], "bias")
        assert alike(runs[f"table seed {seed}"], runs[f"linear-cpb seed {seed}"], "bias")
        tuned = runs[f"table seed {seed} at 64 px"]
        assert (tuned.init, tuned.seed, tuned.model.window) == (runs[f"table seed {seed}"].out, seed, 8)
        assert tuned.optim.lr == pytest.approx(runs["table seed 0"].optim.lr / 25) and tuned.optim.weight_decay == 1e-8
    assert "log-cpb seed 0 at 64 px" in runs and "log-cpb seed 1 at 64 px" not in runs  # there is nothing to tune
    assert [value is None for value in result["values"]["untouched"]["log-cpb"][1]] == [False, True]
    assert "one pair of runs, no telling" in result["findings"][0]


def norm_placements(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    assert len(ran) == 2 * 6 * 2
    assert alike(runs["pre-dot seed 0"], runs["res-post-cosine seed 0"], "norm", "similarity")
    assert alike(runs["post-dot-rate1 seed 0"], runs["post-dot-rate0.25 seed 0"], "lr", "min_lr")
    assert runs["post-dot-rate0.25 seed 0"].optim.lr == runs["pre-dot seed 0"].optim.lr / 4
    assert alike(runs["res-post-dot seed 1"], runs["res-post-dot-from-one seed 1"], "zero_init")
    assert result["values"]["res-post, cosine"]["fates"][1] == "diverged"
    assert "res-post with cosine: " in result["findings"][-1] and "diverged" in result["findings"][-1]


def amplitude_pairs(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    assert alike(runs["V1 slim seed 0"], runs["V2 slim seed 0"], "similarity", "norm", "bias", "merge_norm")
    assert result["values"]["small"]["slim"]["V1"][1]["trained"] == [] and len(result["values"]["small"]["wide"]["V2"][1]["trained"]) == 3
    assert result["values"]["presets"]["swinv2_giant"] == [] and len(result["values"]["presets"]["swin_tiny"]) == 12
    assert result["tables"][1]["rows"][-1] == ("swinv2_giant", "does not fit into the free memory", "", "")


def rates_that_break(ran: list[Run], result: dict) -> None:
    fates = {name: found["fates"] for name, found in result["values"].items() if name != "guess"}
    assert fates["V1 0.064"] == fates["V2 0.064"] == ["diverged"] * 2 and "diverged" not in fates["V1 0.004"]
    assert all(run.task == "simmim" and run.simmim.target_window == 0 for run in ran)


def few_labels(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    for rate, share in itertools.product(("0.001", "0.002"), ("0.01", "0.1", "1")):
        assert alike(runs[f"scratch-{share}-rate{rate} seed 0"], runs[f"tuned-{share}-rate{rate} seed 0"], "init", "layer_decay")
        assert runs[f"tuned-{share}-rate{rate} seed 0"].init == runs["pre-train seed 0"].out
        assert f"tuned-{share}-rate{rate} seed 1" not in runs  # its pre-training fell
    (longer,) = (run for run in ran if run.recipe.startswith("scratch") and "3-times seed 0" in run.recipe)
    short = runs[longer.recipe.replace("-3-times", "")]
    assert alike(longer, short, "epochs", "warmup", "evaluate_every") and longer.schedule.epochs == 3 * short.schedule.epochs
    counts = [row[0] for row in result["tables"][0]["rows"]]
    assert counts == ["10", "143", "1,438"]  # not per cent: of digits, one of each class is the least


def maps_of_every_bias(ran: list[Run], result: dict) -> None:
    assert {(run.model.size[0], run.model.window) for run in ran} == {(32, 4), (64, 8)}
    assert set(result["values"]) >= {"table, window 4, first block", "log-cpb, window 8, last block"}


def a_ladder(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    assert len(ran) == 2 * (3 + 2)  # the largest on all pictures only
    assert alike(runs["w32 on 25% seed 0"], runs["w32 on 100% seed 0"], "share")
    assert alike(runs["w32 on 100% seed 0"], runs["w64 on 100% seed 0"], "width", "mlp_width", "lr")
    found = result["values"]["w32, 1, 16k-images"]
    assert found["compute"] == pytest.approx(2 * result["values"]["w32, 1, 8k-images"]["compute"])
    assert found["top1"][1] is None and 0 < found["top1"][0] < 1 and 0 < found["10-shot"][0] < 1
    assert result["tables"][0]["rows"][4][-1] == ""  # w128 was not asked for so long
    law = result["tables"][2]["rows"][0]  # nets of a second make no law worth the name; and it says so
    assert law[2].startswith(("none: ", "E = ")) and ("as many points as numbers" in law[1] or law[1][:1] != "4")
    assert "times as many" in result["findings"][-1]


def two_decays(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    assert len(ran) == 2 * 3 * 2
    weak, strong = runs["body0.3-head0.3 seed 0"], runs["body0.3-head40 seed 0"]
    assert alike(weak, strong, "head_decay") and strong.optim.head_decay == pytest.approx(weak.optim.head_decay * 40 / 0.3)
    steps, each = 58, 4  # 20,000 images of 1,438, in batches of 350
    assert total_rate(weak, steps, each) * weak.optim.weight_decay == pytest.approx(0.3)
    assert result["values"]["body 4, head 4"]["upstream"][1] is None


def pools_and_layers(ran: list[Run], result: dict) -> None:
    runs = {run.recipe: run for run in ran}
    assert alike(runs["token-decay40 seed 1"], runs["map-decay40 seed 1"], "pool")
    padding = result["values"]["padding"]
    assert padding["time"] == padding["257"] / padding["256"] > 0.5 and result["tables"][1]["rows"][1][:2] == ("257", "384")


CHECKS = {
    "position-bias": position_biases,
    "norms": norm_placements,
    "amplitudes": amplitude_pairs,
    "stability": rates_that_break,
    "simmim": few_labels,
    "bias-maps": maps_of_every_bias,
    "scaling": a_ladder,
    "weight-decay": two_decays,
    "heads": pools_and_layers,
    "supervit": many_settings,
}


def test_the_cases_the_issue_names():
    assert set(position_bias.BIASES) == {"table", "linear-cpb", "log-cpb"}
    assert [window / 4 for _, window in position_bias.SIZES] == [1, 1.5, 2, 2.5, 3]
    assert {(p.norm, p.rate) for p in norms.PLACEMENTS} == {("pre", 1), ("sandwich", 1), ("post", 0.25), ("post", 1), ("res-post", 1)}
    assert simmim.SHARES == (0.01, 0.1, 1.0) and list(stability.RATES) == sorted(stability.RATES)
    assert amplitudes.PRESETS["V2"][-1] == "swinv2_huge" and amplitudes.PRESETS["V1"][-1] == "swin_large"


def test_a_small_run_is_as_long_as_asked(tmp_path):
    base = small(Terms(tmp_path, data="digits"), pictures=1000, shown=5000)
    assert base.input.share == pytest.approx(1000 / 1438) and base.schedule.epochs == 5 == base.schedule.evaluate_every
    assert "digits with 70% of its training pictures, 5 epochs" in describe(base) and "flips" not in describe(base)


def test_a_study_says_where_every_sitting_was(tmp_path, monkeypatch):
    terms = Terms(tmp_path / "study", command="manyscale study norms")
    begin(terms)
    begin(terms)  # the same day, machine and commit
    monkeypatch.setattr("platform.python_version", lambda: "4.0")
    begin(terms)
    lines = provenance(terms)
    assert len(lines) == 2 and "Python 4.0" in lines[1] and all(line.startswith("`manyscale study norms`: manyscale 0.") for line in lines)


def test_the_doubt_is_students():
    values = [1.0, 2.0, 4.0]
    assert half_width(values) == pytest.approx(4.302653 * stdev(values) / 3**0.5, rel=1e-6)  # t of 97.5 % at 2 degrees
    assert half_width([1.0]) == float("inf")
    assert cell(values, scale=1) == f"{fmean(values):.1f} ± 1.5 [-1.5, 6.1]"
    assert (cell([0.5]), cell([]), cell([None, 0.5]), cell([None])) == ("50.0", "", "50.0, 1 of 2 fell", "1 of 1 fell")


def test_a_comparison_says_what_becomes_of_the_claim():
    above, below, mixed = (
        ([0.9, 0.92, 0.91], [0.8, 0.81, 0.82]),
        ([0.8, 0.81, 0.82], [0.9, 0.92, 0.91]),
        ([0.9, 0.8, 0.7], [0.8, 0.81, 0.72]),
    )
    assert compare("a over b", *above) == "a over b: +10.0 points [+7.5, +12.5]: clear"
    assert compare("a over b", *above, claim=1).endswith(": appears") and compare("a over b", *below, claim=-1).endswith(": appears")
    assert compare("a over b", *below, claim=1).endswith(": the opposite, clearly")
    assert compare("a over b", *mixed).endswith(": not clear") and "does not appear at this scale" in compare("a", *mixed, claim=1)
    assert "one pair of runs, no telling" in compare("a over b", [0.9, None], [0.8, 0.7]) and "no pair" in compare("a", [None], [0.8])
    assert "(3 of 4 seeds)" in compare("a over b", [*above[0], None], [*above[1], 0.5])
    assert compare_ratio("a over b", [2.0, 8.0], [1.0, 1.0]).startswith("a over b: 4.00 times [")
    assert compare_ratio("a over b", [2.0, 2.1, 2.2], [1.0, 1.0, 1.0], claim=1).endswith(": appears")


def outcome(folder, losses, **last):
    """A run that ended, with these training losses on the way."""
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss, "lr": 0.1}) for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return Outcome(Run(out=str(folder)), {"last": last})


def test_fates(tmp_path):
    assert fate(Outcome(Run(), None, "not finite"), 0.1) == "diverged"
    assert fate(outcome(tmp_path / "a", [2.3, 1.5, 1.2], accuracy=0.6), 0.11) == "learns"
    assert fate(outcome(tmp_path / "b", [2.3, 2.31, 2.3], accuracy=0.1), 0.11) == "stuck"
    assert fate(outcome(tmp_path / "c", [2.3, 1.2, 2.3], accuracy=0.3), 0.11) == "broke down"
    assert fate(outcome(tmp_path / "d", [0.9, 0.4, 0.34], l1=0.34), 0.34) == "stuck"
    assert fate(outcome(tmp_path / "e", [0.9, 0.4, 0.2], l1=0.2), 0.34) == "learns"
    assert fate_cell([0.5, 0.7, None], ["learns", "learns", "stuck"]).endswith("], 1 of 3 stuck")


def test_guesses(tmp_path):
    run = replace(
        small(Terms(tmp_path, data="digits"), pictures=2000, shown=2000), task="simmim", simmim=SimMIM(mask_unit=8, target_window=0)
    )
    val = open_splits(run.input, 0).val
    counts = Counter(val.label(index) for index in range(len(val)))
    share = max(counts.values()) / len(val)
    assert guessed_accuracy(run) == pytest.approx(share + 2 * (share * (1 - share) / len(val)) ** 0.5)
    images, mask = torch.rand(2, 3, 4, 4), torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])
    painted = VisibleMean((2, 2))(images, mask)
    assert painted[0, 1, 3, 0].item() == pytest.approx((images[0, 1].sum() - images[0, 1, :2, :2].sum()).item() / 12)
    assert painted[1, 2, 0, 1].item() == pytest.approx(images[1, 2, 2:, 2:].mean().item())
    assert 0.1 < guessed_painting(run) < 1.0


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
