"""What the verbs share: reading their arguments, printing tables, and leaving with a message."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import AvoidSubcommands, OmitArgPrefixes

from manyscale.config import nearest


def parse(function: Callable[..., Any], name: str, arguments: list[str], **options: Any) -> Any:
    """Call `function` with what `arguments` say; `options` go to tyro."""
    return tyro.cli(function, prog=f"manyscale {name}", args=arguments, config=(OmitArgPrefixes, AvoidSubcommands), **options)


def choose(verb: str, asked: str, choices: dict[str, tuple[Callable[..., Any], str]], arguments: list[str]) -> None:
    """Call the one of a verb's `choices`, each a function and its usage, that comes first in `arguments`; or print them all.

    Args:
        asked: what a call without one is told to give.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(f"manyscale {verb} {name} {usage}" for name, (_, usage) in choices.items()))
        if not arguments:
            raise ValueError(f"give {asked}: {', '.join(choices)}")
        return
    if arguments[0] not in choices:
        raise ValueError(f"unknown {verb} `{arguments[0]}`; {nearest(arguments[0], choices)}")
    parse(choices[arguments[0]][0], f"{verb} {arguments[0]}", arguments[1:])


def leave(message: str, code: int) -> NoReturn:
    """End the process: a sentence for the person, an exit code for the shell."""
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)  # of files' names, see `plain`
    who = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    print(f"manyscale{who}: {shown}", file=sys.stderr)
    raise SystemExit(code)


def plain(text: str) -> str:
    """`text` as one printable line: names of files may hold line breaks and what terminals take for orders."""
    return text if text.isprintable() else ascii(text)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: int, title: str | None = None) -> Table:
    """A plain table, its columns from the `right`th on flush right."""
    table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for column in table.columns[right:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def show(table: Table) -> None:
    """Print a table; where the output is no terminal, 160 characters wide."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
