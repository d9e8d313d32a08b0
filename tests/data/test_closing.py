"""Closing a game is its own code's affair, but it must not hold up who recorded it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import gymnasium
import pytest

from nfd_env.data import worker
from nfd_env.stopping import StopRequest, told_by_signals


class Closing(gymnasium.Env):
    """Does what it is told to when it is closed."""

    def __init__(self, behave: Any) -> None:
        self.behave = behave

    def close(self) -> None:
        self.behave()


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3)])
def test_what_its_own_code_raises_is_its_own_affair(error: BaseException) -> None:
    def behave() -> None:
        raise error

    worker.close(Closing(behave))
    worker.close(None)


def test_one_that_never_ends_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "_CLOSING", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    worker.close(Closing(lambda: time.sleep(60)))
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err == "nfd: a game did not close within 0.2 s and is left\n"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_is_obeyed() -> None:
    request = StopRequest()

    def behave() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    began = time.monotonic()
    with told_by_signals(request._receive), request.at_once(), pytest.raises(SystemExit):
        worker.close(Closing(behave))
    assert time.monotonic() - began < 10


def test_no_clock_is_set_where_no_signal_arrives() -> None:
    closed: list[str] = []
    thread = threading.Thread(
        target=lambda: worker.close(
            Closing(lambda: closed.append(threading.current_thread().name))
        ),
        name="other",
    )
    thread.start()
    thread.join()
    assert closed == ["other"]
