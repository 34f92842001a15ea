"""Who has gone silent: every rank leaves signs of life in the launcher's store, and where ranks lose each other, they say who is missing.

A collective that fails names no one: gloo says that a connection is closed, or that the time is over. NVIDIA's resiliency package has
the idea of a heartbeat beside the training.
"""

import faulthandler
import json
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from manyscale.ranks import Ranks, attempt

BEAT = 0.5  # seconds between signs
SILENCE = 3.0  # seconds without one


def is_loss(error: RuntimeError) -> bool:
    """Whether a collective failed, because another rank is gone or late; torch has no type for what gloo says."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


class Watch:
    """One rank's signs of life; a context. Alone, it does nothing.

    Args:
        folder: where `stacks/rank_N.txt` is written when ranks lose each other: where each was then.
    """

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder, self.step = ranks, folder, 0
        self.over, self.alarmed, self.store = threading.Event(), False, None

    def __enter__(self) -> "Watch":
        if self.ranks.count > 1:
            door, limit = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=30)
            # connections of its own, one for the thread: the group's store waits while a collective is set up
            self.store, mine = (self._prefixed(dist.TCPStore(*door, is_master=False, timeout=limit)) for _ in range(2))
            self.thread = threading.Thread(target=self._beat, args=(mine,), daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()

    def _prefixed(self, store: dist.Store) -> dist.Store:
        return dist.PrefixStore(f"manyscale watch/{attempt()}", store)

    def _beat(self, store: dist.Store) -> None:
        count = 0
        with suppress(dist.DistError, RuntimeError):  # the store is gone: so is the leader, or the launcher
            while not self.over.wait(BEAT):
                count += 1
                store.set(str(self.ranks.rank), json.dumps([count, self.step]))
                if not self.alarmed and store.check(["alarm"]):
                    self._dump()

    def _dump(self) -> None:
        self.alarmed = True
        with suppress(OSError):
            stacks = self.folder / "stacks"
            stacks.mkdir(exist_ok=True)
            with (stacks / f"rank_{self.ranks.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def missing(self) -> str:
        """Which ranks give no sign of life, or are not where this one is, in words.

        Takes some seconds, in which every rank that can writes down where it is.
        """
        self._dump()
        try:
            self.store.set("alarm", "1")
            before = self._signs()
            time.sleep(SILENCE)
            now = self._signs()
        except (dist.DistError, RuntimeError):
            return "the launcher, or rank 0, does not answer"
        others = [rank for rank in range(self.ranks.count) if rank != self.ranks.rank]
        silent = [f"rank {rank} gives no sign of life; it was last at step {now[rank][1]}" for rank in others if now[rank] == before[rank]]
        behind = [f"rank {rank} is at step {now[rank][1]}" for rank in others if now[rank] != before[rank] and now[rank][1] != self.step]
        return "; ".join(silent or behind) or f"all ranks live, and are at step {self.step}"

    def _signs(self) -> list[list[int]]:
        return [json.loads(self.store.get(str(rank))) if self.store.check([str(rank)]) else [0, 0] for rank in range(self.ranks.count)]
