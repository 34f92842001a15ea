"""Pictures in, answers out: a table, JSON lines, a contact sheet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from manyscale.config import Setting
from manyscale.data.images import EXTENSIONS, BadImage, read_image
from manyscale.data.transforms import eval_transform
from manyscale.models import Net, SuperViT
from manyscale.models.settings import run_at
from manyscale.ship.answers import prepared
from manyscale.ship.cascade import Cascade, run_cascade
from manyscale.tasks.supernet import draw_kept

BATCH = 32


class Prediction(NamedTuple):
    """What a model says of one file."""

    path: str
    top: tuple[tuple[str, float], ...]  # (label, probability), likeliest first; empty where the file is bad
    error: str = ""
    setting: str = ""  # of a cascade, the one that had the last word

    def as_json(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        if self.error:
            return {"path": self.path, "error": self.error}
        top = [{"label": label, "probability": round(p, 6)} for label, p in self.top]
        return {"path": self.path, "top": top} | ({"setting": self.setting} if self.setting else {})


def find_pictures(paths: tuple[str, ...]) -> list[str]:
    """The files named, and every picture below the folders named, in order.

    Raises:
        ValueError: a path that is not there, or a folder without pictures.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
            if not below:
                raise ValueError(f"{path}: no pictures below this folder (known endings: {', '.join(EXTENSIONS)})")
            found += below
        elif path.exists():
            found.append(str(path))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


@torch.no_grad()
def predict(
    model: Net, paths: list[str], *, top: int = 5, how: Setting | Cascade | None = None, max_pixels: int = 64_000_000
) -> Iterator[Prediction]:
    """The `top` likeliest classes of each picture, in order. A file that cannot be read gets an `error`, and the rest go on.

    Args:
        how: at which setting, or through which cascade; None: at the model's own size, whole.

    Raises:
        ValueError: a model without a head, one that does not know how its pictures are prepared, or a setting it cannot be run at.
    """
    settings = how.settings if isinstance(how, Cascade) else (how,)
    transform, device = eval_transform(prepared(model, settings)), next(model.parameters()).device
    labels = model.labels or tuple(map(str, range(model.config.classes)))
    for start in range(0, len(paths), BATCH):
        read: dict[str, torch.Tensor] = {}
        bad: dict[str, str] = {}
        for path in paths[start : start + BATCH]:
            try:
                read[path] = transform(read_image(path, max_pixels))
            except BadImage as error:
                bad[path] = error.reason
        answers, by = {}, {}
        if read:
            images = torch.stack(list(read.values())).to(device)
            if isinstance(how, Cascade):
                said, stages = run_cascade(model, how, images)
                by = {path: str(how.settings[stage]) for path, stage in zip(read, stages.tolist(), strict=True)}
            else:
                said = run_at(model, images, how).float().softmax(-1)
            best = said.topk(min(top, len(labels)))
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            answers = {path: tuple((labels[i], p) for p, i in zip(*row, strict=True)) for path, row in zip(read, rows, strict=True)}
        for path in paths[start : start + BATCH]:
            yield Prediction(path, answers.get(path, ()), bad.get(path, ""), by.get(path, ""))


def draw_what_stays(model: SuperViT, paths: list[str], setting: Setting, path: Path | str, *, max_pixels: int = 64_000_000) -> None:
    """Pictures (files that can be read), and which of their patches the net keeps at a setting; see `tasks.supernet.draw_kept`."""
    preprocess = prepared(model, [setting])
    transform, device = eval_transform(preprocess), next(model.parameters()).device
    images = torch.stack([transform(read_image(one, max_pixels)) for one in paths]).to(device)
    draw_kept(model, images, [setting], preprocess, path)
