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
from nfd_env.files import FolderError, FolderInUseError
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
    with pytest.raises(RecordingError, match=r"signals are \(0,\), the data set has \(2,\)"):
        writer.add(EPISODES[0])
    with pytest.raises(RecordingError, match="another signals"):
        SPEC.save(tmp_path)
    # Not committed: cut off with the rest.
    with open(writer.shard / "signals.bin", "ab") as file:
        file.write(b"12345")
    writer.close()
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
    writer.close()
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
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FolderError, match="w00-00000 .*No space left on device.: make room.*is whole"
    ):
        writer.add(EPISODES[1])
    writer.add(EPISODES[2])
    assert_holds(tmp_path, [EPISODES[0], EPISODES[2]])


def test_there_is_one_writer_of_a_name(tmp_path: Path) -> None:
    with write(tmp_path, EPISODES[:1]) as writer:
        # As if it were between an episode's bytes and its line.
        with open(writer.shard / "frames.bin", "ab") as file:
            file.write(b"half")
        size = (writer.shard / "frames.bin").stat().st_size
        with pytest.raises(
            FolderInUseError, match=rf"\(w00\) is being written by process {os.getpid()}"
        ):
            ShardWriter(tmp_path, SPEC, "w00")
        assert (writer.shard / "frames.bin").stat().st_size == size
        with ShardWriter(tmp_path, SPEC, "w01") as other:
            other.add(EPISODES[1])
    with pytest.raises(RecordingError, match="is closed"):
        writer.add(EPISODES[1])
    with ShardWriter(tmp_path, SPEC, "w00") as again:
        again.add(EPISODES[2])
    assert len(RecordedDataset(tmp_path)) == 3
    with pytest.raises(ValueError, match="named by letters"):
        ShardWriter(tmp_path, SPEC, "../w00")


def test_a_writer_that_could_not_clean_up_does_so_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, EPISODES[:1])

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        patch.setattr(os, "truncate", broken)
        with pytest.raises(FolderError, match="Input/output error"):
            writer.add(EPISODES[1])
        with pytest.raises(FolderError, match="Input/output error"):
            writer.add(EPISODES[1])
    writer.add(EPISODES[2])
    assert_holds(tmp_path, [EPISODES[0], EPISODES[2]])


def test_seeds_of_any_size_and_numpys_numbers(tmp_path: Path) -> None:
    seeds = [2**63, 2**70, np.int64(3), np.uint64(2**64 - 1)]
    writer = write(tmp_path, [])
    for number, seed in enumerate(seeds):
        writer.add(replace(EPISODES[1], seed=seed), number)
    assert [e.seed for e in RecordedDataset(tmp_path)] == [int(s) for s in seeds]
    assert [e.load().seed for e in RecordedDataset(tmp_path)] == [int(s) for s in seeds]
    assert [e.number for e in RecordedDataset(tmp_path)] == [0, 1, 2, 3]
    with pytest.raises(TypeError):
        replace(EPISODES[1], seed=1.5)


GOOD = '{"length": 2, "return": 1.0, "seed": 1, "policy": "a", "split": "train"}'


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        GOOD.replace("2", "-2").encode(),
        GOOD.replace("2", '"2"').encode(),
        GOOD.replace("2", "2.0").encode(),
        GOOD.replace("2", "true").encode(),
        GOOD.replace("2", "1" + "0" * 30).encode(),
        GOOD.replace("{", '{"number": "a", ').encode(),
        GOOD.replace("train", "test").encode(),
        GOOD.replace('"a"', "null").encode(),
        GOOD.replace('"seed": 1, ', "").encode(),
        GOOD.replace("1.0", "[]").encode(),
    ],
    ids=range(16),
)
def test_damaged_commit_records_are_named(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, EPISODES[:1]).shard / "episodes.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(
        RecordingError, match=r"episodes\.jsonl: damaged commit record, line 2"
    ) as e:
        RecordedDataset(tmp_path)
    assert "\n" not in str(e.value)
    before = path.read_bytes()
    with pytest.raises(RecordingError, match="damaged commit record"):
        ShardWriter(tmp_path, SPEC, "w00")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fps: 20", "fps: .nan"),
        ("fps: 20", "fps: .inf"),
        ("fps: 20", "fps: 0"),
        ("fps: 20", "fps: [1]"),
        ("fps: 20", "fsp: 20"),
        ("env_id: x", "env_id: ${oc.env:HOME}"),
        ("- 4\n", "- 0\n"),
        ("- 4\n", "- a\n"),
        ("- 4\n", ""),
        ("type: Discrete", "type: Continuous"),
        ("  n: 5\n", ""),
        ("action_dtype: int64", "action_dtype: words"),
        ("action_dtype: int64", "action_dtype: object"),
        ("action_shape: []", "action_shape: [2]"),
        ("fps: 20", "fps: " + "[" * 100_000),
    ],
    ids=range(15),
)
def test_a_damaged_spec_is_named(tmp_path: Path, old: str, new: str) -> None:
    write(tmp_path, EPISODES[:1])
    path = tmp_path / "dataset.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RecordingError, match=r"dataset\.yaml") as error:
        RecordedDataset(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("- 4\n", "- 99999999999999999999\n"), ("fps: 20", "fps: 20\nsignals: 99999999999999999999")],
)
def test_sizes_beyond_all_files(tmp_path: Path, old: str, new: str) -> None:
    write(tmp_path, EPISODES[:1])
    path = tmp_path / "dataset.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RecordingError, match=r"frames\.bin is shorter|signals\.bin is missing"):
        RecordedDataset(tmp_path).check(splits=["validation"])


