"""The VecEnv of Stable-Baselines3."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from nfd_env.envs.vector_env import NFDVectorEnv

pytest.importorskip("stable_baselines3")
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecMonitor

from nfd_env.sb3 import SB3VecEnv, make_vec_env
from tests.clients.action_spaces import ACTION_SPACES, FINITE

ID = "NFD/World-v0"
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def native(world: Path, num_envs: int = 3, **kwargs: Any) -> NFDVectorEnv:
    return NFDVectorEnv(
        world, num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **{**CPU, **kwargs}
    )


def make(world: Path, n_envs: int = 3, seed: int | None = 0, **kwargs: Any) -> Any:
    return make_vec_env(ID, n_envs, seed, env_kwargs={"world": world, **CPU, **kwargs})


@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_the_single_env_passes_the_checker(endless_world: Path, obs_type: str) -> None:
    env = gymnasium.make(
        ID, world=endless_world, obs_type=obs_type, max_episode_steps=10, **CPU
    ).unwrapped
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="stable_baselines3")
        warnings.filterwarnings("ignore", message="The minimal resolution")  # of a tiny world
        warnings.filterwarnings("ignore", message="It seems that your observation .*image")
        check_env(env)


def test_actions_are_given_before_they_are_waited_for(tiny_world: Path) -> None:
    venv = make(tiny_world, 2)
    venv.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        venv.step_wait()
    venv.step_async(np.zeros(2, np.int64))
    venv.step_wait()
    with pytest.raises(RuntimeError, match="step_async"):
        venv.step_wait()  # not the same ones again


@pytest.mark.parametrize("wrong", [2, -3, True, 0.5, "0"])
def test_environments_that_there_are_not(tiny_world: Path, wrong: Any) -> None:
    venv = make(tiny_world, 2)
    for call in (
        lambda: venv.get_attr("num_envs", [wrong]),
        lambda: venv.set_attr("spec", None, [0, 1, wrong]),
        lambda: venv.env_method("close", indices=[wrong]),
        lambda: venv.env_is_wrapped(gymnasium.Wrapper, [wrong]),
    ):
        with pytest.raises(IndexError, match="there are 2"):
            call()
    assert venv.get_attr("num_envs", [-1]) == [2]
    venv.reset()  # nothing was closed


def test_it_does_what_the_vector_env_does(tiny_world: Path) -> None:
    env, venv = native(tiny_world, max_episode_steps=7), make(tiny_world, max_episode_steps=7)
    assert np.array_equal(env.reset(seed=0)[0], venv.reset())
    terminations = truncations = 0
    for actions in np.random.default_rng(0).integers(0, 3, (30, 3)):
        observation, reward, terminated, truncated, info = env.step(actions)
        seen, rewards, dones, infos = venv.step(actions)
        assert np.array_equal(seen, observation)
        assert rewards.dtype == np.float32 and np.allclose(rewards, reward)
        assert np.array_equal(dones, terminated | truncated)
        for i, row in enumerate(infos):
            assert row["hazard"] == info["hazard"][i]
            assert row["TimeLimit.truncated"] == (truncated[i] and not terminated[i])
            assert ("terminal_observation" in row) == dones[i] == ("episode" in row)
            if dones[i]:
                assert np.array_equal(row["terminal_observation"], info["final_obs"][i])
                assert not np.array_equal(row["terminal_observation"], seen[i])
        terminations += int(terminated.sum())
        truncations += int((truncated & ~terminated).sum())
    assert terminations and truncations


def test_the_monitor_counts_whole_episodes(endless_world: Path, tmp_path: Path) -> None:
    venv = make_vec_env(
        ID,
        2,
        seed=0,
        monitor_dir=str(tmp_path / "logs"),
        env_kwargs={"world": endless_world, "max_episode_steps": 5, **CPU},
    )
    assert isinstance(venv, VecMonitor)
    venv.reset()
    total = np.zeros(2)
    for step in range(10):
        _, rewards, dones, infos = venv.step(np.array([1, 2]))
        total += rewards
        assert dones.all() == (step in (4, 9))
        if dones.all():
            assert [info["episode"]["l"] for info in infos] == [5, 5]
            assert np.allclose([info["episode"]["r"] for info in infos], total, atol=1e-4)
            total[:] = 0
    venv.close()
    assert len((tmp_path / "logs" / "monitor.csv").read_text().splitlines()) == 2 + 4


@pytest.mark.parametrize("how", [copy.deepcopy, pickle, cloudpickle], ids=lambda x: x.__name__)
def test_a_copy_goes_on_as_the_original_does(tiny_world: Path, tmp_path: Path, how: Any) -> None:
    def copied(env: Any) -> Any:
        return how(env) if callable(how) else how.loads(how.dumps(env))

    venv = make(tiny_world, max_episode_steps=4)
    venv.reset()
    venv.step(np.array([0, 1, 2]))
    other = copied(venv)
    for _ in range(4):
        mine, its = venv.step(np.array([0, 1, 2])), other.step(np.array([0, 1, 2]))
        assert all(np.array_equal(a, b) for a, b in zip(mine[:3], its[:3], strict=True))
        assert [i.get("episode", {}).get("r") for i in mine[3]] == [
            i.get("episode", {}).get("r") for i in its[3]
        ]
    assert np.array_equal(venv.episode_lengths, other.episode_lengths)
    assert other.get_attr("num_envs") == [3, 3, 3]
    written = make_vec_env(ID, 1, 0, str(tmp_path), env_kwargs={"world": tiny_world, **CPU})
    with pytest.raises(TypeError, match="without monitor_dir"):
        copied(written)
    written.close()


def test_seeds(tiny_world: Path) -> None:
    venv = make(tiny_world, seed=4)
    first = venv.reset()
    assert np.array_equal(first, native(tiny_world).reset(seed=4)[0])
    again = venv.reset()  # seeds are used once
    venv.seed(4)
    assert np.array_equal(venv.reset(), first) and not np.array_equal(again, first)


def test_options_are_used_once(tiny_world: Path) -> None:
    venv, env = make(tiny_world), native(tiny_world)
    venv.set_options({"start": 2})
    started = venv.reset()
    assert np.array_equal(started, env.reset(seed=0, options={"start": 2})[0])
    assert np.array_equal(started[0], started[1])
    assert not np.array_equal(venv.reset(), started)


def test_every_environment_has_its_own_options(tiny_world: Path) -> None:
    venv, env = make(tiny_world), native(tiny_world)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    context = {"frames": frames, "actions": np.array([1])}
    starts = {s: env.reset(seed=0, options={"start": s})[0][0] for s in (1, 3)}
    own = env.reset(seed=0, options={"context": [None, context, None]})[0][1]
    venv.set_options([{"start": 3}, {"context": context}, {"start": 1}])
    observation = venv.reset()
    assert np.array_equal(observation[0], starts[3])
    assert np.array_equal(observation[1], own)
    assert np.array_equal(observation[2], starts[1])
    plain = env.reset(seed=0)[0]
    venv.seed(0)
    venv.set_options([{}, {"start": 3}, {}])
    observation = venv.reset()
    assert np.array_equal(observation[[0, 2]], plain[[0, 2]])


def test_bad_options(tiny_world: Path) -> None:
    venv = make(tiny_world)
    venv.set_options({"speed": 3})
    with pytest.raises(ValueError, match="unknown reset option 'speed'"):
        venv.reset()
    venv.set_options([{"start": 1, "context": {"frames": []}}, {}, {}])
    with pytest.raises(ValueError, match="either the reset option context or start"):
        venv.reset()
    venv.reset()  # the bad options are gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 99}, "start must be from 0 to .* got 99"),
        ({"start": "x"}, "start must be from 0 to .* got 'x'"),
        ({"start": True}, "start must be from 0 to .* got True"),
        ({"start": [0]}, r"start must be from 0 to .* got \[0\]"),
        ([{"start": 0}, {"start": 99}, {}], "start must be from 0 to .* got 99"),
        ([{"start": 1}, {"start": True}, {}], "start must be from 0 to .* got True"),
        ([{"start": 0}, {"context": {"frames": []}}, {}], "context frames must have shape"),
        ([{"start": 0}, {}], "2 options were given for 3 environments"),
        ([{"start": 0}, {}, 7], "the options of an environment are a dict, got 7"),
        ({"reset_mask": [True] * 3}, "unknown reset option 'reset_mask'"),
        (5, "options must be a dict or a list of them, got 5"),
        ("x", "options must be a dict or a list of them, got 'x'"),
    ],
)
def test_refused_options_change_nothing(tiny_world: Path, options: Any, message: str) -> None:
    venv, twin = make(tiny_world, seed=3), make(tiny_world, seed=3)
    for env in (venv, twin):
        env.reset()

    def refused() -> None:
        with pytest.raises(ValueError, match=message):
            venv.set_options(options)
            venv.reset()

    def both_step() -> None:
        (seen, *_), (expected, *_) = (env.step(np.array([0, 1, 2])) for env in (venv, twin))
        assert np.array_equal(seen, expected)

    refused()
    both_step()
    for env in (venv, twin):
        env.seed(8)
    refused()  # the seed is still to be used
    assert np.array_equal(venv.reset(), twin.reset())
    both_step()


def test_refused_options_before_the_first_reset(tiny_world: Path) -> None:
    venv = make(tiny_world, seed=3)
    venv.set_options([{"start": 1}, {"start": 99}, {}])
    with pytest.raises(ValueError, match="start must be from 0 to"):
        venv.reset()
    assert np.array_equal(venv.reset(), native(tiny_world).reset(seed=3)[0])


@pytest.mark.parametrize("seed", [-1, True, 1.0, "a"])
def test_bad_seeds(tiny_world: Path, seed: Any) -> None:
    venv = make(tiny_world, seed=3)
    with pytest.raises(ValueError, match="seed"):
        venv.seed(seed)
    assert np.array_equal(venv.reset(), native(tiny_world).reset(seed=3)[0])


def test_a_start_leaves_out_no_episode(tiny_world: Path) -> None:
    venv, env = make(tiny_world, 4, seed=3, context_observations=1), native(tiny_world, 4)
    venv.reset()
    env.reset(seed=3)
    venv.set_options([{"start": 0}, {"start": 1}, {"start": 2}, {}])
    observation = venv.reset()
    assert venv.unwrapped.env.unwrapped._now.episodes == [1] * 4
    assert all("context" in infos for infos in venv.unwrapped.reset_infos)
    expected: Any = None
    for row, options in enumerate(({"start": 0}, {"start": 1}, {"start": 2}, {})):
        expected, _ = env.reset(options={**options, "reset_mask": np.arange(4) == row})
    assert np.array_equal(observation, expected)
    for actions in np.random.default_rng(0).integers(0, 3, (5, 4)):
        (seen, *_), (expected, *_) = venv.step(actions), env.step(actions)
        assert np.array_equal(seen, expected)
    # One start for all is one reset of the vector env.
    venv.set_options({"start": 2})
    assert np.array_equal(venv.reset(), env.reset(options={"start": 2})[0])
    for actions in np.random.default_rng(1).integers(0, 3, (5, 4)):
        (seen, *_), (expected, *_) = venv.step(actions), env.step(actions)
        assert np.array_equal(seen, expected)


@pytest.mark.parametrize("seeded", [False, True])
def test_own_starts_at_the_first_reset(tiny_world: Path, seeded: bool) -> None:
    env = native(tiny_world, 3)
    venv = SB3VecEnv(native(tiny_world, 3))
    if seeded:
        venv.seed(3)
    venv.set_options([{"start": 2}, {}, {"start": 1}])
    observation = venv.reset()
    assert venv.env._now.episodes == [0] * 3
    seeds = list(venv.env.np_random_seed)
    assert not seeded or seeds == [3, 4, 5]
    expected = env.reset(seed=seeds)[0]
    for row, start in ((0, 2), (2, 1)):
        mask = np.arange(3) == row
        expected, _ = env.reset(seed=seeds, options={"start": start, "reset_mask": mask})
    assert np.array_equal(observation, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"autoreset_mode": AutoresetMode.NEXT_STEP}, "SAME_STEP"),
        ({"output": "torch"}, 'output="numpy"'),
    ],
)
def test_vector_envs_that_sb3_cannot_take(
    tiny_world: Path, kwargs: dict[str, Any], message: str
) -> None:
    arguments = {"autoreset_mode": AutoresetMode.SAME_STEP, **CPU, **kwargs}
    with pytest.raises(ValueError, match=message):
        SB3VecEnv(NFDVectorEnv(tiny_world, 2, **arguments))


def test_pictures(tiny_world: Path) -> None:
    venv = make(tiny_world, render_mode="rgb_array", obs_type="latent")
    venv.reset()
    images = venv.get_images()
    assert [image.shape for image in images] == [(32, 48, 3)] * 3
    assert venv.render().shape == (64, 96, 3)
    assert venv.get_attr("frame_skip", [0, 2]) == [1, 1]
    assert np.array_equal(venv.env_method("render", indices=1)[0], images)


def test_attributes_belong_to_all(tiny_world: Path) -> None:
    venv = make(tiny_world)
    venv.set_attr("max_episode_steps", 2)
    assert venv.get_attr("max_episode_steps") == [2, 2, 2]
    assert venv.has_attr("obs_type") and not venv.has_attr("no_such_thing")
    with pytest.raises(ValueError, match="for all environments together"):
        venv.set_attr("max_episode_steps", 3, indices=[0])
    venv.reset()
    venv.step(np.zeros(3, int))
    assert venv.step(np.zeros(3, int))[2].all()


def test_stacked_latents_learn(tiny_world: Path) -> None:
    venv = VecFrameStack(make(tiny_world, obs_type="latent"), 3, channels_order="first")
    assert venv.observation_space.shape == (12, 4, 6)
    model = PPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(24)
    mean, _ = evaluate_policy(model, venv, n_eval_episodes=3)
    assert np.isfinite(mean)


def test_stacked_frames_learn(tiny_world: Path) -> None:
    venv = VecFrameStack(make(tiny_world), 2)
    assert venv.observation_space.shape == (32, 48, 6)
    PPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(24)


@pytest.mark.parametrize("name", FINITE)
def test_every_action_space_learns(make_world: Callable[..., Path], name: str) -> None:
    world = make_world(action_space=ACTION_SPACES[name])
    venv = make(world, obs_type="latent", max_episode_steps=6)
    native_space = native(world).single_action_space
    taken: list[np.ndarray] = []
    inner = venv.unwrapped.env
    step = inner.step
    inner.step = lambda actions: step(taken.append(np.array(actions)) or actions)
    model = PPO("MlpPolicy", venv, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    model.learn(48)
    seen = np.concatenate(taken)
    assert all(native_space.contains(row.astype(native_space.dtype)) for row in seen)
    # The buffer is left in the order of the environments.
    kept = model.rollout_buffer.actions.reshape(3, 16, -1).swapaxes(0, 1).reshape(48, -1)
    if native_space.dtype.kind == "i":  # all the choices there are, each by its own number
        start = np.asarray(getattr(native_space, "start", 0))
        assert np.array_equal(seen.reshape(48, -1), kept + start)
        assert len(np.unique(seen, axis=0)) >= 3
    mean, _ = evaluate_policy(model, venv, n_eval_episodes=3)
    assert np.isfinite(mean)


@pytest.mark.parametrize("name", ["box", "box-float64", "box-uint8"])
def test_off_policy_learns(make_world: Callable[..., Path], name: str) -> None:
    venv = make(make_world(action_space=ACTION_SPACES[name]), obs_type="latent")
    SAC("MlpPolicy", venv, buffer_size=60, learning_starts=6, batch_size=4, device="cpu").learn(12)


@pytest.mark.parametrize("name", ["discrete", "discrete-from-4", "discrete-from-minus-2"])
def test_q_learning_learns(make_world: Callable[..., Path], name: str) -> None:
    venv = make(make_world(action_space=ACTION_SPACES[name]), obs_type="latent")
    DQN("MlpPolicy", venv, buffer_size=60, learning_starts=6, batch_size=4, device="cpu").learn(30)


@pytest.mark.parametrize("name", ["box-infinite", "box-half-infinite"])
def test_stable_baselines3_refuses_infinite_boxes(
    make_world: Callable[..., Path], name: str
) -> None:
    venv = make(make_world(action_space=ACTION_SPACES[name]), obs_type="latent")
    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        PPO("MlpPolicy", venv)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_its_own_processes(tiny_world: Path, start_method: str) -> None:
    # "nfd_env:" registers the id in the new process.
    make_one = partial(gymnasium.make, f"nfd_env:{ID}", world=tiny_world, obs_type="latent", **CPU)
    venv = SubprocVecEnv([make_one] * 2, start_method=start_method)
    try:
        venv.seed(3)
        observation = venv.reset()
        alone = gymnasium.make(ID, world=tiny_world, obs_type="latent", **CPU)
        assert np.array_equal(observation[0], alone.reset(seed=3)[0])
        observation, rewards, *_ = venv.step(np.array([1, 2]))
        first = alone.step(1)
        assert np.array_equal(observation[0], first[0]) and rewards[0] == np.float32(first[1])
    finally:
        venv.close()


def test_without_stable_baselines3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env", None)
    monkeypatch.delitem(sys.modules, "nfd_env.sb3")
    with pytest.raises(ImportError, match=r"pip install 'nfd-env\[sb3\]'"):
        importlib.import_module("nfd_env.sb3")
