"""Stopping when the user, a terminal or a cluster asks for it, with everything saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def asked_by_signal(error: BaseException) -> bool:
    """Whether a handler of this package raised ``error``, and not the foreign code it was in."""
    if isinstance(error, Exception):  # no handler raises those
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = "" if traceback is None else traceback.tb_frame.f_globals["__name__"]
    return raised_in.startswith("nfd_env.") and not raised_in.startswith("nfd_env.sources.")


class StopRequest:
    """Whether INT, TERM or HUP has arrived; see ``stopping``."""

    def __init__(self) -> None:
        """Nothing has arrived yet."""
        self._signal = 0
        self._at_once = False

    @property
    def asked(self) -> bool:
        """A signal has arrived."""
        return self._signal != 0

    @property
    def signal(self) -> int:
        """The signal that has arrived, 0 for none."""
        return self._signal

    def take(self, number: int) -> None:
        """Stop as if the signal ``number`` had arrived here; 0 for none."""
        self._signal = self._signal or number

    def obey(self) -> None:
        """Stop if a signal has arrived.

        Raises:
            KeyboardInterrupt: after INT.
            SystemExit: after TERM or HUP, with the status that shells give such a process.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            raise SystemExit(128 + self._signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals that arrive within the block end it: there is nothing in it to save."""
        self._at_once = True
        try:
            self.obey()
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self._signal == number == signal.SIGINT  # somebody is impatient
        self._signal = self._signal or number
        if self._at_once or again:
            self.obey()


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """Note INT, TERM and HUP within the block, whose code stops where it suits it.

    A second INT does not wait. See ``told_by_signals`` for which signals are heard.

    Raises:
        KeyboardInterrupt, SystemExit: when the block is over and did not obey, see there.
    """
    request = StopRequest()
    with told_by_signals(request._receive):
        yield request
    request.obey()


@contextmanager
def told_by_signals(receive: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call ``receive`` at INT, TERM and HUP within the block.

    INT is heard also where it was ignored, as shells have it for what runs in the background; HUP
    is not, because ``nohup`` ignores it on purpose. Elsewhere than in the main thread no signals
    arrive, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if number == signal.SIGINT or handler != signal.SIG_IGN:
            signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
