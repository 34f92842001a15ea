"""One weight set that learns many settings (SuperViT, arXiv 2205.11397, section 3.4): whole passes learn from labels, passes
that drop tokens from what the whole pass of their size answers.

Letters: B batch, (h, w) patches at the largest size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyscale.config import Preprocess, Run, Setting, Supernet, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.data.images import BadImage
from manyscale.data.loader import Batch, seed_from
from manyscale.data.transforms import eval_transform
from manyscale.models import Net, compile_settings, load
from manyscale.models.supervit import Answers, Seen, SuperViT
from manyscale.ops.images import resized
from manyscale.ranks import ALONE, Ranks
from manyscale.tasks.classify import LOSSES, Classify, softmax_loss, tally
from manyscale.tasks.pictures import Report, all_reported, something

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in patches."""


class LearnMany(Classify):
    """Classification at every setting of a SuperViT, or at several sizes and windows of a Swin (`Supernet.settings`).

    Raises:
        ValueError: besides those of `Classify`, a net without settings, or a teacher that cannot teach it.
    """

    metric, better = "mean_accuracy", max  # over the settings
    passes_many = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = settings_of(self.run)
        self._check()
        self.compiled: dict[Setting, Callable[..., Any]] = {}
        self.other = self._teacher(run.supernet.teacher_run) if run.supernet.teacher_run else None

    def _check(self) -> None:
        """See that the run's net can learn what is asked."""
        run, net, learns = self.run, self.run.model, self.run.supernet
        if learns.teacher == "average" and not run.optim.ema:
            raise ValueError("field `teacher`: there is no average of the weights to learn from; give --ema, such as 0.9999")
        if learns.mix_token and (run.augment.mixup or run.augment.cutmix or not isinstance(net, SuperViTConfig)):
            raise ValueError(
                "field `mix_token`: it mixes the patches of a SuperViT, instead of mixup and cutmix; turn off the one or the others"
            )
        softened = learns.label_share < 1 or not all(setting.is_full for setting in self.settings)
        if run.loss != "softmax" and softened:
            raise ValueError(f"field `loss`: answers are learnt from answers as one distribution; {run.loss} makes none, give softmax")
        if learns.token_labels == "teacher" and getattr(net, "token_head", None) is None:
            raise ValueError("field `token_labels`: this net has no head on its patches that could learn them; give --token-head 0.25")

    def model(self) -> Net:
        """What is trained; where it comes from `init`, its shape is the one there, and the run's from here on."""
        net = super().model()
        self.run = replace(self.run, model=net.config)
        self.settings = settings_of(self.run)
        self._check()
        return net

    def _teacher(self, path: str) -> Net:
        net = load(path).requires_grad_(False)
        if net.config.classes != len(self.labels) or net.labels not in ((), self.labels) or not net.preprocess:
            raise ValueError(f"field `teacher_run`: {path} was not trained on these {len(self.labels)} classes")
        dense = isinstance(net.config, SwinConfig) or (
            isinstance(net.config, ViTConfig) and net.config.pool == "gap" and not net.config.pre_logits
        )
        if self.run.supernet.token_labels == "teacher" and not dense:
            raise ValueError(f"field `teacher_run`: {path} says nothing of single patches; take a Swin, or a ViT with pool=gap")
        return net

    def compile(self, model: nn.Module) -> None:
        """One graph for every setting that is passed."""
        self.compiled = compile_settings(model, dict.fromkeys((*self.settings, *map(as_whole, self.settings))))

    def passes(self, step: int) -> int:
        """As `losses` will draw them."""
        return len(draw_passes(self.settings, self.run.supernet, np.random.default_rng(seed_from(self.run.seed, step))))

    def losses(
        self, model: nn.Module, images: Tensor, targets: Tensor, step: int = 0, average: nn.Module | None = None
    ) -> Iterator[Tensor]:
        """The loss of every pass, in the order in which they teach each other; each may be backpropagated before the next is asked for.

        Args:
            images, targets: (B, 3, H, W) and soft labels (B, classes).
            step: decides, with the seed, which settings are passed and what MixToken mixes: the same on every rank.
            average: the moving average of the weights, where that teaches.
        """
        learns, grid = self.run.supernet, grid_at(self.run.model)
        generator = np.random.default_rng(seed_from(self.run.seed, step))
        passes = draw_passes(self.settings, learns, generator)
        box = draw_box(grid, learns.mix_token, generator) if learns.mix_token else None
        on_patches = self._patch_targets(images, targets, grid, box)  # (B, h·w, classes)
        targets = mixed(targets, box, grid)
        largest, outside = passes[0], self._outside(images, average, passes[0], box, grid)
        answered: dict[Setting, Tensor] = {}
        for setting in passes:
            call = self.compiled.get(setting, partial(model, setting=setting))
            whole, patches = self._answer(call, images, mask_of(box, grid, grid_at(self.run.model, setting), images.device))
            teacher = answered.get(largest if learns.teacher == "largest" else as_whole(setting)) if outside is None else outside
            if not setting.is_full:
                yield distillation(whole, teacher, learns.temperature)
                continue
            answered[setting] = whole.detach()
            loss = LOSSES[self.run.loss](whole.float(), targets).mean()
            if teacher is not None and learns.label_share < 1:
                loss = learns.label_share * loss + (1 - learns.label_share) * distillation(whole, teacher, learns.temperature)
            if patches is not None and setting == largest:
                loss = loss + learns.token_weight * softmax_loss(patches.float().mT, on_patches.mT).mean()
            yield loss

    def _answer(self, call: Callable[..., Any], images: Tensor, mirrored: Tensor | None) -> Answers:
        if isinstance(self.run.model, SuperViTConfig):
            return call(images, mirrored=mirrored, both=True)
        return Answers(call(images), None)

    @torch.no_grad()
    def _outside(
        self, images: Tensor, average: nn.Module | None, largest: Setting, box: Box | None, grid: tuple[int, int]
    ) -> Tensor | None:
        """What the moving average, or another net, answers on the whole pictures: logits (B, classes); None where neither teaches."""
        learns = self.run.supernet
        if learns.teacher == "average":
            return self._answer(partial(average.eval(), setting=largest), images, mask_of(box, grid, grid, images.device)).whole
        if learns.teacher != "other":
            return None
        net = self.other.to(images.device)
        logits = net(as_prepared(images, self.preprocess, net.preprocess)).float()
        if box is None:
            return logits
        share, said = torch.tensor(own_share(box, grid)), F.log_softmax(logits / learns.temperature, dim=-1)
        return learns.temperature * torch.logaddexp(said + share.log(), said.flip(0) + (1 - share).log())

    @torch.no_grad()
    def _patch_targets(self, images: Tensor, targets: Tensor, grid: tuple[int, int], box: Box | None) -> Tensor | None:
        """What every patch should say, (B, h·w, classes): its picture's label, or what the other net says of the place."""
        if getattr(self.run.model, "token_head", None) is None:
            return None
        if self.run.supernet.token_labels == "teacher":
            net = self.other.to(images.device)
            places = net.last_map(as_prepared(images, self.preprocess, net.preprocess))  # (B, D, h', w')
            said = net.head(places.movedim(1, -1)).float().softmax(-1).movedim(-1, 1)
            said = resized(said, grid).movedim(1, -1)  # (B, h, w, classes)
        else:
            said = targets[:, None, None, :].expand(-1, *grid, -1)
        if box is not None:
            said = torch.where(mask_of(box, grid, grid, said.device)[..., None], said.flip(0), said)
        return said.flatten(1, 2)

    def evaluate(self, model: nn.Module, device: torch.device, precision: torch.dtype, report: Report) -> dict[str, float]:
        """Top-1, top-5 and loss at the most expensive setting, top-1 at every one, and the mean of these, on the held-out split."""
        settings = self.settings if self.run.supernet.watch == "all" else (self.settings[0], self.settings[-1])
        return score_settings(model, self.eval_batches(), settings, device, precision, report, self.run.loss, self.ranks)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path | str) -> None:
        """Held-out pictures, and what stays of each at the cheapest setting of every size."""
        if not isinstance(self.run.model, SuperViTConfig):
            super().draw(model, path)
            return
        source, transform, inputs = self.splits.val, eval_transform(self.preprocess), []
        for index in torch.linspace(0, len(source) - 1, min(8, len(source))).long().unique().tolist():
            with suppress(BadImage):
                inputs.append(transform(source.read(index)))
        cheapest = {as_whole(setting): setting for setting in reversed(self.settings)}
        was_training, device = model.training, next(model.parameters()).device
        draw_kept(model.eval(), torch.stack(inputs).to(device), list(cheapest.values()), self.preprocess, path)
        model.train(was_training)


