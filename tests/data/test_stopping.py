"""Collecting that is stopped, in whatever way, and begun again leaves whole data."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env import config
from nfd_env.data.collect import CollectConfig, PolicyConfig, collect
from nfd_env.data.policies import RandomHeld
from nfd_env.data.shards import RecordedDataset, RecordingError, ShardWriter
from nfd_env.data.summary import CONTACT_SHEET, contact_sheet, summary
from nfd_env.files import FolderError, FolderInUseError, Ownership
from nfd_env.sources.source import SourceConfig, SourceError
from tests.counter_env import dataset_spec, move, read, source

RUN = """
import sys
from nfd_env.data.collect import CollectConfig, PolicyConfig, collect
from tests.counter_env import source

if __name__ == "__main__":
    held = [PolicyConfig("random_held", kwargs={"low": 1, "high": 3})]
    made = CollectConfig(source(kwargs={"length": 12}), sys.argv[1], int(sys.argv[2]), held)
    collect(made, progress=False)
"""
FOREVER = 10**6
MORE = 300
# KeyboardInterrupt, not caught, ends Python by the signal itself.
STATUS = {"TERM": 128 + 15, "INT": -2, "KILL": -9}
PATIENCE = 600  # seconds; a machine may be busy


def start(
    folder: Path, frames: int, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    folder.parent.mkdir(exist_ok=True)
    script = folder.parent / f"{folder.name}.py"
    script.write_text(RUN)

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
        if before is not None:
            before()

    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(frames)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,
    )


def ignoring_int() -> None:  # as shells have it for what runs in the background
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def recording(folder: Path) -> bool:
    """Whether both workers have committed something."""
    if not (folder / "dataset.yaml").exists():
        return False
    return len({e.shard for e in RecordedDataset(folder)}) == 2


def assert_whole(folder: Path) -> RecordedDataset:
    data = RecordedDataset(folder)
    for episode in data:
        counter, steps = read(np.asarray(episode.frames))
        assert steps.tolist() == list(range(13))
        assert np.array_equal(np.diff(counter), move(episode.actions))
        assert np.array_equal(episode.rewards, move(episode.actions))
    assert len({e.seed for e in data}) == len(data)
    assert len({np.asarray(e.frames).tobytes() for e in data}) == len(data)
    return data


def owned(folder: Path) -> bool:
    """Whether somebody still writes."""
    try:
        for name in ("", "w00", "w01"):
            Ownership(folder, name).release()
    except FolderInUseError:
        return True
    return False


@pytest.mark.parametrize("name", STATUS)
def test_the_same_command_goes_on_from_whole_data(tmp_path: Path, name: str) -> None:
    folder, number = tmp_path / "d", getattr(signal, f"SIG{name}")
    process = start(folder, FOREVER, ignoring_int)
    try:
        wait_for(lambda: recording(folder))
        if name == "TERM":  # two collectors at once: the second is refused
            held = [PolicyConfig("random_held", kwargs={"low": 1, "high": 3})]
            made = CollectConfig(source(kwargs={"length": 12}), str(folder), FOREVER, held)
            with pytest.raises(FolderInUseError, match=f"process {process.pid} "):
                collect(made, progress=False)
        process.send_signal(number)  # to the parent alone
        process.communicate(timeout=PATIENCE)
        assert process.returncode == STATUS[name]
        wait_for(lambda: not owned(folder))  # its workers have ended too
    finally:
        process.kill()
        process.communicate()
    enough = assert_whole(folder).frame_count + MORE
    process = start(folder, FOREVER)
    try:
        wait_for(lambda: RecordedDataset(folder).frame_count >= enough)
        os.killpg(process.pid, number)  # all of them: a terminal's Ctrl-C, a cluster
        process.communicate(timeout=PATIENCE)
        assert process.returncode == STATUS[name]
    finally:
        process.kill()
        process.communicate()
    data = assert_whole(folder)
    assert data.frame_count >= enough
    assert name == "KILL" or not data.skipped()  # no episode is blamed


def test_a_worker_that_is_told_to_stop_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    process = start(folder, FOREVER)
    try:
        wait_for(lambda: recording(folder))
        worker = json.loads((folder / ".owner-w00.json").read_text())["pid"]
        os.kill(worker, signal.SIGTERM)
        errors = process.communicate(timeout=PATIENCE)[1].strip().splitlines()
        assert process.returncode == 1
        assert "recording worker w00 was stopped by a signal; run again" in errors[-1]
    finally:
        process.kill()
        process.communicate()
    assert not assert_whole(folder).skipped()


def test_an_episode_that_takes_all_memory_is_left_out_in_the_end(tmp_path: Path) -> None:
    made = settings(tmp_path, "be killed", every=3)
    for _ in range(2):
        with pytest.raises(RecordingError, match="killed by SIGKILL .*memory.*run again"):
            collect(made, progress=False)
        assert not RecordedDataset(tmp_path).skipped()
    with pytest.raises(RecordingError, match="killed by SIGKILL .* left out"):
        collect(made, progress=False)
    (skipped,) = RecordedDataset(tmp_path).skipped()
    assert skipped["seed"] % 3 == 0


def test_saved_play_is_not_taken_for_other_workers(tmp_path: Path) -> None:
    spec = dataset_spec(config.to_dict(source(kwargs={"length": 12})))
    spec.save(tmp_path)
    ShardWriter(tmp_path, spec, "play").close()
    held = [PolicyConfig("random_held")]
    with pytest.raises(RecordingError, match=r"did not make \(play\): record into another folder"):
        collect(CollectConfig(source(kwargs={"length": 12}), str(tmp_path), 50, held), False)


class CountsThreads(RandomHeld):
    """Plays only with one thread."""

    def act(self, observation: np.ndarray) -> Any:
        assert torch.get_num_threads() == 1
        return super().act(observation)


def test_policies_share_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    policy = [PolicyConfig(f"{__name__}:CountsThreads")]
    workers = max(2, os.cpu_count() or 1)
    made = CollectConfig(source(kwargs={"length": 4}), str(tmp_path), workers, policy, workers)
    assert not collect(made, progress=False).skipped()


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_ends_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def importing(*args: Any) -> None:
        signal.raise_signal(getattr(signal, f"SIG{name}"))

    monkeypatch.setattr("nfd_env.data.collect.import_recordings", importing)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt if name == "INT" else SystemExit):
            videos = SourceConfig("videos:somewhere")
            collect(CollectConfig(videos, str(tmp_path), 5, [PolicyConfig("random_held")]), False)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    full = start(folder, 400, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2))
    errors = full.communicate(timeout=PATIENCE)[1].strip().splitlines()
    assert full.returncode == 1
    assert "cannot be written to" in errors[-1] and "what was stored before is whole" in errors[-1]
    assert len(assert_whole(folder)) >= 2
    again = start(folder, 400)
    assert again.communicate(timeout=PATIENCE) and again.returncode == 0
    assert assert_whole(folder).frame_count >= 400


def settings(folder: Path, whim: str, every: int = 1, **kwargs: Any) -> CollectConfig:
    tricky = SourceConfig(
        "tests/Tricky-v0", imports=["tests.data.tricky_env"], kwargs={"whim": whim, "every": every}
    )
    values: dict[str, Any] = {"frames": 150, "workers": 1, "validation_every": 2, **kwargs}
    return CollectConfig(tricky, str(folder), policies=[PolicyConfig("random_held")], **values)


@pytest.mark.parametrize(
    ("whim", "reason"),
    [("raise", "the game's own bug"), ("exit", "exit"), ("nan", "reward must be .*got nan")],
)
def test_episodes_that_fail_are_left_out_and_told(tmp_path: Path, whim: str, reason: str) -> None:
    data = collect(settings(tmp_path, whim, every=3), progress=False)
    assert data.frame_count >= 150
    skipped = data.skipped()
    assert skipped and all(s["seed"] % 3 == 0 for s in skipped)
    assert not {s["seed"] for s in skipped} & {e.seed for e in data}
    numbers = [e.number for e in data] + [s["number"] for s in skipped]
    assert sorted(numbers) == list(range(len(numbers)))
    told = summary(data)
    assert f"skipped: {len(skipped)} episodes" in told and "0:random_held: 17 episodes" in told
    if whim != "raise":  # what comes then is the same for all of them
        return
    # No seed is tried twice.
    more = collect(settings(tmp_path, whim, every=3, frames=300), progress=False)
    seeds = [e.seed for e in more] + [s["seed"] for s in more.skipped()]
    assert len(seeds) == len(set(seeds))


def test_a_game_that_always_fails_stops_the_recording(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="5 of 5 episodes failed.*own bug") as error:
        collect(settings(tmp_path, "raise"), progress=False)
    assert "\n" not in str(error.value)
    assert len(RecordedDataset(tmp_path).skipped()) == 5


def test_a_game_that_ends_the_process_does_not_count_as_finished(tmp_path: Path) -> None:
    for number in range(2):
        with pytest.raises(RecordingError, match="w00 ended by itself with status 0.*run again"):
            collect(settings(tmp_path, "leave"), progress=False)
        assert [s["number"] for s in RecordedDataset(tmp_path).skipped()] == list(range(number + 1))


def test_a_crash_is_told_at_once_and_not_tried_again(tmp_path: Path) -> None:
    # The other worker would go on for hours.
    made = settings(tmp_path, "abort", every=2, frames=FOREVER, workers=2)
    with pytest.raises(RecordingError, match="killed by SIGABRT in its .* left out"):
        collect(made, progress=False)
    assert len(RecordedDataset(tmp_path).skipped()) >= 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"source": source(kwargs={"lenght": 12})}, SourceError, "lenght"),
        ({"source": source(crop=[0, 99, 0, 9])}, (SourceError, ValueError), "crop"),
        ({"policies": [PolicyConfig("random_held", kwargs={"lo": 1})]}, ValueError, "lo"),
        ({"policies": [PolicyConfig("no.such:Policy")]}, ValueError, "no.such"),
        ({"frames": 10**13}, FolderError, "GB left: record fewer"),
    ],
    ids=range(5),
)
def test_what_cannot_be_recorded_is_said_at_the_door(
    tmp_path: Path, changes: dict[str, Any], kind: Any, message: str
) -> None:
    folder = tmp_path / "d"
    values: dict[str, Any] = {"frames": 100, "policies": [PolicyConfig("random_held")], **changes}
    with pytest.raises(kind, match=message) as error:
        collect(CollectConfig(**{"source": source(), "folder": str(folder), **values}))
    assert "\n" not in str(error.value)
    assert not folder.exists() or not len(RecordedDataset(folder))


def test_a_game_whose_every_episode_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="tests/Tricky-v0 fails .*no such level"):
        collect(settings(tmp_path / "d", "raise at reset"), progress=False)
    assert not (tmp_path / "d").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file/d cannot be made: Not a directory"):
        collect(settings(tmp_path / "file" / "d", "none"), progress=False)


def test_what_a_data_set_holds(tmp_path: Path) -> None:
    data = collect(settings(tmp_path, "none"), progress=False)
    told = summary(data)
    assert "(9 train, 8 validation)" in told or "(8 train, 9 validation)" in told
    assert "17 terminated, 0 truncated" in told and "length 8 on average" in told
    shares = [int(part.split()[1].rstrip("%")) for part in told.split("actions: ")[1].split(", ")]
    assert len(shares) == 3 and 98 <= sum(shares) <= 102
    assert "warning" not in told
    picture = contact_sheet(data)
    assert picture.dtype == np.uint8 and picture.shape == (6 * 96, 8 * 144, 3)
    assert (tmp_path / CONTACT_SHEET).read_bytes()[:4] == b"\x89PNG"
    assert "warning: no episode for train" in summary(
        collect(settings(tmp_path / "one", "none", frames=5), progress=False)
    )
