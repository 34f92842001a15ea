"""Block 3 of the GPU checks: peak memory and time of a training step, beside what `manyscale plan memory` says.

    python tools/gpu/small.py --out docs/results/gpu
    python tools/gpu/small.py --device cpu --quick --out /tmp/small     # to try the script; nothing of it is a result

Each point in a process of its own: swinv2_large and swinv2_giant at 1536 pixels in windows of 32, one image, AdamW under autocast.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from manyscale.storage import origin, write

WAYS = {
    "naive": {},
    "sequential": {"sequential": 2},
    "kernel": {"attention": "kernel"},
    "checkpointed": {"checkpointing": "blocks"},
    "selective": {"checkpointing": "selective"},
    "sequential, checkpointed": {"sequential": 2, "checkpointing": "blocks"},
    "kernel, checkpointed": {"attention": "kernel", "checkpointing": "blocks"},
}
GIANT = ("sequential, checkpointed", "kernel, checkpointed")  # the rest cannot fit


def point(name: str, fields: dict, way: str, device: str, steps: int) -> dict:
    """GiB at most in a step and the median of its seconds, and what was planned."""
    import torch

    import manyscale as ms
    from manyscale.config import Memory, Optim
    from manyscale.plan.activations import activations
    from manyscale.plan.memory import memory, shardings, step
    from manyscale.train.shard import fit
    from manyscale.train.state import State

    how, cuda = Memory(**WAYS[way]), device == "cuda"
    with torch.device(device):
        model = fit(ms.create_model(name, **fields), how).train()
        images = torch.randn(1, 3, *model.config.size)
        labels = torch.zeros(1, dtype=torch.long)
    optimiser = State(model, Optim()).optimiser
    planned = step(activations(model.config, how, device=device), memory(model.config), shardings(1)[0], "bfloat16")
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    most = torch.cuda.max_memory_allocated() if cuda else 0
    return {"peak": most / 2**30, "planned": planned / 2**30, "seconds": statistics.median(seconds[1:]), "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--point", help="one point, as JSON, in this process")
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(**json.loads(given.point))))
        return
    small = {"image_size": 128, "window": 8, "depths": (1, 1, 1, 1)} if given.quick else {"image_size": 1536, "window": 32}
    points = [("swinv2_large", way) for way in WAYS] + [("swinv2_giant", way) for way in GIANT]
    if given.quick:
        points = [("swinv2_tiny", way) for way in WAYS if given.device == "cuda" or "kernel" not in way]
    rows = ["| net | way | peak GiB | planned GiB | seconds a step |", "|---|---|---|---|---|"]
    for name, way in points:
        task = json.dumps({"name": name, "fields": small, "way": way, "device": given.device, "steps": 4})
        command = [sys.executable, __file__, "--out", str(given.out), "--point", task]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows.append(f"| {name} | {way} | {(done.stderr.strip().splitlines() or ['killed'])[-1][:120]} | | |")
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append(f"| {name} | {way} | {found['peak']:.2f} | {found['planned']:.2f} | {found['seconds']:.3f} |")
        print(rows[-1], flush=True)
    import torch

    made = origin()
    what = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    foot = f"{small}, one image, AdamW, bfloat16 autocast; {what}, torch {torch.__version__}, {made['date']}, manyscale {made['manyscale']}"
    write(given.out / f"{made['date']}-small.md", "\n".join([*rows, "", foot, ""]))


if __name__ == "__main__":
    main()
