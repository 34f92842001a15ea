"""Work on many samples in processes that may crash or hang: the sample is reported, another process takes over.

`concurrent.futures` gives up all of its work when one process dies, and does not say which sample it was.
"""

import json
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

EACH = 16  # samples handed out at a time


class Fault(NamedTuple):
    """A sample that its process did not survive."""

    kind: str  # crash or hang
    reason: str


class _Hand:
    """A process and what it was given; samples are answered in order, so the first unanswered is the one it works on."""

    def __init__(self, work: Callable[[int], Any], seconds: float) -> None:
        context = get_context("fork")  # the source need not be copied
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds, self.deadline, self.given = seconds, 0.0, deque[int]()

    def give(self, some: list[int]) -> None:
        self.pipe.send_bytes(json.dumps(some).encode())
        self.given.extend(some)
        self.deadline = time.monotonic() + self.seconds

    def answer(self) -> Any:
        """The next answer. Raises `EOFError` or `OSError` where the process has died."""
        value = json.loads(self.pipe.recv_bytes())
        self.given.popleft()
        self.deadline = time.monotonic() + self.seconds
        return value

    def end(self) -> int:
        """Kill the process, however it is, and give its exit code."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return self.process.exitcode or 0


def over_processes(work: Callable[[int], Any], count: int, *, workers: int, seconds: float) -> Iterator[tuple[int, Any]]:
    """(i, work(i)) for every 0 <= i < count, as they come; where the process died, or took longer than `seconds`, (i, `Fault`).

    Args:
        work: returns what JSON can hold; runs in forked processes.
    """
    todo = deque(list(range(start, min(start + EACH, count))) for start in range(0, count, EACH))
    hands = [_Hand(work, seconds) for _ in range(max(1, min(workers, len(todo))))]
    try:
        while todo or any(hand.given for hand in hands):
            for place, hand in enumerate(hands):
                if todo and not hand.given:
                    try:
                        hand.give(todo[0])
                        todo.popleft()
                    except OSError:  # killed while it had nothing to do
                        hand.end()
                        hands[place] = _Hand(work, seconds)
            busy = [hand for hand in hands if hand.given]
            patience = max(0.0, min((hand.deadline for hand in busy), default=0.0) - time.monotonic())
            ready = wait([hand.pipe for hand in busy], timeout=patience)
            for place, hand in enumerate(hands):
                if not hand.given:
                    continue
                sample = hand.given[0]
                if hand.pipe in ready:
                    try:
                        yield sample, hand.answer()
                        continue
                    except (EOFError, OSError):
                        fault = Fault("crash", f"its decoder died: {_cause(hand.process)}")
                elif time.monotonic() > hand.deadline and not hand.pipe.poll():
                    fault = Fault("hang", f"its decoder took more than {seconds:g} s")
                else:
                    continue
                rest = list(hand.given)[1:]
                hand.end()
                hands[place] = _Hand(work, seconds)
                if rest:
                    todo.appendleft(rest)
                yield sample, fault
    finally:
        for hand in hands:
            hand.end()


def _cause(process: Any) -> str:
    process.join(1)
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(work: Callable[[int], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            some = json.loads(pipe.recv_bytes())
        except EOFError:  # the parent has gone
            return
        for sample in some:
            pipe.send_bytes(json.dumps(work(sample)).encode())
