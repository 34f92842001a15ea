"""Ranks for tests: real processes with real collectives, forked from one that has imported everything, so that they start at once."""

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks.preload"])


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def _be(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    import torch

    torch.set_num_threads(1)
    said = Path(folder) / f"rank_{rank}.json"
    code = 0
    try:
        said.write_text(json.dumps(function(*arguments)))
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        code = getattr(error, "exit_code", 70)
        said.write_text(json.dumps({"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}))
    os._exit(code)  # not through the forkserver's leftovers


class Team:
    """`count` processes that run `function(*arguments)`; the function must be importable."""

    def __init__(self, folder: Path, count: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.members = [
            CONTEXT.Process(target=_be, args=(rank, count, port, str(folder), function, arguments), daemon=True) for rank in range(count)
        ]
        for member in self.members:
            member.start()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            member.kill()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes; who has not ended by then is killed, with -9."""
        for member in self.members:
            member.join(seconds)
            if member.is_alive():
                member.kill()
                member.join()
        return [member.exitcode for member in self.members]

    def said(self) -> list[Any]:
        """What each function gave, or its error."""
        files = [self.folder / f"rank_{rank}.json" for rank in range(len(self.members))]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def together(folder: Path, count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """What each of `count` ranks gives; an error of any fails the test with all of them."""
    team = Team(folder, count, function, *arguments)
    codes = team.wait(seconds)
    assert not any(codes), (codes, *(said["where"] if isinstance(said, dict) and "where" in said else said for said in team.said()))
    return team.said()
