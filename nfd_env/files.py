"""Files that are whole or not there, and folders that have one owner at a time."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_OWNER_LENGTH = 200  # characters of the owner's command that are worth showing


_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class FolderInUseError(RuntimeError):
    """Another process is writing into the folder."""


class FolderError(RuntimeError):
    """A folder cannot be written to."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, which takes its place when the block ends.

    After an error, or a stop at any moment, ``path`` is what it was before. It may be read by whom
    any new file may be read by, whatever made it (safetensors has its files for the owner alone).
    """
    path = Path(path)
    # Processes, threads and machines may write the same file; the last one wins, whole.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        with open(temporary, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                os.chmod(temporary, mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        # A full disk does not say of which file, or tells the temporary name.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in one line what a failed write into ``folder`` means.

    Raises:
        FolderError: for any failed write.
    """
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"{folder} cannot be written to ({_reason(error)}): make room or choose another "
            "folder, then run the same command again; what was stored before is whole"
        ) from None


def save_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, all or nothing.

    Raises:
        FolderError: when it cannot be written.
    """
    with writing(path.parent), atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(*paths: str | os.PathLike[str] | None, folders: bool = False) -> None:
    """Refuse files now that could not be written once the work is done; nothing is made.

    Args:
        paths: files, in folders that are there or not yet; None for none.
        folders: they are folders, which may be there.

    Raises:
        FolderError: says which, and why.
    """
    for path in (Path(path).expanduser() for path in paths if path is not None):
        try:
            if path.is_dir() and not folders:
                raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
            folder = path.parent
            while not os.path.lexists(folder):
                folder = folder.parent
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise FolderError(f"{path} cannot be written: {_reason(error)}") from None


def check_current_folder() -> None:
    """Refuse to work in a folder that was deleted: oneMKL, within torch, ends the process there.

    Raises:
        FolderError: when this process is in one.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise FolderError(
            f"the current folder is not there any more ({_reason(error)}): change to another one"
        ) from None


def found_file(path: str | os.PathLike[str], error: type[Exception]) -> bool:
    """Whether there is a file, or a link to one, at ``path``; False where there is nothing.

    To be asked before it is opened: reading a pipe waits for ever.

    Raises:
        Exception: ``error``, when something else is there; says what.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise error(f"{path}: is a link to nothing; put the file in its place") from None
        return False
    except (OSError, ValueError) as reason:
        raise error(f"{path}: {_reason(reason)}") from None
    if stat.S_ISREG(mode):
        return True
    kind = next((kind for kind, is_it in _KINDS.items() if is_it(mode)), "something else")
    raise error(f"{path}: is {kind}, not a file; put the file in its place, or take it away")


class Ownership:
    """The only right to write something in a folder, of one holder among all processes.

    The operating system takes it back however the process ends, so nothing is left to clear up: the
    files stay and mean nothing.
    """

    def __init__(self, folder: Path, what: str = "", wait: float = 0.0) -> None:
        """Take it.

        Args:
            folder: an existing folder.
            what: part of the folder that it is about; "" for the folder.
            wait: seconds to wait for an owner that is about to end.

        Raises:
            FolderInUseError: when another process, or another part of this one, owns it.
            FolderError: when the folder cannot be written to or knows no locks.
        """
        self._owner = folder / f".owner{what and '-' + what}.json"
        # Not thread_local: who took it may give it back in another thread.
        lock = FileLock(folder / f".lock{what and '-' + what}", thread_local=False)
        end = time.monotonic() + wait
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                raise FolderInUseError(
                    f"{folder}{what and ' (' + what + ')'} is "
                    f"{_described(self._owner, lock.lock_file)}, and run this again"
                ) from None
            except (OSError, RuntimeError) as error:  # the latter where folders know no locks
                raise FolderError(
                    f"{folder} cannot be locked for writing: {_reason(error)}"
                ) from None
        self._lock = lock
        try:
            owner = {
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "host": socket.gethostname(),
                "command": " ".join(sys.argv)[:_OWNER_LENGTH],
            }
            save_text(self._owner, json.dumps(owner))
        except FolderError:
            self.release()
            raise

    @property
    def held(self) -> bool:
        """Whether it has not been given back."""
        return self._lock.is_locked

    def release(self) -> None:
        """Give it back; what is still to be written belongs to somebody else now."""
        if self.held:
            with suppress(OSError):
                self._owner.unlink(missing_ok=True)
            self._lock.release()


@contextmanager
def owned_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Own ``folder`` (made where it is not there) for writing, as the only process.

    What was made for it goes again where the work fails before anything was written.

    Raises:
        FolderInUseError: when another process owns it; says which.
        FolderError: when it cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    make_folder(folder)
    ownership = Ownership(folder)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # of what cannot be taken away, the lock at most is left
            own = [folder / ".lock", folder / ".owner.json"]
            if made and set(folder.iterdir()) <= {*own}:
                for path in own:  # while it is owned: nobody else can be about to write
                    path.unlink(missing_ok=True)
                for place in made:
                    place.rmdir()
        raise
    finally:
        ownership.release()


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make ``folder``, where "~" is the user's home, unless it is there.

    Raises:
        FolderError: when that cannot be.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder} cannot be made: {_reason(error)}") from None
    return folder


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _described(owner: Path, lock: str) -> str:
    """Who holds ``lock`` according to ``owner``, a file, and what to do about it."""
    try:
        found_file(owner, ValueError)
        told = json.loads(owner.read_text(encoding="utf-8"))
        pid = int(told["pid"])
        who = f"process {pid} on {told['host']} ({told['command']})"
        ended = told["host"] == socket.gethostname() and _started(pid) != told.get("started")
        heirs = _holders(lock) if ended else []
    except (OSError, ValueError, KeyError, TypeError):  # between locking and writing it
        return "being written by another process; wait for it, or stop it"
    if heirs:  # a game of its may have forked, which locks outlive
        left = " and ".join(map(str, heirs))
        return f"still locked by process {left}, which {who} left behind when it ended; stop {left}"
    return f"being written by {who}; wait for it, or stop it"


def _started(pid: int) -> str:
    """When a process began, in the system's own count; "" where that is not known."""
    try:  # names may hold spaces and brackets
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _holders(path: str) -> list[int]:
    """The processes that hold a file open, as far as this user may know."""
    found, wanted = [], os.stat(path)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.path.samestat(descriptor.stat(), wanted):
                found.append(int(descriptor.parts[2]))
    return sorted({*found} - {os.getpid()})
