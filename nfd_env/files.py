"""Files that are whole or not there, and folders that have one owner at a time."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK, _OWNER = ".lock", ".owner.json"


class FolderInUseError(RuntimeError):
    """Another process is writing into the folder."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, which takes its place when the block ends.

    After an error, or a stop at any moment, ``path`` is what it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def owned_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Own ``folder`` (made where it is not there) for writing, as the only process.

    The operating system frees it however the process ends, so nothing is left to clear up.

    Raises:
        FolderInUseError: when another process owns it; says which.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"{folder} is being written by {_owner(folder)}; wait for it, or stop it, and run this "
            "again"
        ) from None
    try:
        with atomic_write(folder / _OWNER) as temporary:
            temporary.write_text(
                json.dumps(
                    {
                        "pid": os.getpid(),
                        "host": socket.gethostname(),
                        "command": " ".join(sys.argv)[:200],
                    }
                )
            )
        yield folder
    finally:
        (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    """A description of the process that owns ``folder``."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']} ({owner['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # between locking and writing it
        return "another process"
