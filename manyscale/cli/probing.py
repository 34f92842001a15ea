"""Verbs that ask what a model's features know: fewshot."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from tyro.conf import Positional

from manyscale.cli.parsing import parse, plain
from manyscale.storage import write_json


def fewshot(arguments: list[str]) -> None:
    """What a model's features know of a set: linear regression on 1, 5, 10, 25 pictures a class."""

    def run(
        model: Positional[str],
        data: str = "",
        split: str = "val",
        shots: tuple[int, ...] = (1, 5, 10, 25),
        seeds: int = 3,
        l2: tuple[float, ...] = (1024.0,),
        fewer: bool = False,
        statistics: Literal["imagenet", "half"] | None = None,
        batch: int = 64,
        workers: int = -1,
        device: str = "auto",
        json_lines: bool = False,
        out: str = "",
    ) -> None:
        """Few-shot linear evaluation, as big_vision's: the model is frozen, a ridge regression learns the classes.

        Args:
            model: a run's folder or a folder with a model.
            data: a set by name or folder; empty: the one it was trained on.
            split: what is scored: val, test, or another split folder. The few pictures come from train.
            shots: pictures of every class to learn from.
            seeds: how often they are drawn.
            l2: penalties of the regression; the papers' 1024 suits 768 features and more, small models want less.
            fewer: where a class has fewer pictures than shots, take what it has.
            statistics: mean and deviation of the pictures, for a model that does not bring its own.
            batch: pictures at a time.
            workers: loader processes.
            device: where to compute.
            json_lines: print a line of JSON for every shot count and l2 instead of a table.
            out: a JSON file for all of it; empty: none.
        """
        from manyscale.ship.fewshot import probe

        bad: list[str] = []
        scores = probe(
            model,
            lambda path, reason: bad.append(f"left out {plain(path)}: {plain(reason)}"),
            data=data,
            split=split,
            shots=shots,
            seeds=seeds,
            l2s=l2,
            fewer=fewer,
            statistics=statistics,
            batch=batch,
            workers=workers,
            device=device,
        )
        print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
        for count, names in scores.short.items():
            held = ", ".join(f"{name} has {number}" for name, number in list(names.items())[:10])
            rest = f", and {len(names) - 10} classes more" if len(names) > 10 else ""
            print(f"fewer than {count} pictures, all of them taken: {held}{rest}", file=sys.stderr)
        if json_lines:
            print("\n".join(json.dumps(row) for row in scores.rows()))
        else:
            _print_scores(model, split, scores)
        if out:
            write_json(Path(out), {"model": model, "data": data, "split": split, **scores.as_json(), "bad_files": len(bad)})
            print(f"wrote {out}", file=sys.stderr)

    parse(run, "fewshot", arguments)


def _print_scores(model: str, split: str, scores: Any) -> None:
    numbers = ("shots", "pictures", "l2", "top-1", "deviation")
    table = Table(*(Column(name, justify="right") for name in numbers), "", box=None, pad_edge=False)
    best, grid = scores.best(), len(scores.l2s) > 1
    pictures = dict(zip(scores.shots, scores.pictures, strict=True))
    for row in scores.rows():
        count, l2, deviation = row["shots"], row["l2"], row["deviation"]
        spread = "" if deviation is None else f"± {deviation:.2%}"
        table.add_row(
            str(count), f"{pictures[count]:,}", f"{l2:g}", f"{row['accuracy']:.2%}", spread, "best" if grid and best[count][0] == l2 else ""
        )
    Console(highlight=False).print(table)
    seeds = scores.accuracy.shape[1]
    print(f"{model} on {split}: {scores.test_pictures:,} pictures of {scores.classes} classes, {seeds} draw{'s' * (seeds > 1)} of the few")
    if grid:
        print("the best l2 was picked on these very pictures, so its number is optimistic; to quote one, fix l2 beforehand")
