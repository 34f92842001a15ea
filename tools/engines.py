"""How fast engines run exported nets on this CPU, ours beside timm's with the same weights, in turns.

    python tools/engines.py swinv2_tiny vit_small_patch16 --out docs/results/engines
    python tools/engines.py swinv2_tiny --image-size 384 --window 24

Both nets go the same way from torch to ONNX to OpenVINO. int8 ranges are of random images: they do not change the time.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from manyscale.cli.parsing import plain_table
from manyscale.models import create_model
from manyscale.ship.bench import compiled_for
from manyscale.ship.export import Engine, open_engine, write_engine
from manyscale.ship.measure import apart, device_name, time_call
from manyscale.ship.peers import peer, randomise
from manyscale.storage import origin, write, write_json

CPU = torch.device("cpu")
ENGINES = {  # format, dtype, int8
    "ONNX Runtime, float32": ("onnx", "float32", False),
    "OpenVINO, float32": ("openvino", "float32", False),
    "OpenVINO, bfloat16": ("openvino", "bfloat16", False),
    "OpenVINO, int8": ("openvino", "float32", True),
}


def engines(nets: dict[str, torch.nn.Module], images: torch.Tensor, place: Path) -> dict[tuple[str, str], Engine]:
    """What runs every net every way, by way and net."""
    found = {}
    shape = tuple(images.shape[1:])
    for name, net in nets.items():
        found["torch, float32", name] = net
        found["torch compiled and frozen, float32", name] = compiled_for(net, training=False)
        for way, (format, dtype, int8) in ENGINES.items():
            folder = place / name / way
            folder.mkdir(parents=True)
            write_engine(net, shape, folder, format=format, dtype=dtype, calibration=[torch.randn(8, *shape)] if int8 else None)
            found[way, name] = open_engine(folder, threads=torch.get_num_threads())
            print(f"  {name}: {way}", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def measured(name: str, fields: dict, batch: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    ours = randomise(create_model(name, **fields)).eval()
    nets = {"manyscale": ours, "timm": peer("timm", ours)}
    images = torch.randn(batch, 3, *ours.config.size)
    expected = ours(images)
    with tempfile.TemporaryDirectory() as place:
        runs = engines(nets, images, Path(place))
        differences = {key: apart(run(images), expected) for key, run in runs.items()}
        seconds = {key: [] for key in runs}
        order = random.Random(0)
        for number in range(2 + rounds):
            for key in order.sample(list(runs), len(runs)):
                spent, _ = time_call(lambda run=runs[key]: run(images), CPU)
                if number > 1:
                    seconds[key].append(spent)
    p50 = {key: float(np.median(spent)) for key, spent in seconds.items()}
    return [
        {"net": name, **fields, "batch": batch, "way": way, "ms": 1e3 * p50[way, "manyscale"], "timm ms": 1e3 * p50[way, "timm"],
         "over timm": p50[way, "timm"] / p50[way, "manyscale"], "over torch": p50["torch, float32", "manyscale"] / p50[way, "manyscale"],
         "difference": differences[way, "manyscale"]}
        for way in dict.fromkeys(way for way, _ in runs)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="+")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    fields = {key: value for key, value in (("image_size", given.image_size), ("window", given.window)) if value}
    rows = [row for name in given.nets for row in measured(name, fields, given.batch, given.rounds)]
    header = ("net", "way", "ms", "timm's ms", "over timm", "over torch", "difference")
    cells = [
        (row["net"], row["way"], f"{row['ms']:.0f}", f"{row['timm ms']:.0f}", f"{row['over timm']:.2f}", f"{row['over torch']:.2f}",
         f"{row['difference']:.0e}") for row in rows
    ]  # fmt: skip
    made = origin()
    size = "".join(f", {key.replace('_', ' ')} {value}" for key, value in fields.items())
    foot = (
        f"Batch {given.batch}{size}; medians of {given.rounds} rounds in turns; {device_name(CPU)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; {made['date']}, manyscale {made['manyscale']}, `{made['command']}`"
    )
    from rich.console import Console

    Console(width=160).print(plain_table(header, cells, right=2))
    print(foot)
    if given.out:
        name = "-".join([*given.nets, *(str(value) for value in fields.values())])
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in cells)]
        write(Path(given.out) / f"{name}.md", "\n".join([*lines, "", foot, ""]))
        write_json(Path(given.out) / f"{name}.json", {**made, "about": foot, "rows": rows})


if __name__ == "__main__":
    main()
