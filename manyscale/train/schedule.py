"""The learning rate of a step: linear warm-up, then a cosine over the rest (the official code's `warmup_prefix`), or steps."""

import math

from manyscale.config import Run


def warmup_steps(run: Run, steps: int, steps_per_epoch: int) -> int:
    """Steps of warm-up: the recipe's epochs, but never more than a fifth of a run that was cut short."""
    return min(round(run.schedule.warmup * steps_per_epoch), steps // 5)


def rate(run: Run, step: int, steps: int, steps_per_epoch: int) -> float:
    """The peak-group learning rate of `step` (from 0) of `steps`, scaled by the batch where `lr_batch` says so."""
    optim, warmup = run.optim, warmup_steps(run, steps, steps_per_epoch)
    scale = run.batch / optim.lr_batch if optim.lr_batch else 1.0
    if step < warmup:
        return scale * (optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup)
    if run.schedule.milestones:  # a run of other length than its recipe's epochs keeps their places in proportion
        passed = sum(step >= steps * epoch / run.schedule.epochs for epoch in run.schedule.milestones)
        return scale * optim.lr * 0.1**passed
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return scale * (optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2)
