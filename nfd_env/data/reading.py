"""How recorded arrays are read: from this machine's disks, or from an object store in blocks.

What lies in an object store is read through a *stand-in*: a data-set folder in this user's cache
that holds its small files and, in ``remote.json``, where the large ones are. A bounded number of
blocks of these is kept in memory; nothing large is written to disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env.data.layout import RecordingError, check_size
from nfd_env.data.lazy_frames import Frames, LazyFrames
from nfd_env.files import FolderError, atomic_write, found_file, make_folder, owned_folder

_REMOTE = "remote.json"
# Blocks are as large as pays for a request, and all kept ones together half a gigabyte.
_BLOCK, _BLOCKS = 2**21, 256
# A map of a file takes a file handle, of which processes have about a thousand.
_MAPS = 256
_SMALL = (".yaml", ".jsonl")  # what the stand-in has


def stored_frames(path: Path, shape: tuple[int, ...], offset: int, count: int) -> Frames:
    """Frames ``offset`` to ``offset + count - 1`` of a shard's file, read-only.

    Raises:
        RecordingError: when the file is missing or too short.
    """
    size = math.prod(shape)
    if _remote(path) is not None:
        check_size(path, (offset + count) * size, remote_size(path))

        def read(first: int, stop: int) -> np.ndarray:
            data = _read(path, (offset + first) * size, (stop - first) * size)
            return np.frombuffer(data, np.uint8).reshape(-1, *shape)

        return LazyFrames((count, *shape), read)
    check_size(path, (offset + count) * size)
    whole = _mapped(path, path.stat().st_mtime_ns, path.stat().st_size // size, shape)
    return whole[offset : offset + count]


@lru_cache(_MAPS)
def _mapped(path: Path, changed: int, count: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", shape=(count, *shape))


def stored_values(
    path: Path, dtype: str, shape: tuple[int, ...], offset: int, count: int
) -> np.ndarray:
    """A copy of entries ``offset`` to ``offset + count - 1`` of a file of arrays.

    Raises:
        RecordingError: when the file is missing or too short.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if _remote(path) is not None:
        check_size(path, (offset + count) * size, remote_size(path))
        values = np.frombuffer(_read(path, offset * size, count * size), dtype).copy()
    else:
        check_size(path, (offset + count) * size)
        values = np.fromfile(path, dtype, count * math.prod(shape), offset=offset * size)
    return values.reshape(count, *shape)


# ------------------------------------------------------------------------------- object stores


def folders_of(recordings: str | os.PathLike[str]) -> list[Path]:
    """The data-set folders that ``recordings`` names.

    Args:
        recordings: one or several, separated by commas: folders, or addresses that fsspec knows,
            such as "s3://bucket/recordings".

    Raises:
        RecordingError: when there are none, or an object store cannot be read.
    """
    text = os.fspath(recordings)
    one = isinstance(recordings, Path) or Path(text).expanduser().is_dir()
    names = [text] if one else [name.strip() for name in text.split(",")]
    found = [stand_in(n) if "://" in n else Path(n).expanduser() for n in names if n]
    if not found or len(set(found)) < len(found):
        raise RecordingError(f"recordings must name folders, each once, got {str(recordings)!r}")
    return found


@cache  # once a process: what is trained on does not change under it
def stand_in(url: str) -> Path:
    """A folder with the small files of the data set at ``url``, brought up to date.

    Raises:
        RecordingError: when it cannot be reached, or a library for it is missing.
        FolderError: when the cache cannot be written to.
    """
    system, root = _system(url)
    try:
        listed = system.find(root, detail=True)
    except Exception as error:  # of many libraries
        raise RecordingError(f"{url} cannot be read: {' '.join(str(error).split())}") from None
    files = {
        name[len(root) :].strip("/"): {"size": int(told["size"]), "state": _state(told)}
        for name, told in listed.items()
    }
    if "dataset.yaml" not in files:
        raise RecordingError(f"{url} is not a data set: it has no dataset.yaml")
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nfd_env"
    folder = make_folder(cached / "recordings" / hashlib.sha256(url.encode()).hexdigest()[:16])
    known = _told(folder)["files"] if found_file(folder / _REMOTE, RecordingError) else {}
    if known == files:
        return folder
    small = [name for name in files if name.endswith(_SMALL) and ".." not in name]
    with owned_folder(folder):
        try:
            for old in known.keys() - files.keys():
                if "/" in old:
                    shutil.rmtree(folder / old.split("/")[0], ignore_errors=True)
            for name in small:
                if known.get(name) != files[name] or not (folder / name).is_file():
                    make_folder((folder / name).parent)
                    with atomic_write(folder / name) as temporary:
                        temporary.write_bytes(system.cat_file(f"{root}/{name}"))
            with atomic_write(folder / _REMOTE) as temporary:
                temporary.write_text(json.dumps({"url": url, "files": files}), encoding="utf-8")
        except OSError as error:
            raise FolderError(f"{folder} cannot be filled from {url}: {error}") from None
    _told.cache_clear()
    return folder


def _state(told: dict[str, Any]) -> str:
    """What changes with a file, as stores call it."""
    keys = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified")
    return next((str(told[key]) for key in keys if told.get(key)), "")


@cache
def _system(url: str) -> tuple[Any, str]:
    """The file system of ``url``, and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise RecordingError(f"{url} needs fsspec: pip install 'nfd-env[remote]'") from None
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RecordingError(f"{url} cannot be read: {error}") from None
    return system, root.rstrip("/")


@cache
def _told(folder: Path) -> dict[str, Any]:
    """What ``remote.json`` of a stand-in says."""
    return json.loads((folder / _REMOTE).read_text(encoding="utf-8"))


@cache
def _is_stand_in(folder: Path) -> bool:
    return (folder / _REMOTE).is_file()


def _remote(path: Path) -> tuple[str, str] | None:
    """Data set and name in it of a shard's file that lies in an object store."""
    folder = path.parent.parent
    if not _is_stand_in(folder):
        return None
    return _told(folder)["url"], f"{path.parent.name}/{path.name}"


def remote_size(path: Path) -> int | None:
    """Bytes of a shard's file in an object store; None where it has none, or lies here."""
    where = _remote(path)
    told = _told(path.parent.parent)["files"].get(where[1]) if where else None
    return told["size"] if told else None


def _read(path: Path, offset: int, size: int) -> bytes:
    where = _remote(path)
    assert where is not None
    first, last = offset // _BLOCK, (offset + size - 1) // _BLOCK
    total = remote_size(path) or 0
    data = b"".join(_block(*where, number, total) for number in range(first, last + 1))
    return data[offset - first * _BLOCK :][:size]


@lru_cache(_BLOCKS)
def _block(url: str, name: str, number: int, total: int) -> bytes:
    system, root = _system(url)
    begin, end = number * _BLOCK, min(total, (number + 1) * _BLOCK)
    try:
        data = system.cat_file(f"{root}/{name}", begin, end)
    except Exception as error:  # of many libraries
        raise RecordingError(
            f"{url}/{name} cannot be read: {' '.join(str(error).split())}"
        ) from None
    if len(data) != end - begin:
        raise RecordingError(f"{url}/{name} has changed while it was read: run again")
    return data
