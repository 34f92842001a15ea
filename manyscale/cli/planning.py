"""Verbs that answer before you pay: plan, models, doctor."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from manyscale.cli.parsing import parse
from manyscale.config import Size, SwinConfig, ViTConfig, Windows, nearest
from manyscale.presets import list_models, model_config


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
            config = model_config(name, **fields)
            header, *rows = counting.table(counting.count(config))
            table = Table(*header, title=name, title_justify="left", box=None, pad_edge=False)
            for column in table.columns[3:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            Console(highlight=False).print(table)
            if isinstance(config, ViTConfig):
                parameters, flops = counting.as_table_2(config)
                print(f"as Table 2 of Scaling ViT counts (no pooling, no head, a multiply-add as two): {parameters:,} parameters, "
                      f"{flops / 1e9:.1f} GFLOPs\n")  # fmt: skip

    kinds: dict[str, Callable[..., None]] = {"count": count}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("manyscale plan count MODEL [--image-size ...] [--window ...] [--classes ...]")
        if not arguments:
            raise ValueError(f"give what to plan: {', '.join(kinds)}")
        return
    if arguments[0] not in kinds:
        raise ValueError(f"unknown plan `{arguments[0]}`; {nearest(arguments[0], kinds)}")
    parse(kinds[arguments[0]], f"plan {arguments[0]}", arguments[1:])


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
            window = str(config.window) if isinstance(config, SwinConfig) else ""
            table.add_row(name, f"{counted.parameters:,}", f"{counted.macs / 1e9:.1f}", str(config.image_size), window)
        Console(highlight=False).print(table)

    parse(run, "models", arguments)


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

    parse(run, "doctor", arguments)