@pytest.mark.parametrize(
    "name", ["shard-w00-00000.zip", "shard-notes", "shard-w00-1", "shard-a-b-c"]
)
def test_foreign_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, EPISODES[:1])
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".DS_Store").touch()
    assert len(RecordedDataset(tmp_path)) == 1
    (tmp_path / name).touch()
    with pytest.raises(RecordingError, match=f"{name} is no shard"):
        RecordedDataset(tmp_path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    shard = write(tmp_path, EPISODES[:1]).shard
    (shard / "rewards.bin").unlink()
    with pytest.raises(RecordingError, match=r"rewards\.bin is missing"):
        RecordedDataset(tmp_path).check(splits=["validation"])


def test_what_cannot_be_trained_on_is_refused_at_the_door(tmp_path: Path) -> None:
    write(tmp_path, EPISODES[:1]).close()  # for validation
    data = RecordedDataset(tmp_path)
    data.check(8, ["validation"])
    with pytest.raises(RecordingError, match="has no train episode, and 1 in all"):
        data.check()
    write(tmp_path, EPISODES[2:]).close()
    data = RecordedDataset(tmp_path)
    data.check(6)
    with pytest.raises(RecordingError, match="no train episode of .* 7 frames.* longest has 6"):
        data.check(7)
    path = data.episodes[-1].shard / "actions.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RecordingError, match=r"actions\.bin is shorter"):
        RecordedDataset(tmp_path).check()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("actions.bin", np.int64(5), r"actions must lie in Discrete\(5\), got 5"),
        ("actions.bin", np.int64(-(2**62)), r"actions must lie in Discrete\(5\), got -4611"),
        ("ends.bin", np.uint8(1), "terminates at its last transition only"),
        ("ends.bin", np.uint8(64), "terminates at its last transition only"),
    ],
)
def test_damage_within_an_episode_is_named(
    tmp_path: Path, name: str, value: np.generic, message: str
) -> None:
    shard = write(tmp_path, EPISODES[:1]).shard
    data = bytearray((shard / name).read_bytes())
    data[2 * value.itemsize : 3 * value.itemsize] = value.tobytes()
    (shard / name).write_bytes(data)
    data_set = RecordedDataset(tmp_path)
    with pytest.raises(
        RecordingError, match=f"{name} is damaged in the episode of seed 1: .*{message}"
    ):
        data_set.check(splits=["validation"])


def test_actions_that_the_data_set_cannot_hold(tmp_path: Path) -> None:
    writer = write(tmp_path, [])
    with pytest.raises(RecordingError, match="actions are float64, the data set has int64"):
        writer.add(replace(EPISODES[0], actions=np.full(7, 0.5)))
    with pytest.raises(RecordingError, match=r"actions must lie in Discrete\(5\), got 9"):
        writer.add(replace(EPISODES[0], actions=np.full(7, 9)))
    assert len(RecordedDataset(tmp_path)) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"rewards": np.array([0, 1, np.nan, 0, 0, 0, 0])},
            "rewards must be finite, got nan at step 2",
        ),
        (
            {"rewards": np.array([0, 1, 0, 0, 0, 0, np.inf])},
            "rewards must be finite, got inf at step 6",
        ),
        ({"rewards": np.zeros((7, 1))}, "rewards must be numbers, one a transition"),
        ({"rewards": np.array([None] * 7)}, "rewards must be numbers"),
        ({"actions": np.array(["a"] * 7)}, "actions must be numbers, got"),
        ({"actions": np.full((7, 2), np.nan)}, "actions must be finite"),
        ({"terminated": np.ones(7, bool)}, "ends at its last transition"),
        ({"split": "test"}, "split must be one of train, validation"),
    ],
)
def test_values_that_nobody_can_train_on(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EPISODES[0], **changed)
