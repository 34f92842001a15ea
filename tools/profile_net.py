"""Where a batch's time goes, in this package's net and its peers': the profile behind a speed-up, or behind one that is not there.

python tools/profile_net.py swinv2_tiny --against transformers --compile --out docs/results/profile
"""

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn
from torch.profiler import ProfilerActivity, profile

from manyscale.models import build
from manyscale.presets import model_config
from manyscale.ship.bench import OURS, compiled_for, product_rate, step
from manyscale.ship.peers import peer, randomise
from manyscale.storage import origin, write, write_json

FUSED = "what a compiler fused: norms, GELUs, softmax, moving"
KINDS = {  # of operations, by what their names hold; the first that does
    FUSED: ("cpp_fused", "CompiledFxGraph"),
    "linear layers, with their GELU": ("linear", "addmm", "aten::mm"),
    "attention": ("scaled_dot_product", "flash", "bmm", "softmax"),
    "norms and unit vectors": ("norm", "div", "mul", "clamp", "rsqrt"),
    "moving and copying": ("copy", "cat", "index", "roll", "stack", "clone", "contiguous", "fill", "pad", "gather"),
    "sums": ("add", "sum", "mean"),
    "GELU alone": ("gelu",),
    "patches": ("conv",),
}


def times(call: Callable[[], None], rounds: int) -> dict[str, float]:
    """Milliseconds of a call by kind of operation: what each operation takes itself, without those that it calls."""
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        for _ in range(3):
            call()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(rounds):
                call()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        spent[kind] += event.self_cpu_time_total / 1e3 / rounds
    return spent


def measure(
    name: str,
    against: list[str],
    size: int,
    window: int,
    batch: int,
    precision: torch.dtype,
    rounds: int,
    *,
    compiled: bool,
    training: bool,
) -> dict[str, object]:
    """Of every net, and if asked of every net compiled too, and what the device gives at best; types and steps as in `manyscale bench`."""
    torch.manual_seed(0)
    fields = {key: value for key, value in (("image_size", size), ("window", window)) if value}
    config = model_config(name, **fields, drop_path=0.0)
    ours = randomise(build(config)).eval()
    nets: dict[str, nn.Module] = {OURS: ours, **{other: peer(other, ours) for other in against}}
    images, labels = torch.randn(batch, 3, *config.size), None
    if training:
        labels = torch.arange(batch) % config.classes
        way = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    else:
        nets, images = {key: net.to(precision) for key, net in nets.items()}, images.to(precision)
        way = torch.inference_mode()
    steps: dict[str, Callable[[], None]] = {}
    for key, net in nets.items():
        net.train(training)
        steps[key] = partial(step, net, net, images, labels)
        if compiled:
            steps[f"{key}, compiled"] = partial(step, net, compiled_for(net, training), images, labels)
    with way:
        found = {key: times(each, rounds) for key, each in steps.items()}
    return {
        "model": name,
        "image size": list(config.size),
        "window": window or getattr(config, "window", 0),
        "batch": batch,
        "training": training,
        "precision": str(precision).removeprefix("torch."),
        "GFLOPs a second of a matrix product": 2e-9 * product_rate(torch.device("cpu"), precision),
        "milliseconds": found,
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
        **origin(),
    }


def table(found: dict) -> str:
    """Markdown: milliseconds by kind."""
    nets = found["milliseconds"]
    kinds = [*KINDS, "the rest"]
    lines = [
        f"| ms a {'training step' if found['training'] else 'batch'} of {found['batch']} | {' | '.join(nets)} |",
        f"|---|{'---|' * len(nets)}",
    ]
    kinds = [kind for kind in kinds if any(net.get(kind) for net in nets.values())]
    lines += [f"| {kind} | {' | '.join(f'{net.get(kind, 0):.0f}' for net in nets.values())} |" for kind in kinds]
    lines.append(f"| together | {' | '.join(f'{sum(net.values()):.0f}' for net in nets.values())} |")
    about = f"{found['model']}, {found['image size'][0]} px, window {found['window']}, {found['precision']}; a matrix product gives "
    about += f"{found['GFLOPs a second of a matrix product']:.0f} GFLOP/s.\n"
    about += f"{found['machine']}, {found['date']}, manyscale {found['manyscale']}, `{found['command']}`."
    return "\n".join(lines) + f"\n\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--against", nargs="*", default=["timm"])
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--train", action="store_true", help="a forward and backward pass, under autocast where not in float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    precision = getattr(torch, given.dtype)
    found = measure(
        given.model, given.against, given.image_size, given.window, given.batch, precision, given.rounds,
        compiled=given.compile, training=given.train,
    )  # fmt: skip
    print(table(found))
    if given.out:
        name = f"{given.model}-{found['image size'][0]}-{found['window']}-{'train-' * given.train}{given.dtype}"
        Path(given.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(given.out) / f"{name}.json", found)
        write(Path(given.out) / f"{name}.md", table(found))


if __name__ == "__main__":
    main()
