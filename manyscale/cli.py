"""The command line: `manyscale VERB ...`. A verb imports the engine when it runs, so that help answers at once.

Exit codes: 0 done; 1 the run could not go on; 2 something in the call or its files must be mended; 130, 143 stopped by
Ctrl-C, SIGTERM after saving.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional

import manyscale
from manyscale.config import Preprocess, Run, Size, Windows, nearest, to_dict
from manyscale.presets import list_models, model_config
from manyscale.recipes import RECIPES, tiny
from manyscale.storage import write, write_json

Source = Literal["official", "timm", "transformers", "torchvision", "mmpretrain"]


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        _overview()
        return
    if given[0] in ("-V", "--version", "version"):
        print(f"manyscale {manyscale.__version__}")
        return
    try:
        if given[0] not in VERBS:
            raise ValueError(f"unknown verb `{given[0]}`; {nearest(given[0], VERBS)}")
        VERBS[given[0]](given[1:])
    except ValueError as error:
        _leave(str(error), 2)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        _leave(f"{error.filename or 'file'}: {error.strerror or error}; give --out a folder that can be written and has space left", 2)
    except KeyboardInterrupt:
        _leave("stopped by Ctrl-C", 130)


def _leave(message: str, code: int) -> None:
    print(f"manyscale: {message}", file=sys.stderr)
    raise SystemExit(code)


def _overview() -> None:
    console = Console(highlight=False)
    console.print(f"manyscale {manyscale.__version__}: vision transformers at many scales of capacity, resolution and cost\n")
    table = Table.grid(padding=(0, 3))
    for name, verb in VERBS.items():
        table.add_row(f"  manyscale {name}", (verb.__doc__ or "").split("\n")[0])
    console.print(table)
    console.print("\nEach verb answers --help. Recipes: " + ", ".join(RECIPES), soft_wrap=True)


def _parse(function: Callable[..., Any], name: str, arguments: list[str]) -> Any:
    return tyro.cli(function, prog=f"manyscale {name}", args=arguments, config=(OmitArgPrefixes,))


# -- verbs, in the order of use -----------------------------------------------------------------------------------------------


def demo(arguments: list[str]) -> None:
    """The whole story on embedded data in a few CPU minutes; ends with a report."""

    def run(out: str = "runs/demo") -> None:
        """Train a micro Swin V2 and the same net with a table bias on digits, transfer both, and write a report.

        Args:
            out: the folder it is written to.
        """
        from manyscale.studies.demo import demo as story
        from manyscale.train.loop import Stopped

        try:
            story(Path(out))
        except Stopped as stopped:
            _leave(str(stopped), stopped.exit_code)

    _parse(run, "demo", arguments)


def train(arguments: list[str]) -> None:
    """Train a recipe; the same command again goes on where it stopped."""
    if not arguments or arguments[0].startswith("-"):
        print("manyscale train RECIPE [--tiny] [--field value ...]\n\nRecipes:")
        for name, recipe in RECIPES.items():
            function = getattr(recipe, "func", recipe)
            print(f"  {name:42} {(function.__doc__ or '').split(chr(10))[0]}")
        print("\n`manyscale train RECIPE --help` lists every field. --tiny: the recipe's twin for a CPU minute.")
        if arguments and arguments[0] in ("-h", "--help"):
            return
        raise ValueError("give a recipe, such as `manyscale train digits`")
    name, *rest = arguments
    if name not in RECIPES:
        raise ValueError(f"unknown recipe `{name}`; {nearest(name, RECIPES)}")
    recipe = RECIPES[name]()
    if "--tiny" in rest:
        rest.remove("--tiny")
        recipe = tiny(recipe)
    run = tyro.cli(Run, prog=f"manyscale train {name}", default=recipe, args=rest, config=(OmitArgPrefixes,))
    from manyscale.train.loop import Stopped
    from manyscale.train.loop import train as learn

    try:
        learn(run)
    except Stopped as stopped:
        _leave(str(stopped), stopped.exit_code)


def evaluate(arguments: list[str]) -> None:
    """Score a trained model on a split of its set, or of another."""

    def run(
        model: Positional[str],
        data: str = "",
        split: str = "val",
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
            batch: pictures at a time.
            workers: loader processes.
            device: where to compute.
            json_lines: print one line of JSON instead of words.
        """
        from manyscale.ship.evaluate import evaluate as measure

        bad: list[str] = []
        metrics = measure(
            model,
            lambda path, reason: bad.append(f"left out {path}: {reason}"),
            data=data,
            split=split,
            batch=batch,
            workers=workers,
            device=device,
        )
        print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
        if json_lines:
            print(json.dumps({**metrics, "split": split, "bad_files": len(bad)}))
        else:
            print(f"{model} on {split}: top-1 {metrics['accuracy']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['val_loss']:.4f}, "
                  f"{metrics['pictures']:,} pictures, {len(bad)} left out")  # fmt: skip

    _parse(run, "eval", arguments)


