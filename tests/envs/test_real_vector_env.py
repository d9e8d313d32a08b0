"""A batch of real games with the interface of the learned world."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from nfd_env.envs import real_vector_env
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.state import Context
from nfd_env.sources.source import SourceError
from nfd_env.spaces import space_to_dict
from nfd_env.worlds.load import load_world
from tests.counter_env import read

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def test_it_looks_like_the_learned_world(counter_world: Path) -> None:
    for obs_type in ("rgb", "latent", "features"):
        real = RealVectorEnv(counter_world, 3, obs_type=obs_type, **CPU)
        learned = NFDVectorEnv(counter_world, 3, obs_type=obs_type, **CPU)
        assert real.observation_space == learned.observation_space
        assert real.action_space == learned.action_space
        observation, _ = real.reset(seed=0)
        assert observation in real.observation_space
        assert real.step([0, 1, 2])[0] in real.observation_space
        real.close()


def test_actions_are_repeated_and_rewards_summed(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 2, frame_skip=3, length=10, **CPU)
    before, steps = read(env.reset(seed=[5, 6])[0])
    assert steps.tolist() == [0, 0]
    frames, reward, terminated, _, _ = env.step([0, 2])
    after, steps = read(frames)
    assert steps.tolist() == [3, 3] and (after - before).tolist() == [-3, 3]
    assert reward.tolist() == [-3.0, 3.0] and not terminated.any()


class Dial(gymnasium.Env):
    """Takes nothing but actions of its space."""

    observation_space = spaces.Box(0, 255, (32, 48, 3), np.uint8)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        return np.zeros((32, 48, 3), np.uint8), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action in self.action_space, (action, action.dtype)
        return np.zeros((32, 48, 3), np.uint8), float(action.sum()), False, False, {}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-5, 5, (2,), np.int8),
        spaces.Box(-0.1, 0.1, (2,), np.float64),
        spaces.Box(0, 2**40 + 1, (2,), np.int64),
        spaces.MultiDiscrete([2, 3], np.int32),
        spaces.MultiBinary(2),
    ],
    ids=str,
)
def test_the_game_gets_actions_of_its_own_type(
    make_world: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    space: spaces.Space,
    as_tensor: bool,
) -> None:
    world = make_world(action_space=space_to_dict(space))
    monkeypatch.setattr(real_vector_env, "make_real", lambda world: Dial(space))
    env = RealVectorEnv(world, 2, **CPU)
    env.reset(seed=0)
    high = space.high if isinstance(space, spaces.Box) else np.ones(2, np.int64)
    actions = np.stack([high, high])
    rewards = env.step(torch.from_numpy(actions) if as_tensor else actions)[1]
    assert rewards == pytest.approx(2 * float(high[0]))
    if space.dtype.kind == "f":  # a network's action at the bound
        env.step(actions.astype(np.float32))
    env.close()


def test_an_end_within_a_step_cuts_it_short_and_resets(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 2, frame_skip=3, length=4, **CPU)
    env.reset(seed=0)
    env.step([2, 2])
    frames, reward, terminated, truncated, infos = env.step([2, 0])
    assert reward.tolist() == [1.0, -1.0]  # one frame was left
    assert terminated.all() and not truncated.any() and infos["_final_obs"].all()
    assert read(infos["final_obs"])[1].tolist() == [4, 4]
    assert read(frames)[1].tolist() == [0, 0]


def test_truncation_counts_steps_not_frames(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 1, frame_skip=2, length=100, max_episode_steps=3, **CPU)
    env.reset(seed=0)
    outcomes = [env.step([1])[2:4] for _ in range(6)]
    assert [bool(t) for _, t in outcomes] == [False, False, True] * 2
    assert not any(bool(t) for t, _ in outcomes)


def test_latents_are_those_of_the_tokenizer(counter_world: Path) -> None:
    pixels = RealVectorEnv(counter_world, 2, **CPU)
    latents = RealVectorEnv(counter_world, 2, obs_type="latent", output="torch", **CPU)
    frames, latent = pixels.reset(seed=3)[0], latents.reset(seed=3)[0]
    model = load_world(counter_world, **CPU).model
    assert isinstance(latent, torch.Tensor)
    torch.testing.assert_close(latent, model.encode(torch.from_numpy(frames)))


def test_features_follow_the_whole_episode(counter_world: Path) -> None:
    """Also through skipped frames, ends within a step, masked resets and ``take``."""
    kwargs: dict[str, Any] = {"length": 10, **CPU}
    env = RealVectorEnv(
        counter_world, 2, obs_type="features", output="torch", frame_skip=3, **kwargs
    )
    pixels = RealVectorEnv(counter_world, 2, **kwargs)
    model, codec = env.model, env.world.codec

    def expected(frames: list[np.ndarray], actions: list[int]) -> torch.Tensor:
        into = torch.zeros(len(frames), codec.width)
        if actions:
            into[1:] = codec.encode(torch.tensor(actions))
        return model.features_along(Context(model.encode(torch.from_numpy(np.stack(frames))), into))

    shown, begun = env.reset(seed=3)[0], pixels.reset(seed=3)[0]
    frames, acts = [[begun[row]] for row in range(2)], [[], []]
    for row in range(2):
        torch.testing.assert_close(shown[row], expected(frames[row], [])[-1], **CLOSE)
    for step, action in enumerate(([0, 2], [1, 2], [2, 1], [0, 1])):
        shown, _, terminated, _, infos = env.step(action)
        assert terminated.tolist() == [step == 3] * 2  # the fourth step has one frame
        for _ in range(1 if step == 3 else 3):
            drawn, *_, last = pixels.step(action)
            for row in range(2):
                frames[row].append(last.get("final_obs", drawn)[row])
                acts[row].append(action[row])
        seen = infos["final_obs"] if step == 3 else shown
        for row in range(2):
            torch.testing.assert_close(seen[row], expected(frames[row], acts[row])[-1], **CLOSE)
    for row in range(2):  # of the new episode
        torch.testing.assert_close(shown[row], expected([drawn[row]], [])[-1], **CLOSE)
    taken = env.take([1])
    shown = taken.step([2])[0]
    frames = [drawn[1]] + [pixels.step([0, 2])[0][1] for _ in range(3)]
    torch.testing.assert_close(shown[0], expected(frames, [2, 2, 2])[-1], **CLOSE)
    kept = env.reset(seed=5, options={"reset_mask": np.array([True, False])})[0]
    torch.testing.assert_close(kept[0], expected([pixels.reset(seed=5)[0][0]], [])[-1], **CLOSE)
    env.close()
    pixels.close()


def test_seeds_belong_to_slots(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 2, **CPU)
    first = env.reset(seed=7)[0]
    assert np.array_equal(env.reset(seed=[7, 8])[0], first)
    assert np.array_equal(env.reset(seed=[8, 7])[0], first[::-1])
    assert not np.array_equal(first[0], first[1])


def test_bad_input(counter_world: Path) -> None:
    with pytest.raises(ValueError, match="obs_type must be one of rgb, latent, features"):
        RealVectorEnv(counter_world, obs_type="sound", **CPU)
    with pytest.raises(ValueError, match="frame_skip must be a whole number of at least 1, got 0"):
        RealVectorEnv(counter_world, frame_skip=0, **CPU)
    env = RealVectorEnv(counter_world, 2, **CPU)
    with pytest.raises(ValueError, match="3 seeds were given for 2"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions must lie in"):
        env.step([0, 3])


def test_without_the_real_game(counter_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests.counter_env", None)  # which registers the game
    with pytest.raises(SourceError, match="pip install tests"):
        RealVectorEnv(counter_world, 2, **CPU)


def test_some_of_the_games_go_on(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 3, **CPU)
    env.reset(seed=0)
    frames = env.step([0, 1, 2])[0]
    taken = env.take([2, 0])
    assert taken.num_envs == 2 and np.array_equal(taken.frames(), frames[[2, 0]])
    assert np.array_equal(env.frames([1]), frames[[1]])
    counters, steps = read(taken.step([1, 1])[0])
    assert counters.tolist() == read(frames)[0][[2, 0]].tolist() and steps.tolist() == [2, 2]
    assert taken.observation_space.shape == (2, 32, 48, 3)
    taken.close()
    del taken
    assert env.step([0, 0, 0])[0].shape == (3, 32, 48, 3)  # neither its games nor threads are gone
    env.close()
