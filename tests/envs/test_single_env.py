from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

import nfd_env  # noqa: F401  # registers the ids
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.sources.keys import resting_action


def make(world: Path, **kwargs: Any) -> NFDEnv:
    return NFDEnv(world, **{"device": "cpu", "precision": "fp32", **kwargs})


def test_spaces_and_types(tiny_world: Path) -> None:
    env = make(tiny_world, render_mode="rgb_array", frame_skip=5)
    assert env.observation_space.shape == (32, 48, 3) and env.action_space.n == 3
    assert env.metadata["render_fps"] == 7 and "autoreset_mode" not in env.metadata
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space and info == {"hazard": 0, "precision": 32}
    observation, reward, terminated, truncated, info = env.step(1)
    assert observation in env.observation_space
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
    assert info.keys() == {"hazard", "precision"} and type(info["hazard"]) is np.float32
    assert np.array_equal(env.render(), observation)


def test_it_is_a_vector_env_of_one(tiny_world: Path) -> None:
    env = make(tiny_world)
    vector = NFDVectorEnv(tiny_world, 1, device="cpu", precision="fp32", autoreset_mode="Disabled")
    assert np.array_equal(env.reset(seed=4)[0], vector.reset(seed=4)[0][0])
    for action in np.random.default_rng(0).integers(0, 3, 60):
        left, right = env.step(action), vector.step([action])
        assert np.array_equal(left[0], right[0][0])
        assert left[1:4] == (right[1][0], right[2][0], right[3][0])
        if left[2]:
            assert np.array_equal(env.reset()[0], vector.reset()[0][0])


def test_a_limit_that_is_set_is_the_envs_own(endless_world: Path) -> None:
    """Unlike that of gymnasium.make, which a restored state knows nothing of."""
    env = gymnasium.make("NFD/World-v0", world=endless_world, device="cpu", precision="fp32")
    env.unwrapped.max_episode_steps = 3  # type: ignore[attr-defined]
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(2)] == [False, False]
    state = env.unwrapped.save_state()  # type: ignore[attr-defined]
    env.reset()
    env.unwrapped.restore_state(state)  # type: ignore[attr-defined]
    assert env.step(0)[3]


def test_an_ended_episode_must_be_reset(tiny_world: Path) -> None:
    env = make(tiny_world, max_episode_steps=2)
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    while not any(env.step(0)[2:4]):
        pass
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset()
    env.step(0)


@pytest.mark.parametrize(
    "action", [2, np.int64(2), np.array(2), np.array([2]), torch.tensor(2), torch.tensor([2])]
)
def test_forms_of_an_action(endless_world: Path, action: Any) -> None:
    env, expected = make(endless_world), make(endless_world)
    env.reset(seed=0), expected.reset(seed=0)
    assert np.array_equal(env.step(action)[0], expected.step(2)[0])


@pytest.mark.parametrize("seed", [np.int64(3), np.array(3), 3])
def test_forms_of_a_seed(endless_world: Path, seed: Any) -> None:
    env, expected = make(endless_world), make(endless_world)
    assert np.array_equal(env.reset(seed=seed)[0], expected.reset(seed=3)[0])
    assert env.np_random.random() == expected.np_random.random()


def test_its_seed_repeats_it(endless_world: Path) -> None:
    env, again = make(endless_world), make(endless_world)
    assert env.np_random_seed == -1
    observation, _ = env.reset()  # a fresh seed
    assert np.array_equal(again.reset(seed=env.np_random_seed)[0], observation)
    env.reset(seed=7)
    env.reset()
    assert env.np_random_seed == 7


@pytest.mark.parametrize("action", [3, -1, 1.0, [0, 1], [[1]], None, "left", [[1], [0, 1]]])
def test_wrong_actions(endless_world: Path, action: Any) -> None:
    env = make(endless_world)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        env.step(action)


