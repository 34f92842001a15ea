"""The most that a training step has alive on a CPU, measured, beside what `manyscale plan memory` says.

    python tools/measure_memory.py small            # minutes: a process for each point, a table, and small.json in --out
    python tools/measure_memory.py large            # swinv2_large at 768 and 1536 pixels: up to 20 GiB, and many minutes
    python tools/measure_memory.py time             # steps of the same net in turns: what the lean ways cost

Measured is every byte that torch's CPU allocator gives and takes back during the second step, from its profiler's events, on top of
weights, optimiser state and images. What libraries take past that allocator is not in it.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TINY, LARGE = {"image_size": 384, "window": 24}, {"image_size": 768, "window": 32}
WAYS = {
    "naive": {},
    "sequential": {"sequential": 2},
    "selective": {"checkpointing": "selective"},
    "blocks": {"checkpointing": "blocks"},
    "both": {"sequential": 2, "checkpointing": "blocks"},
}
# name, fields of the net, images, precision, way
POINTS: dict[str, list[tuple[str, dict[str, Any], int, str, str]]] = {
    "small": [
        ("swinv2_tiny", {}, 2, "float32", "naive"),
        ("swinv2_tiny", {}, 2, "bfloat16", "naive"),
        *(("swinv2_tiny", TINY, 1, "float32", way) for way in WAYS),
        *(("swinv2_tiny", TINY, 1, "bfloat16", way) for way in ("naive", "both")),
        ("swin_tiny", {}, 4, "float32", "naive"),
        ("vit_small_patch16", {}, 8, "float32", "naive"),
        ("vit_small_patch16", {}, 8, "bfloat16", "blocks"),
        ("supervit_deit_small", {}, 8, "float32", "naive"),
        ("supervit_lvvit_small", {}, 4, "bfloat16", "naive"),
    ],
    "large": [
        *(("swinv2_large", LARGE, 1, "bfloat16", way) for way in WAYS),
        *(("swinv2_large", LARGE | {"image_size": 1536}, 1, "bfloat16", way) for way in ("both", "blocks")),
    ],
    "time": [("swinv2_tiny", TINY, 2, precision, way) for precision in ("float32", "bfloat16") for way in WAYS],
}


class Step:
    """A net with its optimiser, and a training step of it."""

    def __init__(self, name: str, fields: dict[str, Any], batch: int, precision: str, way: str) -> None:
        import torch

        import manyscale as ms
        from manyscale.config import Memory, Optim
        from manyscale.train.shard import fit
        from manyscale.train.state import State

        torch.manual_seed(0)
        self.memory, self.batch, self.precision = Memory(**WAYS[way]), batch, precision
        self.model = fit(ms.create_model(name, **fields), self.memory).train()
        self.config = config = self.model.config
        self.images, self.labels = torch.randn(batch, config.channels, *config.size), torch.randint(config.classes, (batch,))
        self.optimiser = State(self.model, Optim()).optimiser
        for parameter in self.model.parameters():  # a step of nothing, so that there are moments
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def go(self) -> None:
        """Forward, backward, optimiser; gradients stay, as the profiler is to see them."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimiser.step()

    def alive(self) -> int:
        """Bytes between two steps."""
        moments = (tensor for state in self.optimiser.state.values() for tensor in state.values())
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *moments, self.images))

    def measured(self) -> int:
        """Bytes alive at most during a step."""
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.go()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = self.alive()
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    def planned(self) -> tuple[int, int]:
        """The same as planned, and the activations of it."""
        from manyscale.plan.activations import activations, walk
        from manyscale.plan.memory import memory, shardings, step

        parts = activations(self.config, self.memory, batch=self.batch, precision=self.precision, device="cpu")
        return step(parts, memory(self.config), shardings(1)[0], self.precision), max(walk(parts)[1:])


def times(points: list[tuple[str, dict[str, Any], int, str, str]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step of every point, the points in turns."""
    steps, spent = [Step(*point) for point in points], [[] for _ in points]
    for turn in range(rounds + 1):
        for step, seconds in zip(steps, spent, strict=True):
            began = time.process_time()
            step.go()
            step.optimiser.zero_grad()
            if turn:
                seconds.append(time.process_time() - began)
    return [{"seconds": statistics.median(seconds), "all": seconds} for seconds in spent]


def alone(kind: str, place: int) -> dict[str, Any]:
    """A point in a process of its own."""
    done = subprocess.run([sys.executable, __file__, kind, "--point", str(place)], capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=POINTS)
    parser.add_argument("--point", type=int, help="only this one, as JSON, in this process")
    parser.add_argument("--rounds", type=int, default=5, help="of time")
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory"))
    given = parser.parse_args()
    import torch

    from manyscale.storage import origin, write_json

    torch.set_num_threads(1)
    if given.point is not None:
        step = Step(*POINTS[given.kind][given.point])
        planned, activations = step.planned()
        print(json.dumps({"measured": step.measured(), "planned": planned, "alive": step.alive(), "activations": activations}))
        return

    points, rows = POINTS[given.kind], []
    found = times(points, given.rounds) if given.kind == "time" else (alone(given.kind, place) for place in range(len(points)))
    for point, result in zip(points, found, strict=True):
        name, fields, batch, precision, way = point
        rows.append({"name": name, **fields, "batch": batch, "precision": precision, "way": way, **result})
        cells = [name, "/".join(map(str, fields.values())) or "preset", str(batch), precision, way]
        if "measured" in result:
            over = result["planned"] / result["measured"] - 1
            cells += [f"{result[key] / 2**20:,.1f}" for key in ("alive", "measured", "planned")] + [f"{over:+.1%}"]
        cells += [f"{result['seconds']:.2f} s"] if "seconds" in result else [result["failed"]] if "failed" in result else []
        print("| " + " | ".join(cells) + " |", flush=True)
    about = {**origin(), "machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    write_json(given.out / f"{given.kind}.json", {**about, "points": rows})


if __name__ == "__main__":
    main()
