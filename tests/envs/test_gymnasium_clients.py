"""The programs that people will run the envs with."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from packaging import version

from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv

ID = "NFD/World-v0"
CPU = {"device": "cpu", "precision": "fp32"}


def test_make(tiny_world: Path) -> None:
    env = gymnasium.make(ID, world=tiny_world, **CPU)
    assert isinstance(env.unwrapped, NFDEnv)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, *_ = env.step(env.action_space.sample())
        assert observation in env.observation_space
    env.close()


def test_make_needs_a_world() -> None:
    with pytest.raises(TypeError, match="world"):
        gymnasium.make(ID)


def test_make_vec_makes_one_batched_model(tiny_world: Path) -> None:
    env = gymnasium.make_vec(ID, num_envs=3, world=tiny_world, **CPU)
    assert isinstance(env.unwrapped, NFDVectorEnv) and env.num_envs == 3
    env.reset(seed=0)
    observation, *_ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    env.close()


def test_make_vec_passes_its_arguments_on(tiny_world: Path) -> None:
    env = gymnasium.make_vec(
        ID,
        num_envs=2,
        world=str(tiny_world),
        autoreset_mode=AutoresetMode.SAME_STEP,
        max_episode_steps=7,
        **CPU,
    )
    assert env.unwrapped.max_episode_steps == 7
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_a_vector_env_of_single_envs_does_the_same(tiny_world: Path) -> None:
    """Gymnasium's own autoreset around the single env agrees with ours."""
    kwargs = {"max_episode_steps": 6, "obs_type": "latent", **CPU}
    native = NFDVectorEnv(tiny_world, 2, **kwargs)
    sync = SyncVectorEnv([lambda: NFDEnv(tiny_world, **kwargs)] * 2)
    acts = np.random.default_rng(0).integers(0, 3, (24, 2))
    left, right = native.reset(seed=3)[0], sync.reset(seed=3)[0]
    ends = 0
    for a in acts:
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)
        (left, *mine, info), (right, *theirs, expected) = native.step(a), sync.step(a)
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-3, atol=1e-4)
        assert np.array_equal(mine[1], theirs[1]) and np.array_equal(mine[2], theirs[2])
        np.testing.assert_allclose(info["hazard"], expected["hazard"], rtol=1e-3, atol=1e-4)
        ends += int((mine[1] | mine[2]).sum())
    assert ends >= 4


