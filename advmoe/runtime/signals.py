"""Handling of Ctrl-C and SIGTERM, with the usual exit codes.

The main process handles both and sends SIGTERM to its child processes. Work with checkpoints defers signals to the end
of a step, when its state is consistent.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESUME_HINT = "run the same command again to resume"

Handler = Callable[[int, FrameType | None], object]


class Interrupted(BaseException):
    """Raised for the signal `number`. Not an Exception, so that error handlers do not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code as in shells: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


@contextmanager
def handle_signals() -> Iterator[None]:
    """Context manager in which both signals terminate the child processes and raise Interrupted."""
    with _handlers(_terminate):
        yield


def _terminate(number: int, _frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    raise Interrupted(number)


class DeferredSignals:
    """Records the last signal that arrived while signals are deferred; None if there was none."""

    def __init__(self) -> None:
        self.pending: int | None = None

    def record(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C raises Interrupted at once; a second SIGTERM does not, as process pools
        send it twice.
        """
        del frame
        if self.pending is not None and number == signal.SIGINT:
            raise Interrupted(number)
        self.pending = number


@contextmanager
def defer_signals() -> Iterator[DeferredSignals]:
    """Context manager that defers signals: a recorded one takes effect at the end of the block, unless it raises."""
    signals = DeferredSignals()
    with _handlers(signals.record):
        yield signals
    if signals.pending is not None:
        _deliver(signals.pending)


def _deliver(number: int) -> None:
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)
    else:
        signal.raise_signal(number)


@contextmanager
def _handlers(handler: Handler) -> Iterator[None]:
    """Installs `handler` for both signals, except for signals that are ignored or handled outside Python, whose handler
    could not be restored. Does nothing outside the main thread, where Python does not allow it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {number: old for number, old in previous.items() if old not in {signal.SIG_IGN, None}}
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