def test_options(endless_world: Path) -> None:
    env = make(endless_world, obs_type="latent")
    observation, _ = env.reset(seed=0, options={"start": 3})
    assert np.array_equal(observation, env.world.starts[3].latents[-1].numpy())
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    observation, _ = env.reset(options={"context": {"frames": frames, "actions": [1]}})
    assert observation in env.observation_space
    with pytest.raises(ValueError, match="unknown reset option"):
        env.reset(options={"bogus": 1})


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_returned_observations_belong_to_the_caller(endless_world: Path, output: str) -> None:
    env, untouched = make(endless_world, output=output), make(endless_world)
    observation, expected = env.reset(seed=0)[0], untouched.reset(seed=0)[0]
    for action in (0, 1, 2, 1):
        assert isinstance(observation, torch.Tensor if output == "torch" else np.ndarray)
        assert np.array_equal(np.asarray(observation), expected)
        observation[:] = 0
        observation, expected = env.step(action)[0], untouched.step(action)[0]


def test_saved_states(tiny_world: Path) -> None:
    env = make(tiny_world, obs_type="latent")
    first, _ = env.reset(seed=0)
    state = env.save_state()
    ahead = [env.step(1)[:4] for _ in range(3)]
    assert np.array_equal(env.restore_state(state), first)
    for expected in ahead:
        made = env.step(1)[:4]
        assert np.array_equal(made[0], expected[0]) and made[1:] == expected[1:]


def test_keys(tiny_world: Path) -> None:
    assert make(tiny_world).get_keys_to_action() == {("d",): 1, ("a",): 2}


def test_keys_of_actions_with_several_numbers() -> None:
    env = make("CarRacing", obs_type="latent")
    meant = env.get_keys_to_action()
    assert {keys for keys in meant if len(keys) == 1} == {("a",), ("d",), ("s",), ("w",)}
    assert meant["a",].tolist() == [-1, 0, 0] and meant["a", "w"].tolist() == [-1, 1, 0]
    assert ("a", "d") not in meant
    env.reset(seed=0)
    env.step(meant["s",])
    assert all(action in env.action_space for action in meant.values())


@pytest.mark.parametrize("space", ["MultiBinary", "MultiDiscrete"])
def test_keys_of_several_choices(make_world: Callable[..., Path], space: str) -> None:
    sizes = {"n": 3} if space == "MultiBinary" else {"nvec": [3, 2], "start": [0, 5]}
    env = make(make_world(action_space={"type": space, **sizes}), obs_type="latent")
    env.reset(seed=0)
    meant = env.get_keys_to_action()
    assert len(meant) >= 2 and all(action in env.action_space for action in meant.values())
    env.step(meant["d",])
    assert np.count_nonzero(meant["d",] - resting_action(env.action_space)) == 1


def test_arguments_reach_the_vector_env(tiny_world: Path) -> None:
    env = make(tiny_world, sampling_steps=3, frame_skip=2, max_episode_steps=9, output="torch")
    vector = env.vector
    assert vector.sampling.steps == 3 and vector.frame_skip == 2
    assert vector.max_episode_steps == 9 and vector.output == "torch"
    with pytest.raises(ValueError, match="frame_skip"):
        make(tiny_world, frame_skip=0)


def test_a_bad_seed(tiny_world: Path) -> None:
    env = make(tiny_world)
    with pytest.raises(Exception, match="[Ss]eed"):
        env.reset(seed=-1)


@pytest.mark.parametrize("seed", [[1], np.array([3]), (1,), 1.0, "1", -1, np.array(1.5)])
def test_what_is_no_seed_changes_nothing(tiny_world: Path, seed: Any) -> None:
    env, twin = make(tiny_world), make(tiny_world)
    env.reset(seed=4), twin.reset(seed=4)
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=seed)
    assert np.array_equal(env.step(1)[0], twin.step(1)[0])


def test_seeds_of_numpy_and_torch_are_seeds(tiny_world: Path) -> None:
    env = make(tiny_world)
    first = env.reset(seed=3)[0]
    for seed in (np.int8(3), np.array(3), torch.tensor(3)):
        assert np.array_equal(env.reset(seed=seed)[0], first)
