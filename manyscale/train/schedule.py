"""The learning rate of a step: linear warm-up, then a cosine over the rest (Swin's official `warmup_prefix`), or another curve.

With rsqrt and cooldown, "Scaling Vision Transformers" section 3.5: lr · min(1, s / warmup) · 1 / sqrt(1 + (s - warmup) / timescale)
· min(1, (T - s) / cooldown) at step s of T, the middle factor from the end of the warm-up on.
"""

import math

from manyscale.config import Duration, Run, in_steps


def planned_steps(run: Run, steps_per_epoch: int) -> int:
    """Steps of a run by its recipe's length or epochs."""
    return max(_steps(run, run.schedule.length or run.schedule.epochs, 0, steps_per_epoch), 1)


def evaluation_steps(run: Run, steps: int, steps_per_epoch: int) -> int:
    """Steps between evaluations."""
    return max(_steps(run, run.schedule.evaluate_every, steps, steps_per_epoch), 1)


def warmup_steps(run: Run, steps: int, steps_per_epoch: int) -> int:
    """Steps of warm-up: the recipe's, but never more than a fifth of a run that was cut short."""
    return min(_steps(run, run.schedule.warmup, steps, steps_per_epoch), steps // 5)


def cooldown_steps(run: Run, steps: int, steps_per_epoch: int) -> int:
    """Steps of cooldown.

    Raises:
        ValueError: longer than the run.
    """
    cooldown = _steps(run, run.schedule.cooldown, steps, steps_per_epoch)
    if cooldown > steps:
        raise ValueError(
            f"field `cooldown`: {run.schedule.cooldown!r} are {cooldown:,} steps, longer than the run of {steps:,}; "
            "shorten it, or give a share such as 20%"
        )
    return cooldown


def rate(run: Run, step: int, steps: int, steps_per_epoch: int) -> float:
    """The peak-group learning rate of `step` (from 0) of `steps`, scaled by the batch where `lr_batch` says so; zero from `steps` on
    where there is a cooldown.

    Raises:
        ValueError: as `cooldown_steps`.
    """
    cooldown = cooldown_steps(run, steps, steps_per_epoch)
    left = min(1.0, max(0.0, (steps - step) / cooldown)) if cooldown else 1.0
    scale = run.batch / run.optim.lr_batch if run.optim.lr_batch else 1.0
    return scale * left * _before_cooldown(run, step, steps, steps_per_epoch)


def _before_cooldown(run: Run, step: int, steps: int, steps_per_epoch: int) -> float:
    optim, schedule = run.optim, run.schedule
    warmup = warmup_steps(run, steps, steps_per_epoch)
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    if schedule.milestones:  # a run of other length than its recipe's epochs keeps their places in proportion
        return optim.lr * 0.1 ** sum(step >= steps * epoch / schedule.epochs for epoch in schedule.milestones)
    if schedule.curve == "constant":
        return optim.lr
    if schedule.curve == "rsqrt":
        timescale = _steps(run, schedule.timescale, steps, steps_per_epoch) or max(warmup, 1)
        return optim.lr / math.sqrt(1 + (step - warmup) / timescale)
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    share = 1 - progress if schedule.curve == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def total_rate(run: Run, steps: int, steps_per_epoch: int) -> float:
    """The sum of all steps' rates, within a per mille: times a weight decay, the exponent by which it shrinks weights in all."""
    every = max(1, steps // 5000)
    sampled = range(every // 2, steps, every)
    return math.fsum(rate(run, step, steps, steps_per_epoch) for step in sampled) * steps / len(sampled)


def _steps(run: Run, duration: Duration, steps: int, steps_per_epoch: int) -> int:
    return in_steps(duration, steps=steps, steps_per_epoch=steps_per_epoch, batch=run.batch)
