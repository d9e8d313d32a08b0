"""Whole files, and folders with one owner."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pytest
import torch

from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation.tables import check_markers
from nfd_env.files import (
    FolderError,
    FolderInUseError,
    Ownership,
    atomic_write,
    check_writable,
    make_folder,
    owned_folder,
    save_text,
    writing,
)
from nfd_env.inference.state import Context
from nfd_env.models.weights import save_tensors
from nfd_env.players.load import read_agent_spec
from nfd_env.recipe.game import load_game
from nfd_env.recipe.records import read_records
from nfd_env.training.checkpoints import Checkpoints, write_state
from nfd_env.video import write_png
from nfd_env.worlds.clip import Clip, load_clip, save_clip
from nfd_env.worlds.load import load_world
from nfd_env.worlds.starts import load_starts, save_starts

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


def test_a_folder_of_work_that_was_refused_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), owned_folder(tmp_path / "runs" / "game"):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), owned_folder(tmp_path / "mine"):
        raise KeyboardInterrupt
    assert (tmp_path / "mine").is_dir()  # it was there before
    with pytest.raises(ValueError, match="late"), owned_folder(tmp_path / "runs" / "game") as made:
        (made / "begun").touch()
        raise ValueError("late")
    assert (tmp_path / "runs" / "game" / "begun").exists()


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
@pytest.mark.parametrize("kind", ["weights", "starts", "state", "text", "picture"])
def test_a_disk_that_is_really_full(tmp_path: Path, kind: str) -> None:
    """Each library has its own way of saying so."""
    import resource

    path, numbers = tmp_path / f"a.{kind}", torch.randn(9999)
    start = Context(numbers[None, None, None], numbers[None])
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    write = {
        "weights": lambda: save_tensors(path, {"a": numbers}),
        "starts": lambda: save_starts(path, [start]),
        "state": lambda: write_state(path, {"a": numbers}),
        "text": lambda: save_text(path, "a" * 9999),
        "picture": lambda: write_png(path, noise),
    }[kind]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(FolderError, match="cannot be written to .*make room"):
            with writing(tmp_path):
                write()
        if kind in ("weights", "starts"):  # of which the file is named
            with pytest.raises(OSError, match=f"File too large: '{re.escape(str(path))}'"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    write()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


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
    # Others may read it as they may read any new file, also where its writer is more secretive.
    (tmp_path / "b.txt").touch()
    with atomic_write(path) as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert path.stat().st_mode == (tmp_path / "b.txt").stat().st_mode


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


@contextmanager
def put(path: Path, kind: str) -> Iterator[str]:
    """Something that is no file at ``path``, and what it is called."""
    if path.exists():
        path.unlink()
    names = {"link": "a link to nothing", "folder": "a folder", "pipe": "a pipe"}
    with ExitStack() as stack:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(os.path.relpath(path))
        yield names.get(kind, f"a {kind}")


KINDS = ["pipe", "folder", "link", "device", "socket"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_a_files_place_is_told(
    kind: str, make_world: Any, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, never a wait, and never taken for a file that is not there."""
    monkeypatch.chdir(tmp_path)
    world = shutil.copytree(make_world(distilled=True), tmp_path / "world")
    save_clip(world, Clip(np.zeros((3, 32, 48, 3), np.uint8), np.zeros(2, np.int64)), 30)
    data = shutil.copytree(recordings, tmp_path / "data")
    agent, state, run = tmp_path / "agent.zip", tmp_path / "state.pt", tmp_path / "run"
    run.mkdir()
    shard = next(data.glob("shard-*"))
    checks: list[tuple[Path, Callable[[], Any]]] = [
        *(
            (world / name, lambda: load_world(world, "cpu", "fp32"))
            for name in ("checksums.json", "world.yaml", "heads.safetensors", "starts.safetensors")
        ),
        (world / "teacher.safetensors", lambda: load_world(world, "cpu", "fp32", "teacher")),
        (world / "clip.mp4", lambda: load_clip(world)),
        (world / "clip.safetensors", lambda: load_clip(world)),
        (world / "starts.safetensors", lambda: load_starts(world / "starts.safetensors", (), 1)),
        (data / "dataset.yaml", lambda: RecordedDataset(data)),
        (shard / "episodes.jsonl", lambda: RecordedDataset(data)),
        (shard / "frames.bin", lambda: np.array(RecordedDataset(data).episodes[0].frames)),
        (run / "run.yaml", lambda: read_records(run)),
        (tmp_path / "game.yaml", lambda: load_game(tmp_path / "game.yaml")),
        (agent, lambda: read_agent_spec(agent, None, True)),
        (state, lambda: Checkpoints(tmp_path).read(torch.device("cpu"))),
        (tmp_path / "README.md", lambda: check_markers(tmp_path / "README.md", "bench")),
    ]
    for path, read in checks:
        before = path.read_bytes() if path.exists() else None
        with put(path, kind) as what:
            with pytest.raises(ValueError) as caught:
                read()
            assert f"{path}: is {what}" in str(caught.value)
        path.rmdir() if kind == "folder" else path.unlink()
        if before is not None:
            path.write_bytes(before)


@pytest.mark.parametrize(
    "place, reason",
    [
        ("file/x/out.png", "Not a directory"),
        ("folder", "is a folder"),
        ("/proc/x/out.png", "No such file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, place: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "new/folder/out.png", tmp_path / "file", None)
    with pytest.raises(FolderError, match=f"{place} cannot be written: .*{reason}"):
        check_writable(tmp_path / "fine.png", tmp_path / place)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}
