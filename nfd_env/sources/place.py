"""The current folder is the whole process's: a game that changes it must change only its own."""

from __future__ import annotations

import os
from types import TracebackType


class OwnPlace:
    """While foreign code runs, it is where it last was; behind it, everybody is where they were.

    A context manager. Else relative paths, of what is being written too, would mean others.
    """

    def __init__(self) -> None:
        """Where everybody is, for now."""
        self._own: str | None = None
        self._here: str | None = None

    def __enter__(self) -> None:
        """Go to where the foreign code was."""
        self._here = _current()
        if self._own is not None:
            _go(self._own)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Go back, and remember where it is now."""
        now = _current()
        if self._here is not None and now != self._here:
            self._own = now
            _go(self._here)
        elif self._own is not None and now == self._here:
            self._own = None


def _current() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _go(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError:  # gone meanwhile: stay
        pass
