"""Games that run in processes of their own must not outlive who started them."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Guard:
    """Kills games that run in processes of their own when this process dies, in whatever way.

    ViZDoom's games outlive a parent that was killed. A small process holds the end of a pipe: it
    ends when this process does, and then the games that are still there are killed, with whatever
    else was begun while they started. Where there is no /proc, nothing is watched.
    """

    _PROGRAM = """
import os, select, sys
parent, told = int(sys.argv[1]), b""
while not told.endswith(b"end\\n"):
    ended = os.getppid() != parent  # the pipe may be held for longer by what a game has forked
    if select.select([0], [], [], 0 if ended else 0.5)[0]:
        lines = os.read(0, 65536)
        if not lines:
            break
        told += lines
    elif ended:
        break
lines = [line.split() for line in told.decode().splitlines()]
games = dict(line for line in lines if len(line) == 2)  # not of "end", nor of half a line
for pid, started in games.items():
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            same = file.read().rpartition(b")")[2].split()[19].decode() == started
        if same:
            os.kill(int(pid), 9)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._parent = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Guard the processes that are started within the block."""
        before = _children()
        yield
        new = _children().items() - before.items()
        if new:
            with self._lock:
                process = self._start()
                # Another thread may have started the guard itself in the meantime.
                new = {(pid, started) for pid, started in new if pid != process.pid}
                pipe = process.stdin
                assert pipe is not None
                pipe.writelines(f"{pid} {started}\n" for pid, started in new)
                pipe.flush()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._parent != os.getpid():  # a fork needs its own
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", self._PROGRAM, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,  # what ends this process's group leaves the guard alone
            )
            self._parent = os.getpid()
            atexit.register(self._stop, self._process, self._parent)
        return self._process

    @staticmethod
    def _stop(process: subprocess.Popen[str], parent: int) -> None:
        if os.getpid() == parent:
            process.communicate("end\n")


GUARD = Guard()


def _children() -> dict[int, str]:
    """Process number and start time of each child of this process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = (
                path.read_bytes().rpartition(b")")[2].split()
            )  # names may be cut in a character
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == os.getpid():
            found[int(path.parent.name)] = fields[19].decode()
    return found
