"""Recordings on several disks and in an object store, and very many of them."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.data import reading
from nfd_env.data.layout import DatasetSpec
from nfd_env.data.reading import LazyFrames, stand_in
from nfd_env.data.shards import RecordedDataset, RecordingError
from tests.data.test_shards import SPEC, assert_same, make_episode, write

fsspec = pytest.importorskip("fsspec")


def made(folder: Path, seeds: range, **kwargs: Any) -> Path:
    splits = ["train", "validation"]
    write(folder, [make_episode(5 + s, s, split=splits[s % 2]) for s in seeds], **kwargs).close()
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for known in (stand_in, reading._told, reading._is_stand_in, reading._system, reading._block):
        known.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path, cache: Path) -> str:
    """The address of a data set of two shards in an object store."""
    system = fsspec.filesystem("memory")
    folder = made(tmp_path / "there", range(4), frames_per_shard=10)
    system.put(str(folder), "/bucket/game", recursive=True)
    shutil.rmtree(folder)
    yield "memory://bucket/game"
    system.rm("/bucket", recursive=True)


def test_several_folders_are_one_data_set(tmp_path: Path) -> None:
    one, two = made(tmp_path / "a, b", range(2)), made(tmp_path / "c", range(2, 5))
    assert len(RecordedDataset(str(one))) == 2  # a comma in a folder's own name
    moved = one.rename(tmp_path / "a")
    both = RecordedDataset(f"{moved}, {two}")
    both.check(4)
    assert [e.seed for e in both] == [0, 1, 2, 3, 4]
    assert both.folder == moved and len({e.key for e in both}) == 5
    # Shards of the same name lie in both; latents are kept by these names.
    assert list(both.shard_frames()) == ["shard-w00-00000", "1-shard-w00-00000"]
    for episode in both:
        expected = make_episode(5 + episode.seed, episode.seed, split=episode.split)
        assert_same(episode.load(), expected)


def test_folders_of_different_games_are_refused(tmp_path: Path) -> None:
    one, two = made(tmp_path / "a", range(2)), tmp_path / "b"
    DatasetSpec(**{**vars(SPEC), "frame_shape": (8, 6, 3)}).save(two)
    with pytest.raises(RecordingError, match="another frame_shape; only recordings of the same"):
        RecordedDataset(f"{one},{two}")
    with pytest.raises(RecordingError, match="each once"):
        RecordedDataset(f"{one},{one}")


def test_an_object_store_is_read_in_blocks(
    store: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 100)  # a frame has 72 bytes
    asked: list[tuple[str, int, int]] = []
    system = type(fsspec.filesystem("memory"))
    cat = system.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        asked.append((path, start, end))
        return cat(self, path, start, end, **kwargs)

    monkeypatch.setattr(system, "cat_file", counted)
    data = RecordedDataset(store)
    assert {Path(path).suffix for path, *_ in asked} <= {".yaml", ".jsonl"}
    data.check(4)
    asked.clear()
    frames = data.episodes[1].frames
    assert isinstance(frames, LazyFrames) and not asked
    expected = make_episode(6, 1, split="validation")
    np.testing.assert_array_equal(frames[3], expected.frames[3])
    assert len(asked) <= 2 and all(end - start <= 100 for _, start, end in asked)
    for episode in data:
        wanted = make_episode(5 + episode.seed, episode.seed, split=episode.split)
        assert_same(episode.load(), wanted)
    stored = [p.name for p in cache.rglob("*") if p.is_file()]
    assert not [name for name in stored if name.endswith(".bin")]  # nothing large is copied
    assert reading._block.cache_info().maxsize * 2**21 <= 2**30


def test_more_is_recorded_into_a_store(store: str, cache: Path, tmp_path: Path) -> None:
    assert len(RecordedDataset(store)) == 4
    more = made(tmp_path / "more", range(4, 6))
    (more / "shard-w00-00000").rename(more / "shard-w01-00000")
    fsspec.filesystem("memory").put(
        str(more / "shard-w01-00000"), "/bucket/game/shard-w01-00000", recursive=True
    )
    stand_in.cache_clear()  # another process
    assert [e.seed for e in RecordedDataset(store)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/nothing", "is not a data set|cannot be read"),
        ("nowhere://bucket/game", "cannot be read: Protocol not known"),
    ],
)
def test_a_wrong_address_is_one_clear_error(cache: Path, address: str, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        RecordedDataset(address)


def test_a_store_without_its_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(RecordingError, match=r"pip install 'nfd-env\[remote\]'"):
        RecordedDataset("s3://bucket/game")


def test_lazy_frames_are_like_their_array() -> None:
    array = np.arange(7 * 2 * 2 * 3, dtype=np.uint8).reshape(7, 2, 2, 3)
    lazy = LazyFrames(array.shape, lambda a, b: array[a:b])
    for where in (
        0,
        -1,
        np.int64(3),
        slice(None),
        slice(2, 5),
        slice(None, None, -1),
        slice(5, 1, -2),
        slice(1, None, 3),
        slice(4, 2),
        np.array([4, 1]),
        [0, -1],
    ):
        np.testing.assert_array_equal(lazy[where], array[where])
    np.testing.assert_array_equal(np.asarray(lazy), array)
    np.testing.assert_array_equal(np.stack(list(lazy)), array)
    assert len(lazy) == 7 and lazy.shape == array.shape and lazy.dtype == array.dtype
    with pytest.raises(IndexError):
        lazy[7]


def sparse(folder: Path, shards: int, episodes: int, length: int) -> Path:
    """A data set of files that are all holes: 84-token frames of 384 x 224."""
    spec = DatasetSpec((224, 384, 3), (), "int64", SPEC.action_space, {"env_id": "x"}, 20)
    spec.save(folder)
    for number in range(shards):
        shard = folder / f"shard-w00-{number:05d}"
        shard.mkdir()
        sizes = {"frames": 224 * 384 * 3, "actions": 8, "rewards": 4, "ends": 1}
        for name, size in sizes.items():
            count = episodes * (length + (name == "frames"))
            with open(shard / f"{name}.bin", "wb") as file:
                file.truncate(count * size)
        record = {"length": length, "return": 0.0, "seed": number, "policy": "x"}
        lines = [
            json.dumps({**record, "split": "validation" if n == 0 else "train", "number": n})
            for n in range(episodes)
        ]
        (shard / "episodes.jsonl").write_text("\n".join([*lines, ""]))
    return folder


def test_ten_million_frames_are_indexed_at_once_and_take_no_memory(tmp_path: Path) -> None:
    shards, episodes = 500, 20
    folder = sparse(tmp_path, shards, episodes, 999)
    begin = time.process_time()
    data = RecordedDataset(folder)
    data.check(32)
    seconds = time.process_time() - begin
    assert data.frame_count == 10_000_000
    assert seconds < 1  # three times what it takes; the processor's, for machines are busy
    tracemalloc.start()
    rng = np.random.default_rng(0)
    for round_ in range(2):
        for _ in range(60):
            episode = data.episodes[int(rng.integers(len(data)))]
            first = int(rng.integers(900))
            assert not episode.frames[first : first + 2, :1].any()
        if not round_:  # the first one opens the shards
            before = tracemalloc.get_traced_memory()[0]
    assert tracemalloc.get_traced_memory()[0] - before < 2**17
    tracemalloc.stop()
    assert reading._mapped.cache_info().maxsize <= 256  # files that are open at a time