def shaded(images: Tensor, seen: Seen, patch: int) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] at a setting's size, with what left under grey: all but covered first, less at each later block."""
    clear = images.new_ones(len(images), math.prod(seen.grid) + 1)  # the last for what has no place
    for number, gone in enumerate(seen.left):
        clear.scatter_(1, gone.places % clear.shape[1], 0.08 + 0.6 * number / len(seen.left))
    clear = clear[:, :-1].unflatten(1, seen.grid)[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return images * clear + 0.75 * (1 - clear)


@torch.no_grad()
def draw_kept(model: SuperViT, images: Tensor, settings: Sequence[Setting], preprocess: Preprocess, path: Path | str) -> None:
    """A row of prepared pictures (B, 3, H, W), and one for each setting, as `shaded` has it."""
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (preprocess.mean, preprocess.std))
    rows = [("picture", (images * std + mean).clamp(0, 1))]
    for setting in settings:
        seen = model.tokens(images, setting)
        patch = model.config.patch
        shown = resized(images, (seen.grid[0] * patch, seen.grid[1] * patch), model.config.resize)
        rows.append((str(setting), shaded((shown * std + mean).clamp(0, 1), seen, patch)))
    figure = Figure(figsize=(1.5 * len(images) + 0.5, 1.55 * len(rows)), layout="constrained")
    for places, (name, pictures) in zip(figure.subplots(len(rows), len(images), squeeze=False), rows, strict=True):
        for axes, picture in zip(places, pictures.cpu(), strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest" if picture.shape[-1] < 96 else "antialiased")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        places[0].set_ylabel(name)
    figure.savefig(path, dpi=110)


def settings_of(run: Run) -> tuple[Setting, ...]:
    """What a run learns, the cheapest of the smallest size first.

    Raises:
        ValueError: a net without settings, or settings that it cannot be run at.
    """
    if isinstance(run.model, SuperViTConfig):
        if run.supernet.settings:
            raise ValueError("field `settings`: a SuperViT has sizes and keep rates; give --sizes and --keeps")
        return run.model.settings
    if not isinstance(run.model, SwinConfig):
        raise ValueError("field `task`: supernet trains a SuperViT, or a Swin; a ViT becomes a SuperViT by --init of a supervit_ recipe")
    settings = tuple(map(Setting.read, run.supernet.settings))
    if not settings or any(setting.size is None for setting in settings):
        raise ValueError(f"field `settings`: {run.supernet.settings}: say which a Swin learns, such as 192/window=12 256/window=16")
    for setting in settings:
        run.model.windows_at(setting)
    return tuple(sorted(settings, key=lambda setting: math.prod(_pair(setting.size))))


def as_whole(setting: Setting) -> Setting:
    """The setting of the same size and window that keeps every token."""
    return replace(setting, keep=1.0, tokens=())


def draw_passes(settings: tuple[Setting, ...], learns: Supernet, generator: np.random.Generator) -> list[Setting]:
    """The settings of one step, each behind the one that teaches it; first the largest size, whole.

    paper: the largest size whole and at a drawn keep rate, and a drawn smaller size likewise. sandwich: the largest, the cheapest
    and two drawn others (Yu and Huang, arXiv 1903.05134, section 3.2). all: all.
    """
    wholes = list(dict.fromkeys(map(as_whole, reversed(settings))))
    largest, *smaller = wholes
    dropping = {whole: [s for s in settings if as_whole(s) == whole and not s.is_full] for whole in wholes}

    def drawn(options: list[Setting], count: int = 1) -> list[Setting]:
        return [options[i] for i in generator.permutation(len(options))[:count]]

    if learns.sampling == "all":
        return [setting for whole in wholes for setting in (whole, *dropping[whole])]
    if learns.sampling == "paper":
        return [setting for whole in (largest, *drawn(smaller)) for setting in (whole, *drawn(dropping[whole]))]
    cheapest = settings[0]
    passes = [largest]
    for setting in (cheapest, *drawn([s for s in settings if s not in (largest, cheapest)], 2)):
        taught_by_own_size = learns.teacher == "size" and not setting.is_full
        passes += [s for s in ((as_whole(setting), setting) if taught_by_own_size else (setting,)) if s not in passes]
    return passes


def draw_box(grid: tuple[int, int], alpha: float, generator: np.random.Generator) -> Box:
    """A random box of the grid, cut off at its edges; the share left is drawn from Beta(alpha, alpha) (CutMix, arXiv 1905.04899)."""
    side = math.sqrt(1 - generator.beta(alpha, alpha))
    edges = []
    for cells in grid:
        half, centre = int(cells * side) // 2, int(generator.integers(cells))
        edges.append((max(centre - half, 0), min(centre + half, cells)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def scaled(box: Box, grid: tuple[int, int], smaller: tuple[int, int]) -> Box:
    """A box on the largest grid as one on a smaller, rounded down as the official code does."""
    return tuple(edge * there // here for edge, here, there in zip(box, grid * 2, smaller * 2, strict=True))


def mask_of(box: Box | None, grid: tuple[int, int], smaller: tuple[int, int], device: torch.device) -> Tensor | None:
    """A box on the largest grid as the patches in it on a smaller: (h, w) bool. A tensor, so that a compiled net takes any box."""
    if box is None:
        return None
    top, left, bottom, right = scaled(box, grid, smaller)
    mask = torch.zeros(smaller, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask.to(device, non_blocking=True)


def own_share(box: Box, grid: tuple[int, int]) -> float:
    """The share of a grid that a box leaves to the picture itself."""
    top, left, bottom, right = box
    return 1 - (bottom - top) * (right - left) / math.prod(grid)


def mixed(targets: Tensor, box: Box | None, grid: tuple[int, int]) -> Tensor:
    """Labels (B, classes) of pictures whose patches in `box` come from the other end of the batch."""
    if box is None:
        return targets
    share = own_share(box, grid)
    return share * targets + (1 - share) * targets.flip(0)


def grid_at(net: SuperViTConfig | SwinConfig, setting: Setting | None = None) -> tuple[int, int]:
    """Patches per axis at a setting; None: at the largest size."""
    size = _pair(setting.size) if setting else net.size
    return tuple(pixels // patch for pixels, patch in zip(size, net.patches, strict=True))


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened answers, the mean over the batch, times the temperature squared: logits (B, classes) twice.

    Hinton et al., arXiv 1503.02531, section 2.
    """
    student, teacher = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def as_prepared(images: Tensor, here: Preprocess, there: Preprocess) -> Tensor:
    """Images (B, 3, H, W) that were prepared for one net as another wants them: its size, mean and deviation."""
    if (here.mean, here.std) != (there.mean, there.std):
        mean, std, other_mean, other_std = (images.new_tensor(v)[:, None, None] for v in (here.mean, here.std, there.mean, there.std))
        images = (images * std + mean - other_mean) / other_std
    return resized(images, there.image_size)


@torch.no_grad()
def score_settings(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: Iterable[Setting],
    device: torch.device,
    precision: torch.dtype,
    report: Report,
    loss: str = "softmax",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Top-1 of a model at every setting, `accuracy 160/0.7`, their mean, and of the last top-1, top-5 and loss. Pictures are read once.

    Raises:
        ValueError: no picture could be read.
    """
    settings, was_training = tuple(settings), model.training
    model.eval()
    sums = torch.zeros(len(settings), 4, dtype=torch.float64)
    for batch in all_reported(batches, report, ranks):
        images, labels = something(batch.images).to(device), batch.labels.to(device)
        for i, setting in enumerate(settings):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(images, setting=setting).float()[: len(labels)]
            sums[i] += torch.cat([tally(logits, labels, loss), torch.tensor([len(labels)])])
    model.train(was_training)
    sums = ranks.total(sums)
    count = int(sums[0, 3])
    if not count:
        raise ValueError("no picture of the held-out split could be read; see bad_files.jsonl")
    means = (sums[:, :3] / count).tolist()
    each = {f"accuracy {setting}": top1 for setting, (top1, _, _) in zip(settings, means, strict=True)}
    top1, top5, mean_loss = means[-1]
    mean = math.fsum(each.values()) / len(each)
    return {"mean_accuracy": mean, "accuracy": top1, "top5": top5, "val_loss": mean_loss, **each, "pictures": count}


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size, size)
