"""One trunk, many cooldowns: runs of several lengths for little more than the longest ("Scaling Vision Transformers", section 3.5).

    OUT/trunk          the run without its end, as far as the last branching
    OUT/20k-steps      a branch: the trunk's checkpoint, then its own cooldown. An ordinary run's folder
    OUT/summary.json   how each branch ended, and what was computed in all

Before its cooldown a run of rsqrt or constant rate does not know how long it is. So a branch is, bit for bit on a CPU, the
run of its length trained alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from manyscale.config import Run, from_dict, in_steps, to_dict
from manyscale.ranks import joined
from manyscale.storage import make_folder, read_json, write, write_json
from manyscale.tasks import open_task
from manyscale.tasks.pictures import Pictures
from manyscale.train import loop
from manyscale.train.checkpoint import checkpoints, copy_checkpoint, newest_checkpoint
from manyscale.train.folder import check_recipe, entered
from manyscale.train.schedule import cooldown_steps, warmup_steps


def train(run: Run) -> dict[str, Any]:
    """Train a run, or the trunk and branches of one that has `branches`; go on with them where its folder holds them.

    Returns:
        The summary, also in `summary.json`. Of branches: that of the longest, `branches`, the summaries by name, `steps`
        computed in all, and `steps_alone`, what the branches would have taken each on its own.

    Raises:
        ValueError, Stopped: as `loop.train`; branches that leave no trunk.
    """
    if not run.schedule.branches:
        return loop.train(run)
    folder = Path(run.folder)
    with joined(run.device, run.parallel.timeout) as ranks, entered(folder, ranks):
        if (folder / "recipe.json").exists():
            check_recipe(folder, run)
        task = open_task(run)
        branches = _branches(run, task.steps_per_epoch)
        if ranks.leads:
            write_json(folder / "recipe.json", to_dict(run))
        starts = {name: length - cooldown for name, (length, cooldown) in branches.items()}
        last = max(starts.values())
        trunk = _trunk(run, last + 1)  # a step more than it will be asked for: it comes to no end of its own
        summaries = {}
        for name in sorted(branches, key=lambda name: starts[name]):
            branch = _branch(run, name)
            if not ranks.tell(bool(checkpoints(Path(branch.folder)))):
                loop.train(trunk, until=starts[name], task=task)
                if ranks.leads:
                    _seed(Path(trunk.folder), branch, branches[name][0])
                ranks.wait()
            summaries[name] = _finished(branch, task)
        computed = last + sum(cooldown for _, cooldown in branches.values())
        alone = sum(length for length, _ in branches.values())
        longest = summaries[max(branches, key=lambda name: branches[name][0])]
        summary = {"recipe": run.recipe, "task": run.task, "best": longest["best"], "last": longest["last"], "seconds": longest["seconds"]}
        summary |= {"branches": summaries, "steps": computed, "steps_alone": alone}
        if ranks.leads:
            write_json(folder / "summary.json", summary)
            print(f"{run.recipe}: {len(branches)} branches in {folder}, {computed:,} steps in all; each on its own, {alone:,}")
        return summary


def _branches(run: Run, steps_per_epoch: int) -> dict[str, tuple[int, int]]:
    """Every branch by name: its length and its cooldown, in steps.

    Raises:
        ValueError: a cooldown that is the whole branch, two branches of one length, a warm-up that a short one would cut.
    """
    found = {}
    for duration in run.schedule.branches:
        length = max(in_steps(duration, steps=0, steps_per_epoch=steps_per_epoch, batch=run.batch), 1)
        cooldown = cooldown_steps(run, length, steps_per_epoch)
        if length in (other for other, _ in found.values()):
            raise ValueError(f"field `branches`: {run.schedule.branches} names one length of {length:,} steps twice")
        if not 0 < cooldown < length:
            raise ValueError(
                f"field `branches`: of {duration!r}, {length:,} steps, {cooldown:,} are cooldown: that leaves no trunk or no branch"
            )
        found[_name(duration)] = length, cooldown
    if len(found) < len(run.schedule.branches):
        raise ValueError(f"field `branches`: {run.schedule.branches} give two branches one name; say their lengths in one unit")
    first = min(length - cooldown for length, cooldown in found.values())
    if warmup_steps(run, first, steps_per_epoch) < warmup_steps(run, 10**12, steps_per_epoch):
        raise ValueError(
            f"field `warmup`: {run.schedule.warmup!r} are more than a fifth of the {first:,} steps before the first cooldown; "
            "shorten the warm-up, or leave out the shortest branch"
        )
    return found


def _name(duration: str | float) -> str:
    return duration.strip().replace(" ", "-") if isinstance(duration, str) else f"{duration:g}-epochs"


def _trunk(run: Run, length: int) -> Run:
    schedule = replace(run.schedule, branches=(), cooldown=0, length=f"{length}-steps")
    return replace(run, recipe=f"{run.recipe} trunk", schedule=schedule, out=f"{run.folder}/trunk")


def _branch(run: Run, name: str) -> Run:
    schedule = replace(run.schedule, branches=(), length=name)
    return replace(run, recipe=f"{run.recipe} {name}", schedule=schedule, out=f"{run.folder}/{name}")


def _seed(trunk: Path, branch: Run, length: int) -> None:
    """Give a branch the trunk's state, and its word on how it came there; a killed seeding leaves no checkpoint and is done again."""
    folder = Path(branch.folder)
    make_folder(folder)
    found = newest_checkpoint(trunk, print)
    if not found:
        raise ValueError(f"{trunk}: no checkpoint is whole; remove {trunk.parent} and begin again")
    whole = from_dict(Run, read_json(trunk / "recipe.json"), str(trunk / "recipe.json"))  # with what the data said about it
    write_json(folder / "recipe.json", to_dict(replace(whole, recipe=branch.recipe, schedule=branch.schedule, out=branch.out)))
    if (trunk / "metrics.jsonl").exists():
        write(folder / "metrics.jsonl", (trunk / "metrics.jsonl").read_text())
    copy_checkpoint(found, folder, {"steps": length, "best": None, "best_step": 0, "stale": 0})  # what was best before is not the branch's


def _finished(branch: Run, task: Pictures) -> dict[str, Any]:
    file = Path(branch.folder) / "summary.json"
    return read_json(file) if file.exists() else loop.train(branch, task=task)
