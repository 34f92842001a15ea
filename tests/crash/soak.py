"""A run that is tormented to its end, and ends with the weights of the run that was left alone, bit by bit: python -m tests.crash.soak

    --steps N     of the run (10,000)
    --every N     steps from fault to fault, about (50)
    --kills N     instead: so many kill -9, over three seeds on 1 and on 2 ranks

Sums of gradients are exact (`--elastic exact`), so that a sitting may have one rank or two.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from manyscale.config import Augment, Input, Optim, Parallel, Run, Schedule, SwinConfig
from manyscale.train import loop
from manyscale.train.checkpoint import checkpoints, load_checkpoint, newest_checkpoint
from tests.crash.states import flip
from tests.ranks.team import Team, together

SAVE = 25  # steps from checkpoint to checkpoint
PATIENCE = 120  # seconds without a step, after which something hangs
# What may end a sitting; what `kill` and those after it leave is then damaged, for some of them.
KINDS = ("kill", "terminate", "flip", "truncate", "stale", "full disk", "worker", "one rank of two")


def tiny(out: Path, steps: int, seed: int = 0, beside: bool = True) -> Run:
    """A run whose steps cost little and whose every part depends on chance."""
    return Run(
        recipe="soak",
        model=SwinConfig(image_size=8, patch=2, window=2, width=8, depths=(1,), heads=(1,), mlp_ratio=1.0, drop_path=0.2),
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0, held_out=50, loader_timeout=30),
        augment=Augment(scale=(0.5, 1.0), color_jitter=0.0, erase=0.0, mixup=0.4, cutmix=0.0, smoothing=0.1),
        optim=Optim(lr=2e-3, ema=0.9),
        schedule=Schedule(
            length=f"{steps}-steps", warmup="10-steps", evaluate_every=f"{steps}-steps", save_steps=SAVE, save_minutes=0, save_beside=beside
        ),
        batch=2,
        accumulate=2,
        precision="float32",
        seed=seed,
        out=str(out),
        log_every=1,
        parallel=Parallel(elastic="exact", timeout=30.0),
    )


def sitting(run: Run, largest: int = 0) -> int:
    """Train, as a process of its own; `largest`: bytes a checkpoint's file may have, which stands for a full disk."""
    from manyscale.tasks.classify import Classify
    from manyscale.tasks.pictures import Pictures
    from manyscale.train import checkpoint
    from manyscale.train.log import Log

    Log.curves = Pictures.draw = Classify.draw = lambda *arguments: None
    multiprocessing.current_process()._config["daemon"] = False  # else it may have no loader workers
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):  # what is wrong comes back by the team
        os.dup2(nowhere, handle)
    if largest:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        real = checkpoint.dcp.save

        def save(*arguments, **named):  # the limit is of the process, whose log grows too
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            try:
                return real(*arguments, **named)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        checkpoint.dcp.save = save
    loop.train(run)
    return 0


def step(run: Run) -> int:
    """The last step that the log holds."""
    file = Path(run.out) / "metrics.jsonl"
    with suppress(OSError, ValueError, IndexError, KeyError), file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - 1000, 0))
        return json.loads(opened.read().splitlines()[-2])["step"]
    return 0


