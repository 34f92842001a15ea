"""What to learn: one file per task. A task opens its data, turns a batch into a loss, evaluates, and draws its samples."""

from manyscale.tasks.classify import Classify

TASKS = {"classify": Classify}