def test_a_fresh_process_needs_no_import(tiny_world: Path) -> None:
    program = f"""
import gymnasium
env = gymnasium.make("nfd_env:{ID}", world={str(tiny_world)!r}, device="cpu")
print(env.reset(seed=0)[0].shape, env.step(1)[0].dtype)
vector = gymnasium.make_vec("nfd_env:{ID}", num_envs=2, world={str(tiny_world)!r}, device="cpu")
print(vector.reset(seed=0)[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(32, 48, 3) uint8", "(2, 32, 48, 3)"]


SPACES = [
    {"type": "Discrete", "n": 3, "start": 0},
    {"type": "MultiBinary", "n": 4},
    {"type": "Box", "low": [-1.0, -1.0], "high": [1.0, 1.0]},
]


def harmless(message: str, unbounded: bool) -> bool:
    """Latents have no bounds, which is what the checker remarks on."""
    return unbounded and "A Box observation space" in message


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s["type"])
@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_check_env(make_world: Callable[..., Path], space: dict[str, Any], obs_type: str) -> None:
    world = make_world(action_space=space)
    env = gymnasium.make(ID, world=world, obs_type=obs_type, render_mode="rgb_array", **CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    messages = [str(w.message) for w in caught]
    assert [m for m in messages if not harmless(m, obs_type != "rgb")] == []


def test_the_passive_checker_is_content(tiny_world: Path) -> None:
    env = gymnasium.make(ID, world=tiny_world, render_mode="rgb_array", **CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        for _ in range(5):
            if any(env.step(env.action_space.sample())[2:4]):
                env.reset()
            env.render()


@pytest.mark.skipif(find_spec("moviepy") is None, reason="RecordVideo needs moviepy")
def test_record_video(endless_world: Path, tmp_path: Path) -> None:
    env = gymnasium.make(ID, world=endless_world, render_mode="rgb_array", **CPU)
    env = wrappers.RecordVideo(wrappers.TimeLimit(env, 5), str(tmp_path), lambda episode: True)
    env.reset(seed=0)
    while not any(env.step(0)[2:4]):
        pass
    env.close()
    assert [p.stat().st_size > 0 for p in tmp_path.glob("*.mp4")] == [True]


def test_record_episode_statistics(tiny_world: Path) -> None:
    env = wrappers.RecordEpisodeStatistics(
        gymnasium.make(ID, world=tiny_world, max_episode_steps=4, **CPU)
    )
    env.reset(seed=0)
    total, steps, ended = 0.0, 0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(1)
        total, steps, ended = total + reward, steps + 1, terminated or truncated
    assert info["episode"]["l"] == steps
    assert info["episode"]["r"] == pytest.approx(total)


def test_gymnasiums_time_limit_truncates_the_single_env(endless_world: Path) -> None:
    env = gymnasium.make(ID, world=endless_world, max_episode_steps=3, **CPU)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_record_episode_statistics(tiny_world: Path, mode: AutoresetMode) -> None:
    if mode == AutoresetMode.SAME_STEP and version.parse(gymnasium.__version__).release < (1, 4):
        pytest.skip("Gymnasium's own wrapper counts such episodes only since 1.4")
    plain = NFDVectorEnv(tiny_world, 3, max_episode_steps=6, autoreset_mode=mode, **CPU)
    env = wrappers.vector.RecordEpisodeStatistics(
        NFDVectorEnv(tiny_world, 3, max_episode_steps=6, autoreset_mode=mode, **CPU)
    )
    plain.reset(seed=0), env.reset(seed=0)
    total, length, ends = np.zeros(3), np.zeros(3, int), 0
    for a in np.random.default_rng(0).integers(0, 3, (20, 3)):
        _, reward, terminated, truncated, info = env.step(a)
        expected = plain.step(a)
        running = expected[4]["_hazard"]  # False on a reset step
        total, length = total + reward, length + running
        ended = terminated | truncated
        assert np.array_equal(ended, expected[2] | expected[3])
        if ended.any():
            ends += int(ended.sum())
            assert np.array_equal(info["_episode"], ended)
            np.testing.assert_allclose(info["episode"]["r"][ended], total[ended], rtol=1e-4)
            assert np.array_equal(info["episode"]["l"][ended], length[ended])
            total[ended], length[ended] = 0, 0
    assert ends > 6


def test_vector_wrappers(tiny_world: Path) -> None:
    env: Any = NFDVectorEnv(tiny_world, 2, render_mode="rgb_array", **CPU)
    env = wrappers.vector.GrayscaleObservation(env)
    env = wrappers.vector.ResizeObservation(env, (16, 24))
    env = wrappers.vector.ClipReward(env, -0.01, 0.01)
    env = wrappers.vector.RescaleObservation(env, 0.0, 1.0)
    env.reset(seed=0)
    observation, reward, *_ = env.step(env.action_space.sample())
    assert observation.shape == (2, 16, 24) and observation.max() <= 1
    assert np.abs(reward).max() <= 0.01
    assert len(env.render()) == 2


def test_single_wrappers(tiny_world: Path) -> None:
    env: Any = gymnasium.make(ID, world=tiny_world, **CPU)
    env = wrappers.FrameStackObservation(wrappers.GrayscaleObservation(env), 4)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (4, 32, 48)


def test_normalizing_vector_wrappers(endless_world: Path) -> None:
    env: Any = NFDVectorEnv(endless_world, 2, obs_type="latent", **CPU)
    env = wrappers.vector.NormalizeObservation(wrappers.vector.NormalizeReward(env))
    env.reset(seed=0)
    assert np.isfinite(env.step(np.array([0, 1]))[0]).all()


def test_play(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    from gymnasium.utils.play import play

    steps: list[int] = []

    def after_step(before, now, action, reward, terminated, truncated, info) -> None:
        steps.append(int(action))
        key, kind = (pygame.K_d, pygame.KEYDOWN) if len(steps) == 2 else (None, pygame.QUIT)
        if len(steps) == 2:
            pygame.event.post(pygame.event.Event(kind, key=key))
        if len(steps) == 5:
            pygame.event.post(pygame.event.Event(kind))

    env = gymnasium.make(ID, world=tiny_world, render_mode="rgb_array", **CPU)
    play(env, fps=200, noop=0, seed=0, callback=after_step)
    assert steps[:2] == [0, 0]
    assert steps[3:5] == [1, 1]  # the key "d" is held: right


def test_stable_baselines3(endless_world: Path) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    from stable_baselines3 import PPO

    env = gymnasium.make(ID, world=endless_world, max_episode_steps=10, **CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="stable_baselines3")
        warnings.filterwarnings("ignore", message="The minimal resolution")  # of a tiny world
        checker.check_env(env.unwrapped)
    agent = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    agent.learn(16)
    assert agent.predict(env.reset()[0])[0] in env.action_space


def test_torchrl(endless_world: Path) -> None:
    pytest.importorskip("torchrl")
    from torchrl.envs import GymEnv, GymWrapper
    from torchrl.envs.utils import check_env_specs

    check_env_specs(GymWrapper(NFDEnv(endless_world, **CPU)))
    env = GymEnv(ID, world=endless_world, obs_type="latent", **CPU)
    rollout = env.rollout(4)
    assert rollout["next", "observation"].shape == (4, 4, 4, 6)
