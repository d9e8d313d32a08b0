"""The current folder is the whole process's: a game that changes it must change only its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class OwnPlace:
    """Where a game's code has gone, which is nobody else's affair.

    Else relative paths, of what is being written too, would mean others.
    """

    def __init__(self) -> None:
        """It is where everybody is."""
        self._own: str | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The game's code runs within the block, where it last was; behind it all is as before."""
        here = _current()
        if self._own is not None:
            _go(self._own)
        try:
            yield
        finally:
            now = _current()
            self._own = now if now != here else None
            if here is not None and now != here:
                _go(here)


def _current() -> str | None:
    with suppress(OSError):  # it was deleted
        return os.getcwd()
    return None


def _go(folder: str) -> None:
    with suppress(OSError):  # it is gone meanwhile: stay
        os.chdir(folder)
