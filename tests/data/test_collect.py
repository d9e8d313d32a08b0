"""An action belongs to the transition that it causes, all the way to the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.config import ConfigError
from nfd_env.data.collect import CollectConfig, PolicyConfig, collect
from nfd_env.data.episode import Episode
from nfd_env.data.policies import RandomHeld
from nfd_env.data.record import record_episode
from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.sources.source import SourceError, make_source
from tests.counter_env import AlwaysRight, move, read, source

POLICIES = [
    PolicyConfig("random_held", 3.0, {"low": 1, "high": 3}),
    PolicyConfig("tests.counter_env:AlwaysRight", 1.0),
]


def assert_actions_cause_their_transitions(episode: Episode | EpisodeReference) -> None:
    counter, steps = read(np.asarray(episode.frames))
    assert steps.tolist() == list(range(len(episode) + 1))
    assert np.array_equal(np.diff(counter), move(episode.actions))
    assert np.array_equal(episode.rewards, move(episode.actions))


def record(length: int, max_steps: int = 100, seed: int = 5) -> Episode:
    env = make_source(source(kwargs={"length": length}))
    return record_episode(env, RandomHeld(1, 3), seed, max_steps, policy="p", split="validation")


def test_record_episode() -> None:
    episode = record(30)
    assert len(episode) == 30
    assert_actions_cause_their_transitions(episode)
    assert set(episode.actions) == {0, 1, 2}
    assert episode.terminated.tolist() == [False] * 29 + [True]
    assert not episode.truncated.any()
    assert (episode.seed, episode.policy, episode.split) == (5, "p", "validation")


def test_record_episode_is_cut_at_the_longest_length() -> None:
    episode = record(30, max_steps=8)
    assert len(episode) == 8
    assert_actions_cause_their_transitions(episode)
    assert not episode.terminated.any()
    assert episode.truncated.tolist() == [False] * 7 + [True]


def test_an_episode_that_ends_by_itself_at_the_longest_length_is_not_cut() -> None:
    episode = record(8, max_steps=8)
    assert episode.terminated[-1] and not episode.truncated.any()


def test_record_episode_depends_on_the_seed_alone() -> None:
    one, same, other = record(20), record(20), record(20, seed=6)
    assert one.frames.tobytes() == same.frames.tobytes()
    assert one.actions.tobytes() == same.actions.tobytes()
    assert one.actions.tobytes() != other.actions.tobytes()


def settings(folder: Path, frames: int, **kwargs: Any) -> CollectConfig:
    values = {
        "source": source(kwargs={"length": 12}),
        "folder": str(folder),
        "frames": frames,
        "policies": POLICIES,
        "workers": 2,
        "seed": 3,
        "validation_every": 4,
        **kwargs,
    }
    return CollectConfig(**values)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(settings(folder, 400), progress=False)
    return folder


def test_collected_by_two_workers(collected: Path) -> None:
    data = RecordedDataset(collected)
    assert 400 <= data.frame_count < 400 + 2 * 13
    assert {e.shard.name for e in data} == {"shard-w00-00000", "shard-w01-00000"}
    assert len({e.seed for e in data}) == len(data)
    for episode in data:
        assert_actions_cause_their_transitions(episode)
        assert len(episode) == 12 and episode.terminated[-1]
        if "AlwaysRight" in episode.policy:
            assert set(episode.actions) == {2}
    # Not all episodes are the same one.
    assert len({episode.actions.tobytes() for episode in data}) > len(data) / 2
    frames = {p: sum(len(e) + 1 for e in data if e.policy == p) for p in {e.policy for e in data}}
    assert sorted(frames) == ["0:random_held", "1:AlwaysRight"]
    assert frames["0:random_held"] / data.frame_count == pytest.approx(0.75, abs=0.07)


def test_the_validation_split_is_held_out(collected: Path) -> None:
    data = RecordedDataset(collected)
    train, validation = ({e.key for e in data.split(s)} for s in ("train", "validation"))
    assert train and validation and not train & validation
    assert len(train | validation) == len(data)
    for name in ("w00", "w01"):
        mine = [e for e in data if name in e.shard.name]
        assert [e.split == "validation" for e in mine] == [i % 4 == 0 for i in range(len(mine))]
    held_out = {e.load().frames.tobytes() for e in data.split("validation")}
    assert not held_out & {e.load().frames.tobytes() for e in data.split("train")}


def test_the_data_set_says_where_it_comes_from(collected: Path) -> None:
    spec = RecordedDataset(collected).spec
    assert spec.fps == 25
    assert spec.frame_shape == (32, 48, 3)
    assert spec.action_space == {"type": "Discrete", "n": 3, "start": 0}
    assert spec.source["env_id"] == "tests/Counter-v0"


def test_what_is_complete_starts_no_process(
    collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfd_env.data.collect.work", None)
    count = RecordedDataset(collected).frame_count
    assert collect(settings(collected, 400), progress=False).frame_count == count


def test_another_number_of_workers(collected: Path) -> None:
    before = RecordedDataset(collected).frame_count
    for workers in (1, 3):
        with pytest.raises(RecordingError, match="recorded with 2 workers; go on with workers=2"):
            collect(settings(collected, 1000, workers=workers), progress=False)
    assert RecordedDataset(collected).frame_count == before


def test_recordings_of_something_else(collected: Path) -> None:
    other = source(kwargs={"length": 13})
    with pytest.raises(RecordingError, match="another source"):
        collect(settings(collected, 1000, source=other), progress=False)


def test_collecting_again_goes_on_to_the_larger_target(collected: Path) -> None:
    before = {e.key: e.load() for e in RecordedDataset(collected)}
    mixture = [*POLICIES, PolicyConfig("random_held", 4.0, {"low": 5, "high": 5})]
    data = collect(settings(collected, 700, policies=mixture), progress=False)
    assert 700 <= data.frame_count < 700 + 2 * 13
    after = {e.key: e.load() for e in data}
    assert len(after) > len(before)
    for key, episode in before.items():
        assert after[key].frames.tobytes() == episode.frames.tobytes()
        assert after[key].actions.tobytes() == episode.actions.tobytes()
    assert len({e.seed for e in data}) == len(data)
    for episode in data:
        assert_actions_cause_their_transitions(episode)
    # A policy that is new to the mixture is played until it has its share.
    assert sum(len(e) + 1 for e in data if e.policy == "2:random_held") > 200


def test_a_killed_worker_loses_the_running_episode_at_most(tmp_path: Path) -> None:
    mortal = [PolicyConfig("tests.counter_env:Killed")]
    with pytest.raises(RecordingError, match="worker w00 was killed by SIGKILL .*; run again"):
        collect(settings(tmp_path, 200, workers=1, policies=mortal), progress=False)
    data = RecordedDataset(tmp_path)
    assert len(data) == 2
    for episode in data:
        assert_actions_cause_their_transitions(episode)


def test_signals_are_of_the_moment_after_each_transition(tmp_path: Path) -> None:
    wanted = settings(tmp_path / "told", 60, signals="tests.counter_env:tell")
    told = collect(wanted, progress=False)
    plain = collect(settings(tmp_path / "plain", 60), progress=False)
    assert told.spec.signals == 2 and plain.spec.signals == 0
    for one, other in zip(told, plain, strict=True):
        assert np.array_equal(one.frames, other.frames)
        counter, steps = read(np.asarray(one.frames))
        assert np.array_equal(one.signals, np.stack([counter[1:] / 256, steps[1:] / 256], 1))
        assert other.signals.shape == (len(other), 0)
    with pytest.raises(RecordingError, match="another signals"):
        collect(replace(wanted, signals=""), progress=False)


@pytest.mark.parametrize("name", ["tell", "tests.counter_env:nothing", "no.such.module:tell", ":"])
def test_signals_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordingError, match="signals must name a function as module:function"):
        collect(settings(tmp_path / "data", 60, signals=name), progress=False)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("told", [-0.5, 1.5])
def test_signals_out_of_range(told: float) -> None:
    env = make_source(source(kwargs={"length": 5}))
    with pytest.raises(RecordingError, match=f"from 0 to 1.*got 0.25 to {told}|got {told} to 0.25"):
        record_episode(env, AlwaysRight(), 0, 9, lambda _: np.array([np.nan, 0.25, told]))
    kept = record_episode(env, AlwaysRight(), 0, 9, lambda _: np.array([np.nan, 0.0, 1.0]))
    assert kept.signals is not None and kept.signals.shape == (5, 3)


def test_an_error_in_a_worker_is_shown(tmp_path: Path) -> None:
    wrong = [PolicyConfig("tests.counter_env:Failing")]
    with pytest.raises(RecordingError, match="the policy's own bug"):
        collect(settings(tmp_path, 200, workers=1, policies=wrong), progress=False)


def test_a_worker_imports_torch_for_networks_only(tmp_path: Path, monkeypatch: Any) -> None:
    """It takes seconds, and two hundred megabytes a worker."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    policies = [PolicyConfig("tests.counter_env:WithoutTorch")]
    collect(settings(tmp_path, 60, workers=1, policies=policies), progress=False)
    assert not RecordedDataset(tmp_path).skipped()


def test_a_source_that_is_not_installed(tmp_path: Path) -> None:
    missing = replace(source(), imports=["no_such_game.envs"])
    with pytest.raises(SourceError, match="pip install no_such_game"):
        collect(settings(tmp_path, 200, source=missing), progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "at least 1"),
        ({"workers": 0}, "workers must be from 1 to 1024"),
        ({"max_episode_steps": 0}, "at least 1"),
        ({"validation_every": 1}, "at least 2"),
        ({"policies": []}, "at least one policy"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **{"frames": 100, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0.0}, "share must be above 0 and finite"),
        ({"share": np.inf}, "share must be above 0 and finite"),
        ({"mistakes": 2.0}, "must"),
    ],
)
def test_policies_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig("random_held", **wrong)


def test_a_custom_policy_sees_the_recorded_frames() -> None:
    env = make_source(source(kwargs={"length": 6}))
    episode = record_episode(env, AlwaysRight(), 0, 100)  # asserts on what it sees
    assert np.array_equal(episode.actions, np.full(6, 2))
