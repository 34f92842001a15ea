"""How fast a net is beside other packages' nets with the same weights: compared first, then timed in turns."""

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyscale.config import NetConfig, Setting
from manyscale.config.memory import AttentionPath
from manyscale.models import build, set_attention
from manyscale.models.settings import AtSetting, frozen
from manyscale.plan.count import count
from manyscale.ship.measure import WARM_UP, apart, device_name, peak, time_call
from manyscale.ship.peers import PEERS, NoSuchNet, peer, randomise
from manyscale.storage import write

OURS = "manyscale"
AGREE = 1e-4  # of the largest logit, in float32
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the measure


class Row(NamedTuple):
    """What one net took."""

    name: str
    compiled: bool
    difference: float  # from ours, of the largest logit, before timing
    p50: float  # seconds of a batch
    p25: float
    p75: float
    peak: int | None  # bytes of a batch besides weights and images; None: not known, as on the CPU
    macs: int  # of the batch, the step's in training

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's, along whichever path of attention."""
        return self.name.split(",")[0] == OURS

    @property
    def label(self) -> str:
        """Its name, and whether it is compiled."""
        return f"{self.name}, compiled" if self.compiled else self.name


class Bench(NamedTuple):
    """A table, and where it was measured."""

    model: str
    about: dict[str, Any]  # image size, window, batch, precision, training, device, torch, threads
    product: float  # multiply-adds a second of a large matrix product in this precision
    rows: tuple[Row, ...]

    @property
    def batch(self) -> int:
        """Images."""
        return self.about["batch"]

    def rate(self, row: Row) -> float:
        """Multiply-adds a second."""
        return row.macs / row.p50

    def fastest(self, compiled: bool) -> Row:
        """The fastest peer."""
        return min((row for row in self.rows if not row.is_ours and row.compiled == compiled), key=lambda row: row.p50)

    def ratio(self, row: Row) -> float:
        """How many times as fast as the fastest peer, compiled or not as it is."""
        return self.fastest(row.compiled).p50 / row.p50


