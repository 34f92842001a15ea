"""What the verbs share: reading their arguments, and leaving with a message."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro
from tyro.conf import AvoidSubcommands, OmitArgPrefixes


def parse(function: Callable[..., Any], name: str, arguments: list[str], **options: Any) -> Any:
    """Call `function` with what `arguments` say; `options` go to tyro."""
    return tyro.cli(function, prog=f"manyscale {name}", args=arguments, config=(OmitArgPrefixes, AvoidSubcommands), **options)


def leave(message: str, code: int) -> NoReturn:
    """End the process: a sentence for the person, an exit code for the shell."""
    print(f"manyscale: {message}", file=sys.stderr)
    raise SystemExit(code)
