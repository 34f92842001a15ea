"""Cascades and mixed requests: confidence, its calibration, thresholds, and that batching changes no answer."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import manyscale as ms
from manyscale.config import Preprocess, Setting, SuperViTConfig, ViTConfig
from manyscale.data.loader import BadFile, Batch
from manyscale.models import build
from manyscale.models.settings import AtSetting, run_at
from manyscale.plan.switch import Budget, Cell, Costs
from manyscale.ship.answers import Answers, answer_mixed, collect, halves, prepared
from manyscale.ship.cascade import (
    Cascade,
    Judged,
    calibration_error,
    cut,
    fit_temperature,
    outcome,
    probabilities,
    read_cascade,
    run_cascade,
    search,
    write_cascade,
)
from manyscale.ship.costs import best_cascade, curve, verdict
from tests.conftest import loud

TINY = SuperViTConfig(sizes=(8, 12, 16), keeps=(0.5, 1.0), patch=4, width=12, depth=3, heads=2, mlp_width=16, drop_blocks=(0, 1), classes=4)
STAGES = tuple(map(Setting.read, ("8/0.5", "12", "16")))
CASCADE = Cascade(
    model="a", settings=STAGES, thresholds=(0.8, 0.9), temperatures=(0.5, 0.7, 2.0), aim="", place="", data="", shares=(1.0, 0.5, 0.2),
    accuracy=0.9, cost="",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return loud(build(TINY)).double().eval()


def pictures(count, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(count=400, seed=0, classes=5):
    """Three settings on the same pictures, each better than the one before, and differently sure of itself."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, classes)
    signal = torch.randn(count, 1, generator=generator).abs()
    said = {
        setting: (strength * truth * signal + torch.randn(count, classes, generator=generator)) * scale
        for setting, strength, scale in zip(STAGES, (2.0, 3.0, 4.0), (3.0, 1.0, 0.4), strict=True)
    }
    return Answers(said, labels)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature):
    """Labels drawn from softmax(z): logits z x T are calibrated at T."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(20_000, 6, generator=generator)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.03)
    sure, said = probabilities(logits * temperature, temperature).max(-1)
    assert calibration_error(sure.numpy(), (said == labels).numpy()) < 0.012
    sure = probabilities(logits * temperature, 3 * temperature).amax(-1)
    assert calibration_error(sure.numpy(), (said == labels).numpy()) > 0.2


def test_where_all_is_right_the_temperature_ends_somewhere():
    assert fit_temperature(torch.eye(4), torch.arange(4)) == pytest.approx(1 / 20, rel=1e-3)


UNIT = st.floats(0.0009765625, 1, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(UNIT, st.booleans()), min_size=1, max_size=40))
def test_calibration_error_against_a_slow_one(rows):
    total = 0.0
    for b in range(15):
        members = [(sure, right) for sure, right in rows if (b < sure * 15 <= b + 1)]
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = math.fsum(sure for sure, _ in members) / len(members)
            total += len(members) / len(rows) * abs(accuracy - confidence)
    sure, right = map(np.array, zip(*rows, strict=True))
    assert calibration_error(sure, right) == pytest.approx(total, abs=1e-9)


SURE = st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.875, 1.0])
ROWS = st.lists(st.tuples(SURE, st.booleans(), st.booleans()), min_size=1, max_size=14)


@settings(deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.floats(0.5, 5))
def test_the_best_threshold_of_all(rows, accuracy, most):
    """Against every threshold tried in turn."""
    sure, first, second = (np.array(column) for column in zip(*rows, strict=True))
    sure = sure.astype(np.float32)
    tried = []
    for threshold in (0.0, *sorted(set(sure.tolist())), 2.0):
        on = sure < threshold
        cost, right = 1 + 2 * on.mean(), np.where(on, second, first).mean()
        if cost <= most + 1e-12 and right >= accuracy - 1e-12:
            tried.append((cost, -right) if accuracy else (-right, cost))
    found = cut(sure, first, second, (1.0, 2.0), most=most, accuracy=accuracy)
    if not tried:
        assert found is None
        return
    assert ((found.cost, -found.accuracy) if accuracy else (-found.accuracy, found.cost)) == pytest.approx(min(tried))
    assert found.cost <= most and found.accuracy >= accuracy - 1e-9
    on = sure < np.float32(found.threshold)
    assert 1 + 2 * on.mean() == pytest.approx(found.cost) and np.where(on, second, first).mean() == pytest.approx(found.accuracy)


@settings(deadline=None)
@given(arrays(np.float32, (3, 12), elements=UNIT), arrays(bool, (3, 12)), st.floats(1, 14))
def test_the_best_pair_of_all(sure, right, most):
    judged, costs = Judged(sure, right), (4.0, 1.0, 2.0)
    pairs = [(1, 2), (1, 0), (2, 0)]
    each = [cut(sure[i], right[i], right[j], (costs[i], costs[j]), most=most) for i, j in pairs]
    best = [(found.accuracy, -found.cost) for found in each if found]
    found = search(judged, costs, most=most)
    if not best:
        assert found is None
        return
    first, second, chosen = found
    assert (first, second) in pairs and (chosen.accuracy, -chosen.cost) == max(best)
    accuracy, cost, shares = outcome(judged, (first, second), (chosen.threshold,), costs)
    assert (accuracy, cost) == (pytest.approx(chosen.accuracy), pytest.approx(chosen.cost)) and shares[0] == 1


def test_three_stages_by_hand():
    judged = Judged(
        np.array([[0.9, 0.2, 0.2, 0.8], [0.1, 0.9, 0.1, 0.1], [0.3] * 4]), np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]) > 0
    )
    assert outcome(judged, (0, 1, 2), (0.8, 0.5), (1.0, 10.0, 100.0)) == (0.75, 1 + 0.5 * 10 + 0.25 * 100, [1.0, 0.5, 0.25])


def test_a_cascade_answers_each_picture_as_if_alone(model):
    images = pictures(23)
    slow, last = [], []
    with torch.no_grad():
        sure = [probabilities(model(images, setting), t).amax(-1) for setting, t in zip(STAGES, CASCADE.temperatures, strict=True)]
        cascade = replace(CASCADE, thresholds=tuple(one.median().item() for one in sure[:2]))
        for image in images:
            for stage, (setting, temperature) in enumerate(zip(cascade.settings, cascade.temperatures, strict=True)):
                said = (model(image[None], setting).float() / temperature).softmax(-1)[0]
                if stage == 2 or said.max() >= cascade.thresholds[stage]:
                    break
            slow.append(said)
            last.append(stage)
    found = run_cascade(model, cascade, images)
    assert set(last) == {0, 1, 2}, "every stage has something to say"
    assert found.stages.tolist() == last
    assert found.asked(3) == [23, sum(stage > 0 for stage in last), sum(stage > 1 for stage in last)]
    torch.testing.assert_close(found.probabilities, torch.stack(slow), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("thresholds", "asked"), [((0.0, 0.0), [5, 0, 0]), ((1.0001, 0.0), [5, 5, 0]), ((1.0001, 1.0001), [5, 5, 5])])
def test_only_what_goes_on_is_computed(model, monkeypatch, thresholds, asked):
    seen = []
    monkeypatch.setattr(
        "manyscale.ship.cascade.run_at", lambda net, images, setting: seen.append(len(images)) or run_at(net, images, setting)
    )
    found = run_cascade(model, replace(CASCADE, thresholds=thresholds), pictures(5))
    assert found.asked(3) == asked and seen == [count for count in asked if count]


REQUESTS = st.lists(st.tuples(st.sampled_from([None, *STAGES]), st.sampled_from([8, 16])), min_size=1, max_size=9)


@settings(deadline=None, max_examples=30)
@given(REQUESTS, st.integers(1, 4))
def test_mixed_requests_are_answered_in_their_order(requests, batch):
    model = loud(build(TINY)).double().eval()
    mixed = [(pictures(1, size, seed)[0], setting) for seed, (setting, size) in enumerate(requests)]
    with torch.no_grad():
        alone = torch.cat([run_at(model, image[None], setting) for image, setting in mixed])
    torch.testing.assert_close(answer_mixed(model, mixed, batch), alone, rtol=1e-12, atol=1e-12)


def test_requests_that_are_none(model):
    with pytest.raises(ValueError, match="no requests"):
        answer_mixed(model, [])
    with pytest.raises(ValueError, match="`batch`: 0"):
        answer_mixed(model, [(pictures(1)[0], None)], 0)
    with pytest.raises(ValueError, match="20 has no position table"):
        answer_mixed(model, [(pictures(1)[0], Setting(size=20))])


def test_a_net_of_any_kind_at_a_setting(model):
    images = pictures(2)
    vit = loud(build(ViTConfig(image_size=16, patch=4, width=12, depth=1, heads=2, mlp_width=16, classes=4))).double().eval()
    with torch.no_grad():
        small = ms.models.transfer(vit, image_size=8)
        resized = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear", antialias=True)
        torch.testing.assert_close(run_at(vit, images, Setting(size=8)), small(resized), rtol=1e-12, atol=1e-12)
        assert torch.equal(AtSetting(vit, None)(images), vit(images))
        assert torch.equal(AtSetting(model, STAGES[0])(images), model(images, STAGES[0]))
    for setting in (Setting(size=8, keep=0.5), Setting(size=8, window=2)):
        with pytest.raises(ValueError, match="a ViT keeps every token and has no windows"):
            run_at(vit, images, setting)


def batches(*, bad=(), broken=False):
    images, labels = pictures(7), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    if broken:
        images[5] = torch.nan
    yield Batch(images[:4], labels[:4], tuple("abcd"), ())
    yield Batch(images[:0], labels[:0], (), tuple(BadFile(path, "torn") for path in bad))
    yield Batch(images[4:], labels[4:], tuple("efg"), ())


def test_every_setting_hears_the_same_pictures(model):
    left_out = []
    order = torch.tensor([2, 0, 1, 3])
    found = collect(model, STAGES, batches(bad=["x"]), torch.device("cpu"), torch.float32, lambda *bad: left_out.append(bad), classes=order)
    assert left_out == [("x", "torn")] and found.labels.tolist() == [2, 0, 1, 3, 2, 0, 1]
    for setting in STAGES:
        with torch.no_grad():
            torch.testing.assert_close(found.logits[setting], model(pictures(7), setting).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"setting 8/0.5: answers that are NaN"):
        collect(model, STAGES, batches(broken=True), torch.device("cpu"), torch.float32, print)
    with pytest.raises(ValueError, match="fewer than two pictures"):
        collect(model, STAGES, [], torch.device("cpu"), torch.float32, print)


def test_halves_share_nothing_and_miss_nothing():
    one, other = halves(101, 4)
    assert len(one) == 50 and sorted([*one.tolist(), *other.tolist()]) == list(range(101))
    assert one.tolist() == halves(101, 4)[0].tolist() != halves(101, 5)[0].tolist()


def test_pictures_are_prepared_for_the_largest_setting(model):
    model.preprocess = Preprocess(image_size=(16, 16))
    assert prepared(model, [None, *STAGES]).image_size == (16, 16)
    assert prepared(model, [Setting(size=8), Setting(size=(24, 16))]).image_size == (24, 16)
    model.preprocess = None
    with pytest.raises(ValueError, match="does not know how its pictures are prepared"):
        prepared(model, STAGES)


def table():
    cells = (
        Cell(setting=setting, macs=macs, p50=p50, p95=p50, reported=0.5)
        for setting, macs, p50 in zip(STAGES, (10**9, 2 * 10**9, 4 * 10**9), (0.01, 0.02, 0.04), strict=True)
    )
    return Costs(model="a", device="abacus", torch="2", threads=1, batch=8, precision="float32", cells=tuple(cells))


@pytest.mark.parametrize(
    "budget",
    [Budget("latency", 0.025), Budget("gflops", 2.5), Budget("throughput", 320), Budget("accuracy", 0.6), Budget("accuracy", 0.8)],
    ids=str,
)
def test_a_cascade_for_a_budget(budget):
    heard = verdict(answers(), "synthetic")
    found = best_cascade(table(), heard, budget)
    stages = [STAGES.index(setting) for setting in found.cascade.settings]
    spent = [budget.cost(cell, 8) for cell in table().cells]
    accuracy, cost, _ = outcome(heard.choosing, stages, found.cascade.thresholds, spent)
    assert cost <= budget.limit and accuracy >= (budget.amount if budget.kind == "accuracy" else 0)
    assert (found.accuracy, found.cost, list(found.cascade.shares)) == outcome(heard.reporting, stages, found.cascade.thresholds, spent)
    assert found.cascade.temperatures == tuple(heard.temperatures[i] for i in stages)
    assert found.seconds == pytest.approx(sum(s * table().cells[i].p50 for s, i in zip(found.cascade.shares, stages, strict=True)))
    right = heard.choosing.right.mean(axis=1)
    fits = [i for i in range(3) if spent[i] <= budget.limit and (budget.kind != "accuracy" or right[i] >= budget.amount)]
    if fits:
        best = min(fits, key=lambda i: spent[i]) if budget.kind == "accuracy" else max(fits, key=lambda i: right[i])
        assert found.alone == table().cells[best]
    else:
        assert budget.amount == 0.8 and found.alone is None and found.gain == "", "beyond every setting alone"


def test_cascades_of_these_pay_and_without_a_budget_are_as_accurate_as_any_setting():
    heard = verdict(answers(4000), "synthetic")
    found = best_cascade(table(), heard)
    assert outcome(heard.choosing, [STAGES.index(s) for s in found.cascade.settings], found.cascade.thresholds, (1, 2, 4))[0] >= max(
        heard.choosing.right.mean(axis=1)
    )
    points = curve(table(), heard)
    assert points == sorted(points) and [p[1] for p in points] == sorted(p[1] for p in points) and len(points) > 4
    alone = dict(zip((0.01, 0.02, 0.04), heard.reporting.right.mean(axis=1), strict=True))
    assert max(accuracy for cost, accuracy in points if cost <= 0.021) > alone[0.02], "a mean of 20 ms buys more than one setting of 20 ms"
    with pytest.raises(ValueError, match="`latency`: no cascade of two of these settings meets 5 ms"):
        best_cascade(table(), heard, Budget("latency", 0.005))
    assert heard.temperatures == sorted(heard.temperatures, reverse=True), "the first is the most too sure of itself"


def test_whether_a_cascade_pays():
    found = best_cascade(table(), verdict(answers(), "synthetic"), Budget("latency", 0.025))
    alone = replace(table().cells[0], reported=0.5)
    for accuracy, cost, gain in (
        (0.6, 9.0, "is more accurate and dearer"),
        (0.6, 1.0, "pays"),
        (0.6, 0.9, "pays"),
        (0.5, 0.9, "pays"),
        (0.5, 1.0, "does not pay"),
        (0.4, 1.0, "does not pay"),
        (0.4, 1.1, "does not pay"),
        (0.5, 1.1, "does not pay"),
        (0.4, 0.1, "is cheaper and less accurate"),
    ):
        assert found._replace(accuracy=accuracy, cost=cost, alone=alone, alone_cost=1.0).gain == gain


def test_files(tmp_path):
    file = tmp_path / "cascade.json"
    with pytest.raises(ValueError, match="no such file; `manyscale plan cost RUN --cascade` writes one"):
        read_cascade(file, "a")
    write_cascade(file, CASCADE)
    assert read_cascade(file, "a") == CASCADE
    with pytest.raises(ValueError, match=r"cascade.json: field `model`: calibrated for other weights \(a, these are b\)"):
        read_cascade(file, "b")
    written = json.loads(file.read_text())
    for change, message in (
        ({"thresholds": [0.5]}, "`thresholds`: 1 for 3 settings"),
        ({"thresholds": [0.5, math.nan]}, "NaN is no finite number"),
        ({"thresholds": [0.5, 1.5]}, "must be probabilities"),
        ({"temperatures": [1.0, 1.0, 0.0]}, "`temperatures`: .* must be positive"),
        ({"temperatures": [1.0]}, "`temperatures`: 1 for 3 settings"),
        ({"settings": written["settings"][:1], "thresholds": [], "temperatures": [1.0]}, "`settings`: 1 are no cascade"),
        ({"treshold": 1}, "unknown field `treshold` of Cascade"),
    ):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(ValueError, match=f"cascade.json: .*{message}"):
            read_cascade(file, "a")
