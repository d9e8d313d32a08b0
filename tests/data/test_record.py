"""What a game or a policy hands over is copied and checked before it counts."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.data.layout import RecordingError
from nfd_env.data.policies import Mistaken, RandomHeld, make_policy
from nfd_env.data.record import record_episode
from nfd_env.data.worker import MOST_WORKERS, episode_seed
from tests.data.tricky_env import SpoilingEnv, SpoilingPolicy


def test_what_an_env_and_a_policy_do_to_arrays_changes_nothing_recorded() -> None:
    env = SpoilingEnv()
    episode = record_episode(env, SpoilingPolicy(), 3, 100)
    sent = np.array([[t / 10, -t / 10] for t in range(1, 7)], np.float32)
    assert np.array_equal(env.sent, sent)  # not what it made of it
    assert np.array_equal(episode.actions, sent)
    assert episode.frames[:, 0, 0, 0].tolist() == list(range(7))
    assert episode.terminated.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("policy", [RandomHeld(9, 9), Mistaken(RandomHeld(9, 9), 1.0, 9, 9)])
def test_held_actions_are_not_worn_out(policy: Any) -> None:
    env = SpoilingEnv()
    policy.reset(env, np.random.default_rng(0))
    first = policy.act(env.buffer)
    kept = first.copy()
    first *= 0.5
    assert np.array_equal(policy.act(env.buffer), kept)


RGB = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"frames": lambda f, t: f[..., :1]}, r"step 0: frames must be uint8 .*\(8, 8, 1\)"),
        ({"frames": lambda f, t: np.zeros((8, 8, 4), np.uint8)}, r"step 0: .*\(8, 8, 4\)"),
        ({"frames": lambda f, t: f / 255}, "step 0: frames must be uint8 .* float64"),
        ({"frames": lambda f, t: f.tolist()}, "step 0: frames must be uint8 .* list"),
        ({"frames": lambda f, t: f[0]}, r"step 0: .*\(8, 3\)"),
        (
            {"frames": lambda f, t: f[: 8 - (t > 3)]},
            r"step 3: a frame is \(7, 8, 3\)",
        ),
        ({"frames": lambda f, t: None if t == 2 else f}, "step 1: .* NoneType"),
        (
            {"reward": lambda t: float("nan") if t == 3 else 0},
            "step 2: reward must be finite",
        ),
        ({"reward": lambda t: -np.inf}, "step 0: reward must be finite, got -inf"),
        ({"reward": lambda t: 1e300}, "step 0: reward must be finite"),
        (
            {"reward": lambda t: np.zeros(3)},
            r"step 0: reward must be .* \(3,\)",
        ),
        ({"reward": lambda t: None}, "step 0: reward must be one number"),
        ({"reward": lambda t: "1"}, "step 0: reward must be one number"),
        ({"terminated": lambda t: np.zeros(2, bool)}, "step 0: terminated must be one number"),
        ({"terminated": lambda t: None}, "step 0: terminated must be one number"),
    ],
    ids=range(15),
)
def test_refused_at_the_step_where_it_happens(answers: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=f"SpoilingEnv, episode of seed 7, {message}"):
        record_episode(SpoilingEnv(**answers), SpoilingPolicy(), 7, 100)


def test_arrays_of_one_number_count_as_it() -> None:
    env = SpoilingEnv(reward=lambda t: np.array([t / 2]), terminated=lambda t: np.array([t == 2]))
    episode = record_episode(env, SpoilingPolicy(), 0, 100)
    assert episode.rewards.tolist() == [0.5, 1.0] and episode.rewards.dtype == np.float32
    assert episode.terminated.tolist() == [False, True]


class Gives:
    """A policy that gives one thing."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None: ...

    def act(self, observation: np.ndarray) -> Any:
        return self.action


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (spaces.Discrete(3), 3, "3 does not lie in Discrete"),
        (spaces.Discrete(3), 1.5, "1.5 does not lie in Discrete"),
        (spaces.Discrete(3), [1], r"has shape \(1,\)"),
        (spaces.Discrete(3), None, "no array|does not lie"),
        (spaces.Discrete(3), "left", "no array|does not lie"),
        (spaces.Discrete(3, start=1), 0, "0 does not lie"),
        (spaces.MultiDiscrete([2, 3]), [1, 3], "does not lie"),
        (spaces.MultiBinary(2), [0, 300], "does not lie"),
        (spaces.Box(-1, 1, (2,), np.float32), [0.0, 1.5], "does not lie"),
        (spaces.Box(-1, 1, (2,), np.float32), [0.0, np.nan], "does not lie"),
        (spaces.Box(-1, 1, (2,), np.float32), 0.5, r"has shape \(\)"),
        (spaces.Box(0, 9, (1,), np.uint8), [300], "does not lie|no array"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"a": 1}, "action space must be"),
    ],
    ids=range(13),
)
def test_actions_that_are_none(space: spaces.Space, action: Any, message: str) -> None:
    env = SpoilingEnv()
    env.action_space = space
    with pytest.raises(RecordingError, match=f"seed 0, step 0: .*({message})"):
        record_episode(env, Gives(action), 0, 100)
    assert env.sent == []


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("random_held", {"lo": 3}, "random_held.*lo"),
        ("random_held", {"low": 0}, "1 <= low <= high"),
        ("random_held", {"low": "a"}, "random_held.*cannot be made"),
        ("sb3", {"path": "x", "algorithm": "PP0", "trust": True}, "no algorithm 'PP0'"),
        ("tests.data.tricky_env:nothing", {}, "nothing"),
        ("random", {}, "known: random_held, sb3"),
    ],
)
def test_policies_that_cannot_be_made(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_policy(name, kwargs)
    assert "\n" not in str(error.value)


def test_no_two_episodes_of_a_data_set_have_the_same_seed() -> None:
    """31 bits at random would repeat one in 70,000 episodes, perhaps across the split."""
    seeds = {episode_seed(0, worker, number) for worker in range(7) for number in range(20_000)}
    assert len(seeds) == 140_000 and min(seeds) >= 0 and max(seeds) < 2**31
    assert max(seeds) - min(seeds) > 2**30  # spread, for games that only look at some bits
    assert len({seed % 256 for seed in seeds}) == 256
    first = [episode_seed(seed, 0, 0) for seed in (0, 1, 2**64, 2**64 + 1, 2**200)]
    assert len(set(first)) == 5
    assert episode_seed(3, MOST_WORKERS - 1, 2**21 - 1) < 2**31
