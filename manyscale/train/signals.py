"""SIGTERM and Ctrl-C end a run after the step in hand; a second Ctrl-C at once."""

import signal
from types import FrameType, TracebackType


class Signals:
    """A context in which they are only noted: `number` is the signal that came last, or 0."""

    def __init__(self) -> None:
        self.number, self.before = 0, {}

    def __enter__(self) -> "Signals":
        try:
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs it there handles signals
            self.before = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
