"""SHA-256 of every file of a world folder, so that damage is noticed before anything is computed.

They tell damage, not malice: whoever can change a file can change its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

from nfd_env.files import atomic_write, found_file
from nfd_env.models.weights import CheckpointError

CHECKSUMS = "checksums.json"
_MOST_BYTES = 1_000_000  # the file of a world has a few hundred

# What has been read in this process: (path, size, time of change, inode) -> SHA-256.
_known: dict[tuple[str, int, int, int], str] = {}
_warned: set[Path] = set()


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write ``checksums.json`` for the files that lie in ``folder`` now.

    For a world from before there were checksums, or one that was edited on purpose.
    """
    folder = Path(folder)
    files = [*folder.iterdir(), *folder.glob("*/*.safetensors")]
    names = sorted(
        p.relative_to(folder).as_posix() for p in files if p.is_file() and p.name[0] != "."
    )
    sums = {name: sha256(folder / name) for name in names if name != CHECKSUMS}
    with atomic_write(folder / CHECKSUMS) as temporary:
        temporary.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, *names: str) -> None:
    """Compare files of ``folder`` with their checksums; warn once where the world has none.

    Raises:
        CheckpointError: naming the file that is not as it was written.
    """
    sums = read_checksums(folder)
    if sums is None:
        if folder not in _warned:
            _warned.add(folder)
            warnings.warn(
                f"{folder} has no {CHECKSUMS}, so damaged files would not be noticed; if it is as "
                "it should be, nfd_env.worlds.checksums.write_checksums(folder) adds them",
                stacklevel=2,
            )
        return
    for name in names:
        path = folder / name
        there = found_file(path, CheckpointError)
        if name in sums and not there:
            raise CheckpointError(f"{path}: missing; copy or export the world again")
        if there and sums.get(name) != sha256(path):
            state = "is not listed" if name not in sums else "does not match its checksum"
            raise CheckpointError(
                f"{path}: damaged: it {state} in {CHECKSUMS}. Copy, pull or export the world "
                "again; if you changed it on purpose, call "
                "nfd_env.worlds.checksums.write_checksums(folder)"
            )


def is_whole(folder: Path) -> bool:
    """Whether all files that ``checksums.json`` names are there as they were written."""
    try:
        sums = read_checksums(folder)
        if sums:
            verify(folder, *sums)
    except CheckpointError:
        return False
    return bool(sums)


def verify_listed(folder: Path, name: str) -> None:
    """The same of one file that may have been added since; then nothing is known of it."""
    if name in (read_checksums(folder) or {}):
        verify(folder, name)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; computed anew when size or time have changed."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
    if key not in _known:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        _known[key] = digest.hexdigest()
    return _known[key]


def read_checksums(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256, as ``checksums.json`` says; None where there is no such file.

    Raises:
        CheckpointError: when it is damaged.
    """
    path = folder / CHECKSUMS
    if not found_file(path, CheckpointError):
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        sums = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sums, dict):
            raise ValueError("not a table")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); copy or export the world again"
        ) from None
    return sums
