"""Ctrl-C and SIGTERM: long work is stopped where it can go on from, and ends with the customary exit code.

The first process hears both and hands SIGTERM on to the processes it has started. Work that keeps its state holds
signals back until the next point at which that is whole.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESUME_HINT = "run the same command again to go on"

Handler = Callable[[int, FrameType | None], object]


class Interrupted(BaseException):
    """The signal `number` told this process to end. No Exception: nothing should take it for a mistake."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, as shells have it."""
        return 128 + self.number


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside, both signals end the processes that were started here and raise Interrupted."""
    with _handlers(_end):
        yield


def _end(number: int, _frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    raise Interrupted(number)


class DeferredSignals:
    """Signals that have come while they were held back."""

    def __init__(self) -> None:
        self.pending: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: remember the signal. Who presses Ctrl-C a second time cannot wait, and gets Interrupted; a pool
        of processes sends SIGTERM twice without meaning more by it.
        """
        del frame
        if self.pending is not None and number == signal.SIGINT:
            raise Interrupted(number)
        self.pending = number


@contextmanager
def defer_signals() -> Iterator[DeferredSignals]:
    """Inside, signals are only noted; one that came has its usual effect when the block ends, unless by an error."""
    held = DeferredSignals()
    with _handlers(held.note):
        yield held
    if held.pending is not None:
        _deliver(held.pending)


def _deliver(number: int) -> None:
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)
    else:
        signal.raise_signal(number)


@contextmanager
def _handlers(handler: Handler) -> Iterator[None]:
    """Both signals go to `handler`, unless they are ignored, or heard by something that is not Python and could not be
    put back. Only the main thread may ask for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    chosen = {number: old for number, old in before.items() if old not in {signal.SIG_IGN, None}}
    try:
        for number in chosen:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in chosen.items():
            signal.signal(number, old)
