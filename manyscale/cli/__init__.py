"""The command line: `manyscale VERB ...`. A verb imports the engine when it runs, so that help answers at once.

Exit codes: 0 done; 1 the run could not go on; 2 something in the call or its files must be mended; 130, 143 stopped by
Ctrl-C, SIGTERM after saving.
"""

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

import manyscale
from manyscale.cli.benching import bench
from manyscale.cli.curating import data
from manyscale.cli.exporting import export
from manyscale.cli.learning import demo, study, train
from manyscale.cli.parsing import leave
from manyscale.cli.planning import doctor, models, plan
from manyscale.cli.probing import fewshot
from manyscale.cli.using import compare, convert, evaluate, predict, transfer
from manyscale.config import nearest
from manyscale.recipes import RECIPES


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
        leave(str(error), 2)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        leave(f"{error.filename or 'file'}: {error.strerror or error}; give --out a folder that can be written and has space left", 2)
    except KeyboardInterrupt:
        leave("stopped by Ctrl-C", 130)


def _overview() -> None:
    console = Console(highlight=False)
    console.print(f"manyscale {manyscale.__version__}: vision transformers at many scales of capacity, resolution and cost\n")
    table = Table.grid(padding=(0, 3))
    for name, verb in VERBS.items():
        table.add_row(f"  manyscale {name}", (verb.__doc__ or "").split("\n")[0])
    console.print(table)
    console.print("\nEach verb answers --help. Recipes: " + ", ".join(RECIPES), soft_wrap=True)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "study": study,
    "compare": compare,
    "eval": evaluate,
    "fewshot": fewshot,
    "predict": predict,
    "transfer": transfer,
    "convert": convert,
    "export": export,
    "data": data,
    "plan": plan,
    "bench": bench,
    "models": models,
    "doctor": doctor,
}