def digest(run: Run) -> str:
    """Of all tensors of the last checkpoint, and of the best weights."""
    tensors, values = load_checkpoint(Path(run.out), print)
    assert values["step"] == values["steps"], values["step"]
    whole = b"".join(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(whole + (Path(run.out) / "best" / "model.safetensors").read_bytes()).hexdigest()


def workers(process: int) -> list[int]:
    """The loader workers of a process."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


class Torment:
    """Sittings of a run, each ended by a fault."""

    def __init__(self, folder: Path, run: Run, chance: random.Random, ranks: tuple[int, ...] = (1, 2)) -> None:
        self.folder, self.run, self.chance, self.ranks = folder, run, chance, ranks
        self.counts, self.lost, self.notes = Counter(), [], []

    def sit(self, kind: str, until: int) -> bool:
        """One sitting, which a fault ends at about a step. Whether the run came to its end instead."""
        count = {"one rank of two": 2, "worker": 1}.get(kind) or self.chance.choice(self.ranks)
        run = replace(self.run, input=replace(self.run.input, workers=int(kind == "worker")))
        shutil.rmtree(self.folder / "said", ignore_errors=True)
        with Team(self.folder / "said", count, sitting, run, 2000 if kind == "full disk" else 0) as team:
            try:
                came = self._wait(team, until)
                if came:
                    self._strike(kind, team)
                    self.counts[kind] += 1
                codes = self._ended(team, kind if came else "")
            finally:
                left = [child for member in team.members for child in workers(member.pid)]
                for member in team.members:
                    member.kill()
                    member.join()
                for child in left:
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
        if came:
            self._after(kind)
            return False
        if kind == "full disk" and any(codes):
            assert any("OSError" in str(said) for said in team.said()), team.said()
            self.counts[kind] += 1
            return False
        assert not any(codes), (kind, codes, team.said())
        return True

    def _wait(self, team: Team, until: int) -> bool:
        """Whether a step is reached before the sitting ends."""
        end, at = time.monotonic() + PATIENCE, -1
        while all(member.is_alive() for member in team.members):
            now = step(self.run)
            if now >= until:
                time.sleep(self.chance.random() * 0.05)
                return True
            if now != at:
                end, at = time.monotonic() + PATIENCE, now
            assert time.monotonic() < end, f"no step after {at} in {PATIENCE} s: {team.said()}"
            time.sleep(0.003)
        return False

    def _strike(self, kind: str, team: Team) -> None:
        victims = team.members
        if kind == "worker":
            children = workers(team.members[0].pid)
            for child in children[-1:]:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            return
        if kind in ("one rank of two", "terminate"):
            victims = [self.chance.choice(team.members)]
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)

    def _ended(self, team: Team, kind: str) -> list[int]:
        if kind == "one rank of two":  # the other finds out by itself, which is tested elsewhere
            time.sleep(self.chance.random())
            for member in team.members:
                member.kill()
        if kind == "worker":  # the run stops with an error, or goes on with another worker
            self._wait(team, step(self.run) + 5)
            team.members[0].kill()
        return team.wait(PATIENCE)

    def _after(self, kind: str) -> None:
        """Damage what is there, if the fault is of that kind; and see how many steps are lost."""
        folder, done = Path(self.run.out), step(self.run)
        there = checkpoints(folder)
        if kind in ("flip", "truncate") and len(there) > 1:
            file = self.chance.choice(sorted(there[-1].iterdir()))
            if kind == "flip":
                flip(file, self.chance.randrange(file.stat().st_size))
            else:
                os.truncate(file, self.chance.randrange(file.stat().st_size))
        if kind == "stale" and there:
            aside = folder / f".step_{done + self.chance.randint(0, 2 * SAVE):08d}"
            shutil.copytree(there[-1], aside, dirs_exist_ok=True)
            next(aside.glob("*.safetensors")).write_bytes(b"not whole")
        newest = newest_checkpoint(folder, self.notes.append)
        saved = int(newest.name.removeprefix("step_").partition(".")[0]) if newest else 0
        if kind not in ("flip", "truncate"):
            self.lost.append(max(done - saved, 0))

    def go(self, kinds: tuple[str, ...], every: int, strikes: int = sys.maxsize, said: Callable[[str], None] = lambda text: None) -> None:
        """To the end of the run; after so many strikes undisturbed."""
        order: list[str] = []
        while True:
            order = order or self.chance.sample(kinds, len(kinds))
            kind = order.pop() if self.counts.total() < strikes else ""
            if self.sit(kind, step(self.run) + self.chance.randint(1, 2 * every) if kind and kind != "full disk" else sys.maxsize):
                return
            said(f"step {step(self.run):6,}  {self.counts.total()} faults, the last: {kind}")


def tormented(
    folder: Path, steps: int, every: int, *, seed: int = 0, ranks: tuple[int, ...] = (1, 2), kinds: tuple[str, ...] = KINDS,
    strikes: int = sys.maxsize, beside: bool = True, said: Callable[[str], None] = lambda text: None,
) -> Torment:  # fmt: skip
    """A run to its end, tormented; its weights are those of one left alone."""
    alone = tiny(folder / "alone", steps, seed, beside)
    together(folder / "said_alone", ranks[0], sitting, alone, seconds=3600)
    torment = Torment(folder, replace(alone, out=str(folder / "tormented")), random.Random(seed), ranks)
    torment.go(kinds, every, strikes, said)
    assert digest(torment.run) == digest(alone)
    most = max(torment.lost, default=0)
    # written beside the training, the newest may not be whole yet when it ends
    assert most <= (2 * SAVE if beside else SAVE), torment.lost
    return torment


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("--steps", 10_000), ("--every", 50), ("--kills", 0), ("--seed", 0)):
        parser.add_argument(name, type=int, default=value)
    asked, began = parser.parse_args(), time.monotonic()
    counts: Counter[str] = Counter()
    lost, damaged, runs = [], 0, [(asked.seed, (1, 2))]
    if asked.kills:
        runs = [(asked.seed + seed, ranks) for seed in range(3) for ranks in ((1,), (2,))]
    with tempfile.TemporaryDirectory() as root:
        for number, (seed, ranks) in enumerate(runs):
            folder, how = Path(root) / str(number), {}
            if asked.kills:
                share = (asked.kills + number) // len(runs)
                how = {"kinds": ("kill",), "strikes": share, "beside": number % 4 < 2}
            steps, every = (asked.steps, asked.every) if not asked.kills else (16 * share + 50, 10)
            torment = tormented(folder, steps, every, seed=seed, ranks=ranks, said=lambda text: print(text, flush=True), **how)
            counts += torment.counts
            lost += torment.lost
            damaged += len(torment.notes)
            print(f"seed {seed}, {' or '.join(map(str, ranks))} ranks, {steps:,} steps: the weights of the run left alone, bit by bit")
    print(f"{counts.total()} faults in {time.monotonic() - began:.0f} s: {', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))}")
    print(
        f"{damaged} damaged checkpoints were stepped over; of each fault that damages none, at most {max(lost, default=0)} steps were lost"
    )


if __name__ == "__main__":
    main()
