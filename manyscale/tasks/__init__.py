"""What to learn: one file per task. A task opens its data, makes the net, turns a batch into a loss, evaluates, and draws.

What the loop asks of one: `run`, `metric` and `better` (max or min), `steps_per_epoch`, `splits`, and the functions
`describe`, `fingerprint`, `model`, `train_batches`, `targets`, `loss`, `evaluate`, `save`, `load`, `draw`.
"""

from manyscale.tasks.classify import Classify
from manyscale.tasks.simmim import Pretrain

TASKS = {"classify": Classify, "simmim": Pretrain}
