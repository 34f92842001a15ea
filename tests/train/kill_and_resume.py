"""Shows that `kill -9` costs nothing but time: python tests/train/kill_and_resume.py

Trains a tiny run to its end; trains it again in another folder, killed without warning several times; compares the two
folders' last state and best weights, bit by bit.
"""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

RUN = ["cifar10", "--tiny", "--epochs", "1", "--batch", "96", "--depths", "1", "1", "--save-steps", "3", "--log-every", "1"]
RUN += ["--workers", "1", "--drop-path", "0.2", "--ema", "0.9"]


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "manyscale", "train", *RUN, "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit(f"the run failed: {errors}")


def steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def fingerprint(folder: Path) -> dict[str, str]:
    last = sorted(folder.glob("step_*"))[-1]
    tensors = load_file(next(last.glob("*.safetensors")))
    state = hashlib.sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
    best = hashlib.sha256((folder / "best" / "model.safetensors").read_bytes()).hexdigest()
    return {"last checkpoint": f"{last.name} {state[:16]}", "best weights": best[:16]}


def compare(root: Path, kills: int, seed: int) -> tuple[dict[str, str], dict[str, str], list[int]]:
    """Fingerprints of the undisturbed and of the killed run, and the steps at which it was killed."""
    finish(start(root / "whole"))
    chance, killed = random.Random(seed), []
    for _ in range(kills):
        process, before, extra = start(root / "killed"), steps(root / "killed"), chance.randint(1, 5)
        while process.poll() is None and steps(root / "killed") < before + extra:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed.append(steps(root / "killed"))
        process.wait()
        process.stderr.close()
    finish(start(root / "killed"))
    return fingerprint(root / "whole"), fingerprint(root / "killed"), killed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        whole, broken, at = compare(Path(root), kills=3, seed=time.time_ns())
    print(f"killed -9 at steps {at}")
    for name in whole:
        print(f"{name:16} undisturbed {whole[name]}   killed {broken[name]}   {'equal' if whole[name] == broken[name] else 'DIFFERENT'}")
    sys.exit(whole != broken)