def predict(arguments: list[str]) -> None:
    """What a model says of files or folders: a table, JSON lines, a contact sheet."""

    def run(
        model: Positional[str],
        files: Positional[tuple[str, ...]],
        top: int = 5,
        out: str = "",
        device: str = "auto",
        json_lines: bool = False,
    ) -> None:
        """Predict the classes of pictures.

        Args:
            model: a run's folder or a folder with a model.
            files: pictures, or folders of them.
            top: how many classes of each.
            out: where `predictions.jsonl` and `sheet.png` go; empty: `predictions` in the model's folder.
            device: where to compute.
            json_lines: print JSON lines instead of a table.
        """
        from manyscale.models import load
        from manyscale.ship.predict import find_pictures
        from manyscale.ship.predict import predict as ask
        from manyscale.tasks.classify import draw_sheet
        from manyscale.train.state import pick_device

        if not files:
            raise ValueError("give at least one picture or folder")
        if top < 1:
            raise ValueError(f"field `top`: {top} must be at least 1")
        answers = list(ask(load(model).to(pick_device(device)), find_pictures(files), top=top))
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
        print(f"wrote {folder}/predictions.jsonl and sheet.png", file=sys.stderr)

    _parse(run, "predict", arguments)


def _thumbnail(path: str) -> Any:
    from manyscale.data.images import read_image

    picture = read_image(path, 64_000_000)
    picture.thumbnail((256, 256))
    return picture


def _print_predictions(answers: list[Any]) -> None:
    table = Table("file", "top", "probability", box=None, pad_edge=False)
    for answer in answers:
        if answer.error:
            table.add_row(escape(answer.path), f"[red]{escape(answer.error)}[/red]", "")
        for rank, (label, probability) in enumerate(answer.top):
            table.add_row("" if rank else escape(answer.path), escape(label), f"{probability:.1%}")
    Console(highlight=False).print(table)


def transfer(arguments: list[str]) -> None:
    """The same weights at another image size and window, nothing retrained."""

    def run(model: Positional[str], image_size: Size, window: Windows | None = None, out: str = "") -> None:
        """Lay a model out anew.

        Args:
            model: a run's folder or a folder with a model.
            image_size: pixels: one number, or height and width.
            window: tokens; left out: as it is.
            out: the new folder; empty: beside the old one.
        """
        from manyscale.models import load, save
        from manyscale.models import transfer as move
        from manyscale.ship.evaluate import recipe_of

        old, recipe = load(model), recipe_of(model)
        new = move(old, image_size, window)
        size = "x".join(map(str, new.config.size)) if len(set(new.config.size)) > 1 else str(new.config.size[0])
        folder = Path(out or f"{str(model).rstrip('/')}_{size}")
        save(new, folder)
        if recipe:
            write_json(folder / "recipe.json", to_dict(recipe))
        print(f"windows {old.config.windows} -> {new.config.windows}")
        print("\n".join(new.config.clipped), end="\n" if new.config.clipped else "")
        print(f"wrote {folder}; score it with `manyscale eval {folder}`")

    _parse(run, "transfer", arguments)


