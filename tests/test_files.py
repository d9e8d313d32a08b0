"""Whole files, and folders with one owner."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from nfd_env.files import (
    FolderError,
    FolderInUseError,
    Ownership,
    atomic_write,
    make_folder,
    owned_folder,
)

HOLD = """
import sys, time
from pathlib import Path
from nfd_env.files import Ownership, owned_folder
with owned_folder(sys.argv[1]) as folder:
    shard = Ownership(folder, "w00")
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns ``tmp_path``, and "w00" in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_by_whom(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    for _ in range(2):
        with pytest.raises(FolderInUseError, match=f"written by process {owner.pid} on .*-c"):
            with owned_folder(tmp_path):
                raise AssertionError
    with pytest.raises(FolderInUseError, match=rf"\(w00\) is being written by process {owner.pid}"):
        Ownership(tmp_path, "w00")
    Ownership(tmp_path, "w01").release()
    owner.communicate("end")  # in good order
    with owned_folder(tmp_path):
        assert json.loads((tmp_path / ".owner.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".owner.json").exists()


def test_a_killed_owner_leaves_nothing_that_counts(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    threading.Timer(0.3, owner.send_signal, [signal.SIGKILL]).start()
    ownership = Ownership(tmp_path, "w00", wait=20)  # it ends in the meantime
    with owned_folder(tmp_path):
        pass
    ownership.release()
    ownership.release()  # a second time does no harm


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_a_killed_owner_left_behind_is_named(tmp_path: Path) -> None:
    """What foreign code forks behind Python's back has the locks, too, and may live longer."""
    forking = HOLD.replace(
        "print(",
        "import ctypes; heir = ctypes.CDLL(None).fork(); heir or time.sleep(99); print(heir, ",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", forking, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    heir = int(process.stdout.readline().split()[0])
    try:
        with pytest.raises(FolderInUseError, match=f"is being written by process {process.pid} "):
            Ownership(tmp_path)
        process.kill()
        process.wait()
        told = (
            f"process {heir}, which process {process.pid} .* left behind when .*; stop {heir}, and"
        )
        with pytest.raises(FolderInUseError, match=told):
            Ownership(tmp_path)
    finally:
        os.kill(heir, signal.SIGKILL)
        process.communicate()
    Ownership(tmp_path, wait=20).release()


def test_another_part_of_this_process_is_refused_too(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "):
            Ownership(tmp_path)
        outcomes.append(True)

    outcomes: list[bool] = []
    with owned_folder(tmp_path):
        refused()
        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
    assert outcomes == [True, True]
    with owned_folder(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "host": 1}'])
def test_whatever_stands_in_the_owners_file(tmp_path: Path, text: str) -> None:
    with owned_folder(tmp_path):
        (tmp_path / ".owner.json").write_text(text)
        with pytest.raises(FolderInUseError, match="written by another process; wait"):
            Ownership(tmp_path)


def test_an_error_within_the_block_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned_folder(tmp_path):
        raise ZeroDivisionError
    with owned_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (file, file / "below"):
        with pytest.raises(FolderError, match="file.* cannot be made: "), owned_folder(wrong):
            raise AssertionError

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FolderError, match="cannot be locked for writing: Read-only file system"):
        Ownership(tmp_path)


def test_a_full_disk_is_one_error_and_gives_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FolderError, match="cannot be written to .No space left on device"):
            Ownership(tmp_path)
    Ownership(tmp_path).release()


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_folder("~/a/b") == tmp_path / "a/b"
    with owned_folder("~/a") as folder:
        assert folder == tmp_path / "a"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise ZeroDivisionError
    assert path.read_text() == "one"
    # Two at once.
    with atomic_write(path) as left, atomic_write(path) as right:
        left.write_text("left")
        right.write_text("right")
    assert path.read_text() == "left"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# ------------------------------------------------------------------------------------- encodings

ROOT = Path(__file__).parents[1]


def text_without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in whatever encoding the user's locale has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {k.arg for k in node.keywords}:
            continue
        name = getattr(node.func, "attr", "") or getattr(node.func, "id", "")
        modes = [a for a in [*node.args, *(k.value for k in node.keywords)] if is_mode(a)]
        if name in ("read_text", "write_text") or (
            # The built-in function, and the method of paths; others open no text.
            name == "open"
            and not any("b" in str(mode.value) for mode in modes)
            and (isinstance(node.func, ast.Name) or not node.args or modes)
            and ast.unparse(node.func) not in ("av.open", "Image.open")
        ):
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def is_mode(node: ast.expr) -> TypeGuard[ast.Constant]:
    return (
        isinstance(node, ast.Constant) and re.fullmatch("[rwax+tb]+", str(node.value)) is not None
    )


def test_text_is_read_and_written_in_utf8() -> None:
    for folder in ("nfd_env", "agents", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not list(text_without_encoding(path))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(path)", True),
        ("open(path, 'a')", True),
        ("path.open('w')", True),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path, mode='rb')", False),
        ("av.open(path, 'w')", False),
        ("rooms.open(name)", False),
    ],
)
def test_text_without_encoding_is_found(tmp_path: Path, line: str, found: bool) -> None:
    (tmp_path / "m.py").write_text(line, encoding="utf-8")
    assert bool(list(text_without_encoding(tmp_path / "m.py"))) == found
