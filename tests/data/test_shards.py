from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.data.episode import Episode
from nfd_env.data.shards import DatasetSpec, RecordedDataset, RecordingError, ShardWriter
from nfd_env.spaces import space_to_dict

FRAME = (4, 6, 3)


def spec_of(space: spaces.Space) -> DatasetSpec:
    return DatasetSpec(
        FRAME, tuple(space.shape or ()), str(space.dtype), space_to_dict(space), {"env_id": "x"}, 20
    )


SPEC = spec_of(spaces.Discrete(5))


def make_episode(length: int, seed: int = 0, space: spaces.Space | None = None, **labels: str):
    rng = np.random.default_rng(seed)
    space = space or spaces.Discrete(5)
    space.seed(seed)
    ended = np.arange(length) == length - 1
    return Episode(
        rng.integers(0, 256, (length + 1, *FRAME), np.uint8),
        np.stack([space.sample() for _ in range(length)]),
        rng.normal(size=length).astype(np.float32),
        ended & bool(seed % 2),
        ended & (not seed % 2),
        seed=seed,
        **labels,
    )


def assert_same(left: Episode, right: Episode) -> None:
    for name in ("frames", "actions", "rewards", "terminated", "truncated", "signals"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes(), name
    for name in ("seed", "policy", "split"):
        assert getattr(left, name) == getattr(right, name)


def write(folder: Path, episodes: list[Episode], **kwargs: Any) -> ShardWriter:
    SPEC.save(folder)
    writer = ShardWriter(folder, SPEC, "w00", **kwargs)
    for episode in episodes:
        writer.add(episode)
    return writer


def assert_holds(folder: Path, episodes: list[Episode]) -> None:
    there = list(RecordedDataset(folder))
    assert len(there) == len(episodes)
    for reference, episode in zip(there, episodes, strict=True):
        assert_same(reference.load(), episode)


EPISODES = [
    make_episode(7, 1, policy="a", split="validation"),
    make_episode(1, 2, policy="b"),
    make_episode(5, 3, policy="a"),
]


def test_signals_are_kept_beside_the_frames(tmp_path: Path) -> None:
    spec = replace(SPEC, signals=2)
    spec.save(tmp_path)
    rng = np.random.default_rng(0)
    told = [rng.random((len(e), 2)).astype(np.float32) for e in EPISODES]
    told[0][-1] = np.nan
    episodes = [replace(e, signals=t) for e, t in zip(EPISODES, told, strict=True)]
    writer = ShardWriter(tmp_path, spec, "w00")
    for episode in episodes:
        writer.add(episode)
    assert_holds(tmp_path, episodes)
    with pytest.raises(RecordingError, match=r"\(0,\) signals a transition, the data set has 2"):
        writer.add(EPISODES[0])
    with pytest.raises(RecordingError, match="another signals"):
        SPEC.save(tmp_path)
    # Not committed: cut off with the rest.
    with open(writer.shard / "signals.bin", "ab") as file:
        file.write(b"12345")
    ShardWriter(tmp_path, spec, "w00").add(episodes[1])
    assert_holds(tmp_path, [*episodes, episodes[1]])


def test_signals_fit_their_episode() -> None:
    assert EPISODES[0].signals is not None and EPISODES[0].signals.shape == (7, 0)
    with pytest.raises(ValueError, match="signals has 3 entries for 7 actions"):
        replace(EPISODES[0], signals=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(3),
        spaces.Box(-1, 1, (2,), np.float32),
    ],
    ids=str,
)
def test_round_trip_is_bit_exact(tmp_path: Path, space: spaces.Space) -> None:
    spec = spec_of(space)
    spec.save(tmp_path)
    writer = ShardWriter(tmp_path, spec, "w00")
    episodes = [make_episode(n, n, space) for n in (3, 9, 1)]
    for episode in episodes:
        writer.add(episode)
    assert_holds(tmp_path, episodes)


def test_data_set(tmp_path: Path) -> None:
    write(tmp_path, EPISODES)
    data = RecordedDataset(tmp_path)
    assert data.spec == SPEC
    assert len(data) == 3
    assert data.frame_count == 8 + 2 + 6
    assert [len(e) for e in data] == [7, 1, 5]
    assert [e.length for e in data.split("validation")] == [7]
    assert [e.length for e in data.split("train")] == [1, 5]
    assert len({e.key for e in data}) == 3
    for reference, episode in zip(data, EPISODES, strict=True):
        assert reference.total_reward == pytest.approx(episode.rewards.sum())
    frames = data.episodes[0].frames
    assert not frames.flags.writeable


def test_several_shards_and_writers(tmp_path: Path) -> None:
    write(tmp_path, EPISODES[:2], frames_per_shard=8)
    other = ShardWriter(tmp_path, SPEC, "w01")
    other.add(EPISODES[2])
    names = sorted(p.name for p in tmp_path.glob("shard-*"))
    assert names == ["shard-w00-00000", "shard-w00-00001", "shard-w01-00000"]
    assert_holds(tmp_path, EPISODES)
    # A writer goes on in its newest shard.
    ShardWriter(tmp_path, SPEC, "w00", frames_per_shard=8).add(EPISODES[2])
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == names
    assert_holds(tmp_path, [*EPISODES[:2], EPISODES[2], EPISODES[2]])


