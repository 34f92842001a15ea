"""Verbs for trained models: compare, eval, predict, transfer, convert."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from tyro.conf import Positional

from manyscale.cli.parsing import parse, plain
from manyscale.config import Preprocess, Setting, Size, SuperViTConfig, ViTConfig, Windows, to_dict
from manyscale.storage import write, write_json

Source = Literal["official", "timm", "transformers", "torchvision", "mmpretrain", "simmim", "big_vision", "vision_transformer", "supervit"]


def compare(arguments: list[str]) -> None:
    """Runs side by side: a table, and their learning curves in one picture."""

    def run(runs: Positional[tuple[str, ...]], out: str = "runs/compare.png") -> None:
        """Compare runs, finished or not.

        Args:
            runs: their folders.
            out: the picture.
        """
        from manyscale.ship.compare import draw, read_run

        if not runs:
            raise ValueError("give at least one run's folder")
        learnt = [read_run(folder) for folder in runs]
        table = Table(
            Column("run", overflow="fold"),
            "metric",
            "best",
            "at epoch",
            "last",
            "epochs",
            Column("from", overflow="fold"),
            box=None,
            pad_edge=False,
        )
        for one in learnt:
            best, last = one.best, one.evaluations[-1]
            numbers = (f"{best[one.metric]:.4f}", f"{best['epoch']:.1f}", f"{last[one.metric]:.4f}", f"{last['epoch']:.1f}")
            table.add_row(escape(one.folder), one.metric, *numbers, escape(one.recipe.init or "scratch"))
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
        draw(learnt, Path(out))
        print(f"wrote {out}")

    parse(run, "compare", arguments)


def evaluate(arguments: list[str]) -> None:
    """Score a trained model on a split of its set, or of another."""

    def run(
        model: Positional[str],
        data: str = "",
        split: str = "val",
        setting: str = "",
        batch: int = 64,
        workers: int = -1,
        device: str = "auto",
        json_lines: bool = False,
    ) -> None:
        """Top-1, top-5 and loss of a model.

        Args:
            model: a run's folder or a folder with a model.
            data: a set by name or folder; empty: the one it was trained on.
            split: val, test, train, or another split folder; all: a folder without splits, whole.
            setting: how it is run: 160/0.7 of a SuperViT, 192/window=12 of a Swin V2, 192 of a ViT; empty: its own size, whole.
            batch: pictures at a time.
            workers: loader processes.
            device: where to compute.
            json_lines: print one line of JSON instead of words.
        """
        from manyscale.ship.evaluate import evaluate as measure

        bad: list[str] = []
        metrics = measure(
            model,
            lambda path, reason: bad.append(f"left out {plain(path)}: {plain(reason)}"),
            data=data,
            split=split,
            setting=setting,
            batch=batch,
            workers=workers,
            device=device,
        )
        print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
        if json_lines:
            print(json.dumps({**metrics, "split": split, "bad_files": len(bad), **({"setting": setting} if setting else {})}))
        else:
            shares = {"accuracy": "top-1 {:.2%}", "top5": "top-5 {:.2%}", "val_loss": "loss {:.4f}", "l1": "l1 {:.4f}"}
            said = ", ".join(shares[name].format(value) for name, value in metrics.items() if name in shares)
            print(f"{model}{' at ' * bool(setting)}{setting} on {split}: {said}, {metrics['pictures']:,} pictures, {len(bad)} left out")

    parse(run, "eval", arguments)


def predict(arguments: list[str]) -> None:
    """What a model says of files or folders: a table, JSON lines, a contact sheet."""

    def run(
        model: Positional[str],
        files: Positional[tuple[str, ...]],
        setting: str = "",
        cascade: tuple[str, ...] | None = None,
        top: int = 5,
        out: str = "",
        device: str = "auto",
        json_lines: bool = False,
    ) -> None:
        """Predict the classes of pictures; of a SimMIM run, paint in what is hidden of them.

        Args:
            model: a run's folder or a folder with a model.
            files: pictures, or folders of them.
            setting: how the net is run: 160/0.7 of a SuperViT, 192/window=12 of a Swin V2, 192 of a ViT; empty: its own size, whole.
            cascade: a cheap setting first, a better one where it is unsure: alone, the run's cascade.json; or another such file.
            top: how many classes of each.
            out: where `predictions.jsonl` and `sheet.png` go, and of a setting that drops tokens `kept.png`, which shows what stays; empty:
                `predictions` in the model's folder.
            device: where to compute.
            json_lines: print JSON lines instead of a table.
        """
        from manyscale.heads.pixels import is_masked
        from manyscale.models import SuperViT, load
        from manyscale.ship.predict import draw_what_stays, find_pictures
        from manyscale.ship.predict import predict as ask
        from manyscale.tasks.classify import draw_sheet
        from manyscale.train.state import pick_device

        if not files:
            raise ValueError("give at least one picture or folder")
        if top < 1:
            raise ValueError(f"field `top`: {top} must be at least 1")
        if setting and cascade is not None:
            raise ValueError("give --setting or --cascade")
        if is_masked(model):
            if setting or cascade is not None:
                raise ValueError("a SimMIM run paints at its own size; leave out --setting and --cascade")
            _paint(model, find_pictures(files), Path(out or f"{model}/predictions"), device, json_lines)
            return
        net = load(model).to(pick_device(device))
        how = Setting.read(setting) if setting else None if cascade is None else _cascade(net, model, cascade)
        answers = list(ask(net, find_pictures(files), top=top, how=how))
        good = [answer for answer in answers if not answer.error]
        if json_lines:
            print("\n".join(json.dumps(answer.as_json()) for answer in answers))
        else:
            _print_predictions(answers)
        folder = Path(out) if out else (Path(model) if Path(model).is_dir() else Path(model).parent) / "predictions"
        write(folder / "predictions.jsonl", "".join(json.dumps(answer.as_json()) + "\n" for answer in answers))
        if not good:
            raise ValueError(f"none of the {len(answers)} files could be read")
        shown = good[:48]
        pictures = [_thumbnail(answer.path) for answer in shown]
        captions = [("\n".join(f"{label} {p:.0%}" for label, p in answer.top[:3]), None) for answer in shown]
        write(folder / "sheet.png", lambda path: draw_sheet(pictures, captions, path, columns=6))
        written = ["predictions.jsonl", "sheet.png"]
        if isinstance(net, SuperViT) and isinstance(how, Setting) and not how.is_full:
            write(folder / "kept.png", lambda path: draw_what_stays(net, [answer.path for answer in good[:8]], how, path))
            written.append("kept.png")
        print(f"wrote {', '.join(written)} in {folder}", file=sys.stderr)

    parse(run, "predict", arguments)


def _cascade(net: Any, model: str, files: tuple[str, ...]) -> Any:
    from manyscale.ship.cascade import read_cascade
    from manyscale.ship.measure import fingerprint

    if len(files) > 1:
        raise ValueError(f"field `cascade`: give one file, or none for the run's own, not {' '.join(files)}; pictures stand before it")
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    return read_cascade(files[0] if files else folder / "cascade.json", fingerprint(net))


def _paint(model: str, files: list[str], folder: Path, device: str, json_lines: bool) -> None:
    from manyscale.ship.paint import paint_files
    from manyscale.tasks.simmim import draw_painted

    answers = paint_files(model, files, device)
    records = [answer.as_json() for answer in answers]
    for record in records:
        if json_lines:
            print(json.dumps(record))
        else:
            print(f"{plain(record['path'])}: {record['error'] if 'error' in record else 'l1 {:.4f}'.format(record['l1'])}")
    write(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    good = [answer for answer in answers if answer.painted]
    if not good:
        raise ValueError(f"none of the {len(answers)} files could be read")
    shown = good[:16]
    captions = [f"{Path(answer.path).name}\nl1 {answer.painted.errors[0]:.3f}" for answer in shown]
    write(folder / "sheet.png", lambda path: draw_painted([answer.painted for answer in shown], path, captions))
    print(f"wrote {folder}/predictions.jsonl and sheet.png", file=sys.stderr)


def _thumbnail(path: str) -> Any:
    from manyscale.data.images import read_image

    picture = read_image(path, 64_000_000)
    picture.thumbnail((256, 256))
    return picture


def _print_predictions(answers: list[Any]) -> None:
    table = Table("file", "top", "probability", box=None, pad_edge=False)
    for answer in answers:
        if answer.error:
            table.add_row(escape(plain(answer.path)), f"[red]{escape(plain(answer.error))}[/red]", "")
        for rank, (label, probability) in enumerate(answer.top):
            table.add_row("" if rank else escape(plain(answer.path)), escape(plain(label)), f"{probability:.1%}")
    Console(highlight=False).print(table)


def transfer(arguments: list[str]) -> None:
    """The same weights at another image size and window or patch, or other sizes, nothing retrained."""

    def run(
        model: Positional[str],
        image_size: Size | None = None,
        sizes: tuple[int, ...] | None = None,
        window: Windows | None = None,
        patch: Size | None = None,
        recalibrate: str = "",
        out: str = "",
    ) -> None:
        """Lay a model out anew.

        Args:
            model: a run's folder or a folder with a model.
            image_size: pixels: one number, or height and width.
            sizes: pixels, of a SuperViT, instead: all that it is to have.
            window: tokens, of a Swin; left out: as it is.
            patch: pixels, of a ViT; left out: as it is.
            recalibrate: a set; batch norms of a conv stem (SuperViT) are measured at each size on 2,000 of its training pictures.
            out: the new folder; empty: beside the old one.
        """
        from manyscale.models import load, recalibrated, save
        from manyscale.models import transfer as move
        from manyscale.ship.evaluate import pictures_for, recipe_of

        if image_size is None and sizes is None and not recalibrate:
            raise ValueError("give --image-size, or of a SuperViT --sizes, such as --sizes 128 160 192 224")
        old, recipe = load(model), recipe_of(model)
        new = move(old, image_size, window, sizes=sizes, patch=patch)
        if recalibrate:
            new = recalibrated(new, pictures_for(new, recalibrate))
        size = "x".join(map(str, new.config.size)) if len(set(new.config.size)) > 1 else str(new.config.size[0])
        size = "_".join(map(str, sizes)) if sizes else size
        folder = Path(out or f"{str(model).rstrip('/')}_{size}")
        save(new, folder)
        if recipe:
            write_json(folder / "recipe.json", to_dict(recipe))
        what = {ViTConfig: "patches", SuperViTConfig: "sizes"}.get(type(new.config), "windows")
        print(f"{what} {getattr(old.config, what)} -> {getattr(new.config, what)}")
        print("\n".join(new.config.clipped), end="\n" if new.config.clipped else "")
        print(f"wrote {folder}; score it with `manyscale eval {folder}`")

    parse(run, "transfer", arguments)


def convert(arguments: list[str]) -> None:
    """A foreign checkpoint becomes a model of this package."""

    def run(
        file: Positional[str],
        source: Source,
        name: str,
        out: str,
        image_size: Size | None = None,
        sizes: tuple[int, ...] | None = None,
        window: Windows | None = None,
        pretrained_window: Windows | None = None,
        classes: int | None = None,
        ema: bool | None = None,
        crop_ratio: float = 0.875,
        statistics: Literal["imagenet", "half"] = "imagenet",
        interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic",
        allow_nonfinite: bool = False,
    ) -> None:
        """Read a Swin, ViT or SuperViT checkpoint of another project.

        Args:
            file: .safetensors, or .pth, .pt, .bin, .ckpt (read without running code), or .npz.
            source: whose layout it has; simmim: a SimMIM file with its mask token and decoder (official: its encoder alone).
            name: the preset it is, such as swinv2_tiny, vit_tiny_patch16 or B/16; of a ViT also the one it shall be, a supervit_deit_*.
            out: the folder to write.
            image_size: pixels it was trained at, where not the preset's.
            sizes: of a SuperViT: those of its position tables, where not the preset's; of a ViT that becomes one: those it shall have.
            window: tokens it was trained with, where not the preset's.
            pretrained_window: the window its bias network learnt at, where it was fine-tuned at a larger one.
            classes: where the file's head does not say.
            ema: of a training's checkpoint: True: the moving average of the weights, False: the raw ones; left out: the raw ones, but
                of a SuperViT on LV-ViT the average.
            crop_ratio: of the evaluation's centre crop; 0: squash.
            statistics: mean and deviation of its pictures; half: 0.5 both, as most ViTs.
            interpolation: how pictures are resized.
            allow_nonfinite: take weights that are NaN or infinite.
        """
        from manyscale.heads.pixels import MaskedImages, save_masked
        from manyscale.models import save
        from manyscale.ship.convert import convert as read

        fields = {"image_size": image_size, "sizes": sizes, "window": window, "pretrained_window": pretrained_window, "classes": classes}
        given = {key: value for key, value in fields.items() if value is not None}
        model = read(file, source=source, name=name, ema=ema, allow_nonfinite=allow_nonfinite, **given)
        net = model.encoder if isinstance(model, MaskedImages) else model
        numbers = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} if statistics == "half" else {}
        net.preprocess = Preprocess(image_size=net.config.size, crop_ratio=crop_ratio, interpolation=interpolation, **numbers)
        (save_masked if isinstance(model, MaskedImages) else save)(model, out)
        print(f"wrote {out}: {name}, {sum(p.numel() for p in model.parameters()):,} parameters")

    parse(run, "convert", arguments)