def bench(
    name: str,
    config: NetConfig,
    against: Sequence[str],
    *,
    batch: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    training: bool = False,
    compiled: bool = False,
    setting: Setting | None = None,
    paths: Sequence[AttentionPath] = ("auto",),
    report: Callable[[str], None] = print,
    rounds: int = 15,
    seed: int = 0,
) -> Bench:
    """Time a net with random weights and its peers.

    All start from the same weights, and must agree in float32 before they are timed. Then they run in turns, in an order drawn anew for
    each round. Inference in bfloat16 is of weights in bfloat16; training, under autocast, is a forward and backward pass of the mean
    logit's cross-entropy, without the optimiser.

    Args:
        compiled: every net also compiled; on the CPU with frozen weights where nothing is trained.
        setting: of a SuperViT or Swin; the peers have none and run the whole net.
        paths: of our attention, each timed as a net of its own.
        report: called with a sentence for every peer that has no such net.

    Raises:
        ValueError: a peer that is not known or not installed, or whose logits are others; no peer that has the net; no round or image; a
            path that the net or the device has not.
    """
    for field, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"field `{field}`: {value} must be at least 1")
    torch.manual_seed(seed)
    ours = randomise(build(config)).to(device).eval()
    names = [OURS if way == "auto" else f"{OURS}, {way}" for way in dict.fromkeys(paths)]
    along = {key: set_attention(copy.deepcopy(ours), way) for key, way in zip(names, dict.fromkeys(paths), strict=True)}
    nets = {**along, **_peers(ours, against, report)}
    images = torch.randn(batch, config.channels, *config.size, generator=torch.Generator().manual_seed(seed)).to(device)
    difference = differences(nets, images[:2])
    if setting:
        nets |= {key: AtSetting(net, setting) for key, net in along.items()}
    for net in nets.values():
        net.train(training)
    labels = torch.arange(batch, device=device) % config.classes
    with ExitStack() as stack:
        if training:
            stack.enter_context(torch.autocast(device.type, precision, enabled=precision != torch.float32))
        else:
            nets, images = {key: net.to(precision) for key, net in nets.items()}, images.to(precision)
            stack.enter_context(torch.inference_mode())
        calls: dict[tuple[str, bool], Callable[[], Any]] = {}
        for key, net in nets.items():
            for way in (False, True) if compiled else (False,):
                calls[key, way] = partial(step, net, compiled_for(net, training) if way else net, images, labels if training else None)
        seconds = _in_turns(calls, device, rounds, seed)
        peaks = {key: peak(call, device) for key, call in calls.items()}
        product = product_rate(device, precision)
    macs = {key: count(config, setting if key in along else None).macs * batch * (3 if training else 1) for key in nets}
    rows = tuple(
        Row(key, way, difference[key], *np.quantile(spent, (0.5, 0.25, 0.75)).tolist(), peaks[key, way], macs[key])
        for (key, way), spent in seconds.items()
    )
    about = {
        "image size": list(config.size), "batch": batch, "setting": str(setting or ""), "training": training,
        "precision": str(precision).removeprefix("torch."), "device": device_name(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "rounds": rounds,
    }  # fmt: skip
    return Bench(name, about, product, rows)


def _peers(ours: nn.Module, against: Sequence[str], report: Callable[[str], None]) -> dict[str, nn.Module]:
    found = {}
    for name in dict.fromkeys(against):
        try:
            found[name] = peer(name, ours).to(next(ours.parameters()).device)
        except NoSuchNet as error:
            report(f"left out {name}: {error}")
    if not found:
        raise ValueError(f"field `against`: none of {', '.join(against) or 'no packages'} has this net; give one of {', '.join(PEERS)}")
    return found


@torch.no_grad()
def differences(nets: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """How far every net's logits are from the first's, of the largest.

    Raises:
        ValueError: further than rounding explains.
    """
    expected = next(iter(nets.values()))(images)
    found = {key: apart(net(images), expected) for key, net in nets.items()}
    for key, far in found.items():
        if not far <= AGREE:
            raise ValueError(f"{key} answers otherwise than this net, by {far:.2g} of the largest logit: it is no measure")
    return found


def step(net: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor | None) -> None:
    """Images through `run`, which is the net or its compiled form; with labels a backward pass too, of the mean cross-entropy."""
    logits = run(images)
    if labels is not None:
        F.cross_entropy(logits, labels).backward()
        net.zero_grad()


def compiled_for(net: nn.Module, training: bool) -> Callable[[Tensor], Tensor]:
    """The net compiled; frozen where nothing is trained, as is usual for serving on a CPU."""
    run = torch.compile(net, dynamic=False)
    return run if training else frozen(run)


def _in_turns(
    calls: dict[tuple[str, bool], Callable[[], Any]], device: torch.device, rounds: int, seed: int
) -> dict[tuple[str, bool], list[float]]:
    """Seconds of every call in every round but the first few."""
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in calls}
    order = random.Random(seed)
    for number in range(WARM_UP + rounds):
        for key in order.sample(list(calls), len(calls)):
            spent, _ = time_call(calls[key], device)
            if number >= WARM_UP:
                seconds[key].append(spent)
    return seconds


def product_rate(device: torch.device, precision: torch.dtype) -> float:
    """Multiply-adds a second of a matrix product: what the device gives at best."""
    side = PRODUCT.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    times = [time_call(lambda: a @ b, device)[0] for _ in range(WARM_UP + 7)][WARM_UP:]
    return side**3 / float(np.median(times))


def draw(found: Bench, path: Path) -> None:
    """Images a second of every net, the quartiles as whiskers, as a picture."""
    from matplotlib.figure import Figure

    rows = sorted(found.rows, key=lambda row: -row.p50)
    speeds = [found.batch / row.p50 for row in rows]
    around = [[s - found.batch / row.p75 for s, row in zip(speeds, rows, strict=True)],
              [found.batch / row.p25 - s for s, row in zip(speeds, rows, strict=True)]]  # fmt: skip
    figure = Figure(figsize=(8, 1.1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["#2c6e9b" if row.is_ours else "#9aa5b1" for row in rows]
    axes.barh([row.label for row in rows], speeds, xerr=around, color=colours, error_kw={"lw": 1, "ecolor": "#1f2933"})
    for place, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        axes.annotate(f"{speed:.1f}", (found.batch / row.p25, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    what = "training" if found.about["training"] else "inference"
    about = f"{found.about['precision']}, batch {found.batch}, {found.about['device']}, {found.about['threads']} threads"
    axes.set_title(f"{found.model}, {'x'.join(map(str, found.about['image size']))} px, {what}\n{about}", fontsize=9, loc="left")
    axes.set_xlabel("images a second")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    write(path, lambda file: figure.savefig(file, dpi=110))