def leave_garbage(shard: Path) -> None:
    for name in ("frames.bin", "actions.bin", "rewards.bin", "ends.bin"):
        with open(shard / name, "ab") as file:
            file.write(b"\x07" * 1001)
    with open(shard / "episodes.jsonl", "a") as file:
        file.write('{"length": 12, "ret')


def test_what_an_interrupted_writer_left_is_repaired_and_nothing_committed_is_lost(
    tmp_path: Path,
) -> None:
    shard = write(tmp_path, EPISODES[:2]).shard
    clean = {p.name: p.read_bytes() for p in shard.iterdir()}
    leave_garbage(shard)
    assert_holds(tmp_path, EPISODES[:2])  # readers are not disturbed
    writer = ShardWriter(tmp_path, SPEC, "w00")
    assert {p.name: p.read_bytes() for p in shard.iterdir()} == clean
    writer.add(EPISODES[2])
    assert_holds(tmp_path, EPISODES)


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
def test_a_crash_between_any_two_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    writer = write(tmp_path, EPISODES[:2])
    synced = 0

    def crash(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == writes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.add(EPISODES[2])
    assert_holds(tmp_path, EPISODES[:2])
    ShardWriter(tmp_path, SPEC, "w00").add(EPISODES[2])
    assert_holds(tmp_path, EPISODES)


@pytest.mark.parametrize("name", ["frames.bin", "actions.bin", "rewards.bin", "ends.bin"])
def test_a_file_that_was_cut_off(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, EPISODES).shard / name
    os.truncate(path, path.stat().st_size - 1)
    *earlier, last = RecordedDataset(tmp_path)
    with pytest.raises(RecordingError, match=f"{name} is shorter"):
        last.load()
    for reference, episode in zip(earlier, EPISODES, strict=False):
        assert_same(reference.load(), episode)
    with pytest.raises(RecordingError, match=f"{name} is shorter"):
        ShardWriter(tmp_path, SPEC, "w00")
    # Refusing has not destroyed anything.
    assert_same(next(iter(RecordedDataset(tmp_path))).load(), EPISODES[0])


def test_a_damaged_commit_record(tmp_path: Path) -> None:
    path = write(tmp_path, EPISODES).shard / "episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:20], *lines[1:]]) + "\n")
    with pytest.raises(RecordingError, match="episodes.jsonl: damaged commit record"):
        RecordedDataset(tmp_path)


def test_the_commit_record_is_plain_json(tmp_path: Path) -> None:
    path = write(tmp_path, EPISODES).shard / "episodes.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    assert first["length"] == 7 and first["policy"] == "a" and first["split"] == "validation"


def test_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no dataset.yaml"):
        RecordedDataset(tmp_path)


def test_another_data_set_in_the_folder(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    SPEC.save(tmp_path)
    assert DatasetSpec.load(tmp_path) == SPEC
    shown = {**SPEC.source, "action_names": ["a", "b"], "keys": {"a": ["x"]}, "display_aspect": 2.0}
    replace(SPEC, fps=30, source=shown).save(tmp_path)  # presentation needs no new recording
    assert DatasetSpec.load(tmp_path) == SPEC
    with pytest.raises(RecordingError, match="another source"):
        replace(SPEC, source={**SPEC.source, "crop": [0, 4, 0, 4]}).save(tmp_path)
    with pytest.raises(RecordingError, match="another action_space"):
        replace(SPEC, action_space={"type": "Discrete", "n": 4, "start": 0}).save(tmp_path)


def test_an_episode_of_another_data_set(tmp_path: Path) -> None:
    writer = write(tmp_path, [])
    with pytest.raises(RecordingError, match=r"frames are \(8, 6, 3\)"):
        writer.add(replace(EPISODES[0], frames=np.zeros((8, 8, 6, 3), np.uint8)))
    with pytest.raises(RecordingError, match=r"actions are \(2,\)"):
        writer.add(replace(EPISODES[0], actions=np.zeros((7, 2), int)))
    assert_holds(tmp_path, [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": EPISODES[0].frames[:-1]}, "7 actions need 8 frames"),
        ({"frames": EPISODES[0].frames.astype(np.float32)}, "frames must be uint8"),
        ({"frames": EPISODES[0].frames[..., :1]}, "frames must be uint8"),
        ({"frames": EPISODES[0].frames[0]}, "frames must be uint8"),
        ({"actions": EPISODES[0].actions[1:]}, "6 actions need 7 frames"),
        ({"actions": EPISODES[0].actions[:0], "frames": EPISODES[0].frames[:1]}, "0 actions"),
        ({"rewards": EPISODES[0].rewards[1:]}, "rewards has 6 entries for 7"),
        ({"terminated": EPISODES[0].terminated[1:]}, "terminated has 6 entries for 7"),
        ({"truncated": np.zeros(8, bool)}, "truncated has 8 entries for 7"),
    ],
)
def test_arrays_that_do_not_belong_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EPISODES[0], **changed)


def test_a_writer_goes_on_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, EPISODES[:1])
    sync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 3:
            raise OSError("no space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        writer.add(EPISODES[1])
    writer.add(EPISODES[2])
    assert_holds(tmp_path, [EPISODES[0], EPISODES[2]])
