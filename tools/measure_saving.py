"""What a checkpoint costs: writing, the manifest, verification, and how long training waits where it is written beside it.

python tools/measure_saving.py swinv2_tiny --out docs/results/saving
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

import manyscale as ms
from manyscale.config import Optim
from manyscale.storage import origin, write, write_json
from manyscale.train import checkpoint
from manyscale.train.checkpoint import Writer, read_tensors, save_checkpoint, verify
from manyscale.train.state import State


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Nothing:
    """In place of a hash."""

    def update(self, content: bytes) -> None:
        pass


def written(path: Path, content: bytes, hasher: type) -> float:
    """Seconds to write a file, as a checkpoint's is, with some hash."""
    real, checkpoint.xxhash.xxh3_128 = checkpoint.xxhash.xxh3_128, hasher
    content = bytes(bytearray(content))  # from memory, not from the cache, as tensors come
    try:
        with checkpoint._Hashing(path.open("wb", buffering=0)) as file:
            return seconds(lambda: file.write(content))
    finally:
        checkpoint.xxhash.xxh3_128 = real
        path.unlink()


def measure(name: str, rounds: int) -> dict[str, float]:
    """Medians of seconds; each round does everything once, so that what slows the machine slows all alike."""
    state = State(ms.create_model(name), Optim(ema=0.9))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimiser.step()
    tensors, found = state.tensors(), {}
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/tmp")))
    writer = Writer(checkpoint.ALONE)
    try:
        for step in range(rounds):
            whole = seconds(lambda step=step: save_checkpoint(folder, step, tensors, {}))
            path = folder / f"step_{step:08d}"
            into = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
            once = {"save": whole, "verify": seconds(lambda path=path: verify(path))}
            content = next(path.glob("*.safetensors")).read_bytes()
            for _ in range(3):
                found.setdefault("hashed", []).append(written(folder / "file", content, xxhash.xxh3_128))
                found.setdefault("plain", []).append(written(folder / "file", content, Nothing))
            once["load"] = seconds(lambda path=path, into=into: read_tensors(path, into))
            once["blocked"] = seconds(lambda step=step: writer.save(folder, step, tensors, {}, keep=1))
            once["beside"] = once["blocked"] + seconds(writer.wait)
            for key, value in once.items():
                found.setdefault(key, []).append(value)
    finally:
        shutil.rmtree(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    row = {"GiB": size / 2**30} | {key: statistics.median(values[1:]) for key, values in found.items()}  # the first round warms up
    return row | {"manifest": row.pop("hashed") - row.pop("plain")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = {name: measure(name, given.rounds) for name in given.models}
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    about = {**origin(), "machine": machine, "torch": torch.__version__}
    header = ("model", "state, GiB", "save", "manifest", "verify", "load", "loop waits", "manifest + verify over save", "waits over save")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        times = " | ".join(f"{1000 * row[key]:.0f} ms" for key in ("save", "manifest", "verify", "load", "blocked"))
        shares = f"{(row['manifest'] + row['verify']) / row['save']:.1%} | {row['blocked'] / row['save']:.1%}"
        lines.append(f"| {name} | {row['GiB']:.2f} | {times} | {shares} |")
    text = "\n".join(lines)
    print(text)
    if given.out:
        head = ", ".join([f"`{about['command']}`", f"manyscale {about['manyscale']}", about["date"], machine, f"torch {about['torch']}."])
        write(
            given.out.with_suffix(".md"),
            f"# What a checkpoint costs\n\n{head}\nWeights, moving average and AdamW's moments, in float32.\n\n{text}\n",
        )
        write_json(given.out.with_suffix(".json"), about | {"rows": rows})
        print(json.dumps(about))


if __name__ == "__main__":
    main()
