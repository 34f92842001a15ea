"""What to learn: one file per task. A task opens its data, makes the net, turns a batch into a loss, evaluates, and draws.

What the loop asks of one: `run`, `metric` and `better` (max or min), `passes_many`, `steps_per_epoch`, `splits`, and the functions
`of`, `share`, `describe`, `fingerprint`, `model`, `compile`, `train_batches`, `targets`, `losses`, `evaluate`, `probed`, `save`, `load`,
`draw`.
"""

from manyscale.config import Run
from manyscale.tasks.classify import Classify
from manyscale.tasks.fewshot import probes
from manyscale.tasks.pictures import Pictures
from manyscale.tasks.simmim import Pretrain
from manyscale.tasks.supernet import LearnMany

TASKS = {"classify": Classify, "simmim": Pretrain, "supernet": LearnMany}


def open_task(run: Run) -> Pictures:
    """The task of a run, with its data and few-shot evaluations (`probes`).

    Raises:
        ValueError: data that cannot be used.
    """
    task = TASKS[run.task](run)
    task.probes = probes(run)
    return task