def convert(arguments: list[str]) -> None:
    """A foreign checkpoint becomes a model of this package."""

    def run(
        file: Positional[str],
        source: Source,
        name: str,
        out: str,
        image_size: Size | None = None,
        window: Windows | None = None,
        pretrained_window: Windows | None = None,
        classes: int | None = None,
        crop_ratio: float = 0.875,
    ) -> None:
        """Read a Swin checkpoint of another project.

        Args:
            file: .safetensors, or .pth, .pt, .bin, .ckpt (read without running code).
            source: whose layout it has.
            name: the preset it is, such as swinv2_tiny.
            out: the folder to write.
            image_size: pixels it was trained at, where not the preset's.
            window: likewise.
            pretrained_window: the window its bias network learnt at, where it was fine-tuned at a larger one.
            classes: where the file's head does not say.
            crop_ratio: of the evaluation's centre crop; 0: squash.
        """
        from manyscale.models import save
        from manyscale.ship.convert import convert as read

        fields = {"image_size": image_size, "window": window, "pretrained_window": pretrained_window, "classes": classes}
        model = read(file, source=source, name=name, **{key: value for key, value in fields.items() if value is not None})
        model.preprocess = Preprocess(image_size=model.config.size, crop_ratio=crop_ratio)
        save(model, out)
        print(f"wrote {out}: {name}, {sum(p.numel() for p in model.parameters()):,} parameters")

    _parse(run, "convert", arguments)


def plan(arguments: list[str]) -> None:
    """Answers before you pay: `plan count MODEL` (parameters, GFLOPs by stage)."""

    def count(model: Positional[str], image_size: Size | None = None, window: Windows | None = None, classes: int | None = None) -> None:
        """Parameters and multiply-adds by stage.

        Args:
            model: a preset, such as swinv2_tiny, or a pattern, such as "swinv2*".
            image_size: pixels, where not the preset's.
            window: tokens, likewise.
            classes: of the head, likewise.
        """
        from manyscale.plan import count as counting

        fields = {
            key: value for key, value in {"image_size": image_size, "window": window, "classes": classes}.items() if value is not None
        }
        names = list_models(model) or [model]
        for name in names:
            header, *rows = counting.table(counting.count(model_config(name, **fields)))
            table = Table(*header, title=name, title_justify="left", box=None, pad_edge=False)
            for column in table.columns[3:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            Console(highlight=False).print(table)

    kinds: dict[str, Callable[..., None]] = {"count": count}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("manyscale plan count MODEL [--image-size ...] [--window ...] [--classes ...]")
        if not arguments:
            raise ValueError(f"give what to plan: {', '.join(kinds)}")
        return
    if arguments[0] not in kinds:
        raise ValueError(f"unknown plan `{arguments[0]}`; {nearest(arguments[0], kinds)}")
    _parse(kinds[arguments[0]], f"plan {arguments[0]}", arguments[1:])


def models(arguments: list[str]) -> None:
    """List the presets."""

    def run(pattern: Positional[str] = "*") -> None:
        """Names of presets with their parameters and GFLOPs.

        Args:
            pattern: shell-style, such as "swinv2*".
        """
        from manyscale.plan.count import count

        table = Table("name", "parameters", "GFLOPs", "image", "window", box=None, pad_edge=False)
        for name in list_models(pattern):
            config = model_config(name)
            counted = count(config)
            table.add_row(name, f"{counted.parameters:,}", f"{counted.macs / 1e9:.1f}", str(config.image_size), str(config.window))
        Console(highlight=False).print(table)

    _parse(run, "models", arguments)


def doctor(arguments: list[str]) -> None:
    """Versions, devices, one step of each model family, loader speed."""

    def run() -> None:
        """See whether this machine is ready."""
        from manyscale.ship.doctor import examine

        ill = 0
        for what, finding, well in examine():
            print(f"{'ok  ' if well else 'FAIL'}  {what:24} {finding}", flush=True)
            ill += not well
        if ill:
            raise SystemExit(1)

    _parse(run, "doctor", arguments)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "transfer": transfer,
    "convert": convert,
    "plan": plan,
    "models": models,
    "doctor": doctor,
}


if __name__ == "__main__":
    main()
