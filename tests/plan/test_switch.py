"""Choosing a setting: the front, budgets and what is said of them, tables in files and what is refused of them."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyscale.config import Setting
from manyscale.plan.switch import (
    Budget,
    Cell,
    Costs,
    add_costs,
    answer,
    choose,
    find_costs,
    front,
    front_of,
    read_budget,
    read_costs,
    remarks,
    table,
)

PLACE = {"device": "abacus", "torch": "2.15.0", "threads": 2, "precision": "float32"}


def cell(text, milliseconds, accuracy=None, giga=1.0, tail=1.25):
    setting = Setting.read(text)
    return Cell(setting=setting, macs=round(giga * 1e9), p50=milliseconds / 1e3, p95=tail * milliseconds / 1e3, accuracy=accuracy)


def costs(*cells, batch=8, **fields):
    return Costs(**{"model": "a" * 32, "batch": batch, **PLACE, "cells": cells, **fields})


FOUR = costs(cell("128/0.5", 10, 0.6, 0.7), cell("128", 20, 0.7, 1.4), cell("224/0.5", 30, 0.65, 2.3), cell("224", 60, 0.8, 4.6))

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


@settings(deadline=None)
@given(POINTS)
def test_nothing_on_the_front_is_dominated_and_all_else_is(points):
    best = front(points)
    for i, (cost, value) in enumerate(points):
        no_worse = [points[j] for j in best if points[j][0] <= cost and points[j][1] >= value]
        if i in best:
            assert set(no_worse) == {(cost, value)}, "only its equals are as cheap and as good"
        else:
            assert any(other != (cost, value) for other in no_worse), "something on the front beats it"
    values = [points[i] for i in best]
    assert values == sorted(values), "the cheapest first, and then also the worst"


SOME = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9)


@settings(deadline=None)
@given(SOME, st.sampled_from(["latency", "gflops", "throughput"]), st.integers(1, 9), st.booleans())
def test_the_best_within_a_budget(rows, kind, amount, known):
    given_cells = [cell(f"{16 + i}", ms, right / 10 if known else None, giga) for i, (ms, right, giga) in enumerate(rows)]
    measured = costs(*given_cells, batch=4)
    budget = Budget(kind, {"latency": amount / 1e3, "gflops": amount, "throughput": 4000 / amount}[kind])

    def cost(one):
        return {"latency": one.p50, "gflops": one.macs / 1e9, "throughput": one.p50 / 4}[kind]

    met = [one for one in given_cells if cost(one) <= budget.limit]
    if not met:
        nearest = min(map(cost, given_cells))
        with pytest.raises(ValueError, match=f"field `{kind}`: no setting meets .*; the nearest, .* at batch 4 on abacus") as refusal:
            choose(measured, budget)
        assert budget.say(nearest) in str(refusal.value)
        return
    chosen = choose(measured, budget)
    assert chosen in met and chosen in front_of(measured, budget)
    assert chosen.value == max(one.value for one in met)
    assert cost(chosen) == min(cost(one) for one in met if one.value == chosen.value)


def test_what_is_said_of_a_budget():
    assert answer(FOUR, Budget("latency", 0.032)) == (
        "32 ms at batch 8: 128/1, top-1 70.00%; 20 ms a batch, 1.4 GFLOPs, 400 images/s, 3.00 x as fast as 224/1"
    )
    assert answer(FOUR, Budget("latency", 0.022)).endswith("in one batch of twenty it takes 25 ms or longer, more than the budget")
    assert "224/1, top-1 80.00%" in answer(FOUR, Budget("throughput", 133))
    assert "128/0.5, top-1 60.00%" in answer(FOUR, Budget("gflops", 1))
    assert "128/1, top-1 70.00%" in answer(FOUR, Budget("accuracy", 0.65)), "224/0.5 reaches it too, but is slower"
    bare = costs(cell("128", 20, None, 1.4), cell("224", 60, None, 4.6))
    assert "224/1, of those that meet it the one that computes most (no accuracy known)" in answer(bare, Budget("latency", 1))
    with pytest.raises(ValueError, match=r"`latency`: no setting meets 5 ms; the nearest, 128/0.5, has 10 ms at batch 8 on abacus"):
        answer(FOUR, Budget("latency", 0.005))
    with pytest.raises(ValueError, match=r"`accuracy`: no setting reaches 90.00%; the best, 224/1, has 80.00%"):
        answer(FOUR, Budget("accuracy", 0.9))
    with pytest.raises(ValueError, match="no accuracy was measured; give --data"):
        answer(bare, Budget("accuracy", 0.5))


def test_where_dropping_does_not_pay_is_said():
    assert remarks(FOUR) == []
    some = costs(cell("128/0.5", 30), cell("128", 20), cell("224/0.5", 30), cell("224", 60), cell("160/0.5", 70))
    (said,) = remarks(some)
    assert said.startswith("dropping tokens pays not everywhere (1 of 2 pruned settings are no faster than the whole) at batch 8 on abacus")
    assert said.endswith(": 128/0.5 takes 1.50 x the time of 128/1")
    assert remarks(costs(cell("128/0.5", 20), cell("128", 20)))[0].startswith("dropping tokens pays nowhere at batch 8")


@pytest.mark.parametrize(
    ("given_words", "expected"),
    [
        ({"latency": "20ms"}, Budget("latency", 0.02)),
        ({"latency": "0.5 S"}, Budget("latency", 0.5)),
        ({"latency": "800us"}, Budget("latency", 8e-4)),
        ({"gflops": 2.0}, Budget("gflops", 2.0)),
        ({"throughput": 500.0}, Budget("throughput", 500.0)),
        ({"accuracy": 0.75}, Budget("accuracy", 0.75)),
        ({}, None),
    ],
)
def test_budgets(given_words, expected):
    assert read_budget(**given_words) == expected


@pytest.mark.parametrize(
    ("given_words", "message"),
    [
        ({"latency": "20"}, "`latency`: '20' is no time; write 20ms"),
        ({"latency": "soon"}, "`latency`: 'soon' is no time"),
        ({"latency": "-1ms"}, "is no time"),
        ({"latency": "0ms"}, "`latency`: 0 must be positive"),
        ({"gflops": 0.0}, "`gflops`: 0 must be positive"),
        ({"gflops": math.nan}, "`gflops`: nan must be positive"),
        ({"throughput": math.inf}, "`throughput`: inf must be positive"),
        ({"accuracy": 75.0}, "`accuracy`: 75 must be at most 1"),
        ({"latency": "20ms", "gflops": 2.0}, "give one budget: --latency or --gflops"),
    ],
)
def test_budgets_that_are_none(given_words, message):
    with pytest.raises(ValueError, match=message):
        read_budget(**given_words)


def test_the_table_in_words():
    heading, *rows = table(FOUR)
    assert len({len(row) for row in (heading, *rows)}) == 1
    assert [row[0] for row in rows] == ["*", "*", "", "*"] and [row[1] for row in rows] == ["128/0.5", "128/1", "224/0.5", "224/1"]
    known = dict(zip(heading, rows[0], strict=True))
    assert (known["ms"], known["p95"], known["images/s"], known["peak MiB"], known["top-1"]) == ("10.00", "12.50", "800.0", "", "60.00%")
    assert known["speed-up"] == "6.00" and known["/ GFLOPs saved"] == f"{6 / (4.6 / 0.7):.2f}"


def test_a_file_holds_a_table_for_every_place_and_batch(tmp_path):
    file = tmp_path / "runs" / "costs.json"
    one = replace(FOUR, batch=1)
    elsewhere = replace(FOUR, device="slide rule")
    again = replace(FOUR, cells=(replace(FOUR.cells[0], peak=7, ece=0.1, temperature=1.5),))
    for added in (FOUR, one, elsewhere, again):
        add_costs(file, added)
    assert list(read_costs(file).values()) == [again, one, elsewhere]
    assert next(iter(read_costs(file))) == "abacus | 2 threads | torch 2.15.0 | float32 | batch 8"
    assert find_costs(file, "a" * 32, {**PLACE, "batch": 1, "compiled": False}) == one
    with pytest.raises(
        ValueError, match=r"costs.json: measured elsewhere or otherwise: `device` is .* there and sundial here; measure here"
    ):
        find_costs(file, "a" * 32, {**PLACE, "device": "sundial"})
    with pytest.raises(ValueError, match=r"`torch` is 2.15.0 there and 9.9.9 here, `batch` is 8 there and 3 here"):
        find_costs(file, "a" * 32, {**PLACE, "batch": 3, "torch": "9.9.9"})
    with pytest.raises(ValueError, match=r"field `model`: measured on other weights \(aaaaaaaaaaaa, these are bbbbbbbbbbbb\)"):
        find_costs(file, "b" * 32, PLACE)
    with pytest.raises(ValueError, match="other weights"):
        add_costs(file, replace(FOUR, model="b" * 32))


def test_files_that_are_none(tmp_path):
    file = tmp_path / "costs.json"

    def refused(message, text=None, change=None):
        if text is None:
            add_costs(file, FOUR)
            values = json.loads(file.read_text())
            change(values, values["tables"][FOUR.key])
            text = json.dumps(values)
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as refusal:
            find_costs(file, "a" * 32, PLACE)
        assert str(file) in str(refusal.value)
        file.unlink()

    refused("not JSON, perhaps half-written", '{"format": 1')
    refused("not a table of costs of this version", "{}")
    refused("not a table of costs of this version", change=lambda whole, one: whole.update(format=2))
    refused("not a table of costs of this version", change=lambda whole, one: whole.update(notes=""))
    refused("no tables; measure with", '{"format": 1, "tables": {}}')
    refused("unknown field `bacth` of Costs; did you mean `batch`", change=lambda whole, one: one.update(bacth=one.pop("batch")))
    refused("field `p95` of Cell is missing", change=lambda whole, one: one["cells"][0].pop("p95"))
    refused("not JSON, perhaps half-written: NaN is no finite number", change=lambda whole, one: one["cells"][0].update(p50=math.nan))
    refused("field `p50`: .* not above p95", change=lambda whole, one: one["cells"][0].update(p50=9.0))
    refused("field `macs`: expected int, found '9'", change=lambda whole, one: one["cells"][0].update(macs="9"))
    refused(r"field `keep`: 0.0 must be in \(0, 1\]", change=lambda whole, one: one["cells"][0]["setting"].update(keep=0))
    refused("`temperature`: 0.0 must be positive", change=lambda whole, one: one["cells"][0].update(temperature=0))
    refused("some settings have an accuracy and some have none", change=lambda whole, one: one["cells"][0].update(accuracy=None))
    refused("a setting appears twice", change=lambda whole, one: one["cells"].append(one["cells"][0]))
    refused("needs at least one setting", change=lambda whole, one: one.update(cells=[]))
    refused("says of itself .* it was edited: measure again", change=lambda whole, one: one.update(torch="9"))
    other = replace(FOUR, model="b" * 32, batch=2)
    refused(
        "holds tables of several models", change=lambda whole, one: whole["tables"].update({other.key: {**one, "model": "b", "batch": 2}})
    )
