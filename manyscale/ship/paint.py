"""A SimMIM run on files: hide blocks of each picture, and paint them in."""

from typing import Any, NamedTuple

from manyscale.data.images import BadImage, read_image
from manyscale.data.transforms import eval_transform
from manyscale.heads.pixels import load_masked
from manyscale.ship.evaluate import recipe_of
from manyscale.tasks.simmim import Painted, paint
from manyscale.train.state import pick_device


class PaintedFile(NamedTuple):
    """What a model makes of one file."""

    path: str
    painted: Painted | None  # None where the file is bad
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {"path": self.path, "l1": round(self.painted.errors[0], 6)} if self.painted else {"path": self.path, "error": self.error}


def paint_files(run: str, paths: list[str], device: str = "auto", *, max_pixels: int = 64_000_000) -> list[PaintedFile]:
    """Each picture with holes and without, in order; the same picture always gets the same holes.

    Raises:
        ValueError: `run` is not the folder of a SimMIM run.
    """
    model, recipe = load_masked(run).to(pick_device(device)), recipe_of(run)
    preprocess = model.encoder.preprocess
    if not recipe or not preprocess:
        raise ValueError(f"{run}: no recipe.json that says how its pictures are prepared and hidden; give a folder that `train` wrote")
    transform, answers = eval_transform(preprocess), []
    for path in paths:
        try:
            image = transform(read_image(path, max_pixels))
            answers.append(PaintedFile(path, paint(model, image[None], recipe.simmim, preprocess)))
        except BadImage as bad:
            answers.append(PaintedFile(path, None, bad.reason))
    return answers
