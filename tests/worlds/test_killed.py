"""Whatever moment a writer is killed at, one whole world is there, and the next save goes on."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nfd_env.files import FolderInUseError
from nfd_env.models.weights import CheckpointError
from nfd_env.worlds import format as saving
from nfd_env.worlds.checksums import verify, write_checksums
from nfd_env.worlds.format import owned_world
from nfd_env.worlds.load import UnknownWorldError, find_world, load_world
from tests.tiny_world import make_tiny_world

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")

PATCHED = [
    *[(saving, name) for name in ("save_weights", "save_starts", "write_checksums", "read_spec")],
    (os, "replace"),
    (os, "mkdir"),
    (shutil, "rmtree"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def version_of(folder: Path, versions: list[dict[str, bytes]]) -> int:
    """Which of the versions is there, after a look at every file's checksum."""
    verify(folder, *contents(folder).keys() - {"checksums.json"})
    starts = (folder / "starts.safetensors").read_bytes()
    return [v["starts.safetensors"] for v in versions].index(starts)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """What the world's folder holds before and after."""
    folder = tmp_path_factory.mktemp("versions")
    return [contents(make_tiny_world(folder / str(seed), seed=seed)) for seed in (1, 2)]


def write(folder: Path, version: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in version.items():
        (folder / name).write_bytes(data)


def save_and_die(folder: Path, call: int, after: bool) -> bool:
    """Save in a fork that kills itself at the ``call``-th touch of the disk; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def fatal(function: Callable) -> Callable:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                mine = count == call
                if mine and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return function(*args, **kwargs)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        for module, name in PATCHED:
            setattr(module, name, fatal(getattr(module, name)))
        gc.disable()  # what threads of the parent have left could wait for them, who are not here
        try:
            make_tiny_world(folder, seed=2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_touch_of_the_disk(
    tmp_path: Path, versions: list[dict[str, bytes]], after: bool
) -> None:
    seen, call = set(), 0
    for call in range(1, 100):
        folder = tmp_path / str(call) / "world"
        folder.parent.mkdir()
        write(folder, versions[0])
        if not save_and_die(folder, call, after):
            break
        interesting = call % 8 == 0 or (folder.parent / ".world.replaced").exists()
        if not folder.exists():
            seen.add("between the renames")
        # Found by a reader ...
        assert find_world(folder) == folder
        seen.add(version_of(folder, versions))
        # ... and the next writer is not in trouble.
        if interesting:
            load_world(folder, "cpu", "fp32")
            make_tiny_world(folder, seed=2)
            assert version_of(folder, versions) == 1
            assert not list(folder.parent.glob(".world*"))
    assert call > 20 and seen == {0, 1, "between the renames"}


def test_the_next_save_fails_after_one_was_killed(
    tmp_path: Path, versions: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the next save deleted what the killed one had put aside, and then had nothing."""
    folder = tmp_path / "world"
    write(tmp_path / ".world.replaced", versions[0])

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_weights", full)
    with pytest.raises(OSError, match="No space"):
        make_tiny_world(folder, seed=2)
    assert contents(folder) == versions[0]
    assert not list(tmp_path.glob(".world.*"))


PATIENCE = 300  # seconds; a machine may be busy
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Starts a process that writes ``tmp_path / "world"`` again and again; its number."""
    started = []

    def start() -> int:
        parent = os.getpid()
        # Whoever started the tests may ignore some of them, as a shell does for "command &".
        before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
        child = os.fork()
        if child == 0:
            try:
                for seed in itertools.cycle((2, 1)):
                    if os.getppid() != parent:
                        break
                    make_tiny_world(tmp_path / "world", seed=seed)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        started.append(child)
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_by_a_signal_at_any_moment(
    tmp_path: Path, versions: list[dict[str, bytes]], saver: Callable[[], int], stop: signal.Signals
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    for delay in np.random.default_rng(stop).uniform(0, 0.3, 5):
        process = saver()
        time.sleep(delay)
        os.kill(process, stop)
        os.waitpid(process, 0)
        load_world(folder, "cpu", "fp32")
        version_of(folder, versions)


def test_a_reader_beside_a_writer_sees_whole_worlds(
    tmp_path: Path, versions: list[dict[str, bytes]], saver: Callable[[], int]
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    writer = saver()
    weights = set()
    end = time.monotonic() + PATIENCE
    while len(weights) < 2 and time.monotonic() < end:
        assert os.waitpid(writer, os.WNOHANG)[0] == 0, "the writer died"
        for _ in range(4):
            world = load_world(folder, "cpu", "fp32")
            weights.add(float(world.model.dynamics.embed.weight[0, 0]))
    assert len(weights) == 2


def test_two_writers(tmp_path: Path, versions: list[dict[str, bytes]]) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    with (
        owned_world(folder),
        pytest.raises(FolderInUseError, match=f"being written by process {os.getpid()}"),
    ):
        make_tiny_world(folder, seed=2)
    assert contents(folder) == versions[0]
    make_tiny_world(folder, seed=2)


def test_a_reader_that_puts_a_world_back_does_not_stop_the_next_writer(
    tmp_path: Path, versions: list[dict[str, bytes]]
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    taken = threading.Event()

    def put_back() -> None:
        with owned_world(folder):
            taken.set()
            time.sleep(0.1)

    reader = threading.Thread(target=put_back)
    reader.start()
    assert taken.wait(PATIENCE)
    make_tiny_world(folder, seed=2)
    reader.join(PATIENCE)
    assert version_of(folder, versions) == 1


def test_readers_do_not_disturb_a_writer_between_its_renames(
    tmp_path: Path, versions: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    replace, found = os.replace, []
    reader = threading.Thread(target=lambda: found.append(find_world(folder)))

    def slow(source: Path, target: Path) -> None:
        if Path(target) == folder:
            reader.start()
            time.sleep(0.3)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    make_tiny_world(folder, seed=2)
    reader.join(PATIENCE)
    assert found == [folder] and version_of(folder, versions) == 1


def test_a_world_that_cannot_be_put_back_is_named(
    tmp_path: Path, versions: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / ".world.replaced", versions[0])

    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(UnknownWorldError, match=r"\.world\.replaced and cannot be put back"):
        load_world(tmp_path / "world")


def test_a_world_of_before_is_replaced_too(
    tmp_path: Path, versions: list[dict[str, bytes]]
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    (folder / "checksums.json").unlink()
    make_tiny_world(folder, seed=2)
    assert version_of(folder, versions) == 1


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "world").write_text("notes")
    with pytest.raises(CheckpointError, match="is in the way: it is a file"):
        make_tiny_world(tmp_path / "world")
    assert (tmp_path / "world").read_text() == "notes"


def test_checksums_follow_what_was_edited_on_purpose(
    tmp_path: Path, versions: list[dict[str, bytes]]
) -> None:
    folder = tmp_path / "world"
    write(folder, versions[0])
    path = folder / "world.yaml"
    path.write_text(path.read_text().replace("fps: 35.0", "fps: 30.0"))
    with pytest.raises(CheckpointError, match=r"world.yaml: damaged.*write_checksums"):
        load_world(folder)
    write_checksums(folder)
    assert load_world(folder).spec.fps == 30
