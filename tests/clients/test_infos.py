"""Infos and attributes as real clients ask for them: TorchRL, Minari, skrl, Atari wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from nfd_env.envs.vector_env import NFDVectorEnv

ID = "nfd_env:NFD/World-v0"
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
SETTINGS: list[dict[str, Any]] = [{}, {"ood": True}, {"speculative_frames": 2}]


def flat(info: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in info.items():
        inner = isinstance(value, dict)
        entries |= flat(value, f"{prefix}{key}/") if inner else {f"{prefix}{key}": value}
    return entries


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_keys_and_numpy_types_at_reset_and_step(
    tiny_world: Path, settings: dict[str, Any]
) -> None:
    env = gymnasium.make(ID, world=tiny_world, **settings, **CPU)
    first = flat(env.reset(seed=0)[1])
    later = flat(env.step(1)[4])
    assert first and first.keys() == later.keys()
    for key, value in first.items():
        assert isinstance(value, np.generic | np.ndarray), key
        assert isinstance(later[key], np.generic | np.ndarray), key
        assert (value.dtype, value.shape) == (later[key].dtype, later[key].shape), key
    vector = NFDVectorEnv(tiny_world, 3, **settings, **CPU)
    first = flat(vector.reset(seed=0)[1])
    later = flat(vector.step(np.zeros(3, int))[4])
    assert first.keys() == later.keys()
    for key, value in first.items():
        assert (value.dtype, value.shape) == (later[key].dtype, later[key].shape), key
        assert value.shape[0] == 3, key


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_torchrl_registers_infos(tiny_world: Path, settings: dict[str, Any], batched: bool) -> None:
    pytest.importorskip("torchrl", reason="needs pip install 'nfd-env[torchrl]'")
    from torchrl.envs import GymWrapper

    if batched:
        made: Any = NFDVectorEnv(tiny_world, 2, autoreset_mode="Disabled", **settings, **CPU)
    else:
        made = gymnasium.make(ID, world=tiny_world, **settings, **CPU)
    env = GymWrapper(made).auto_register_info_dict()
    env.set_seed(0)
    batch = env.rollout(6, break_when_any_done=False)
    hazard = batch["next", "hazard"]
    assert hazard.shape[: batch.ndim] == batch.batch_size == ((2, 6) if batched else (6,))
    assert (hazard > 0).all()


def test_minari_records_infos(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax", reason="needs pip install 'nfd-env[minari]'")
    minari = pytest.importorskip("minari", reason="needs pip install 'nfd-env[minari]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make(ID, world=str(tiny_world), max_episode_steps=4, ood=True, **CPU)
    collector = minari.DataCollector(env, record_infos=True)
    risks = []
    for episode in range(2):
        collector.reset(seed=episode)
        for _ in range(4):
            *_, ended, cut, info = collector.step(1)
            risks.append(info["hazard"])
            if ended or cut:
                break
    dataset = collector.create_dataset("nfd/tiny-v0", algorithm_name="still", eval_env=env.spec)
    recorded = [episode.infos["hazard"] for episode in dataset.iterate_episodes()]
    assert np.allclose(np.concatenate([each[1:] for each in recorded]), risks)
    assert all("ood" in episode.infos for episode in dataset.iterate_episodes())
    collector.close()


def test_skrl_knows_the_vector_env_and_renders_through_it(tiny_world: Path) -> None:
    pytest.importorskip("skrl", reason="needs pip install 'nfd-env[skrl]'")
    import torch
    from skrl.envs.wrappers.torch import wrap_env

    made = NFDVectorEnv(tiny_world, 2, render_mode="rgb_array", obs_type="features", **CPU)
    env = wrap_env(made, verbose=False)
    assert type(env).__name__ == "GymnasiumWrapper"
    env.reset()
    _, reward, *_ = env.step(torch.tensor([[1], [2]]))
    assert reward.shape == (2, 1)
    frames = env.render()
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 2


def test_attributes_by_name(tiny_world: Path) -> None:
    env = NFDVectorEnv(tiny_world, 2, render_mode="rgb_array", **CPU)
    env.reset(seed=0)
    assert [frame.shape for frame in env.call("render")] == [(32, 48, 3)] * 2
    assert len(env.get_attr("frame_skip")) == 2


def test_atari_wrappers_go_on(tiny_world: Path) -> None:
    """Stable-Baselines3's wrappers, which CleanRL uses too, ask for what the actions mean."""
    pytest.importorskip("stable_baselines3", reason="needs pip install 'nfd-env[sb3]'")
    from stable_baselines3.common.atari_wrappers import AtariWrapper, NoopResetEnv

    env = gymnasium.make(ID, world=tiny_world, **CPU)
    meanings = env.unwrapped.get_action_meanings()
    assert meanings[0] == "NOOP" and len(meanings) == 3
    assert all(name == name.upper() for name in meanings)
    wrapped = AtariWrapper(
        env, noop_max=3, frame_skip=2, screen_size=42, terminal_on_life_loss=False
    )
    observation, _ = wrapped.reset(seed=0)
    assert observation.shape == (42, 42, 1)
    observation, reward, *_ = wrapped.step(1)
    assert observation.shape == (42, 42, 1) and reward in (-1.0, 0.0, 1.0)
    assert NoopResetEnv(env).noop_action == 0


def test_frames_a_second_are_whole(tiny_world: Path, tmp_path: Path) -> None:
    env = gymnasium.make(ID, world=tiny_world, frame_skip=4, render_mode="rgb_array", **CPU)
    assert isinstance(env.metadata["render_fps"], int) and env.metadata["render_fps"] == 9


def test_actions_in_an_array_of_one(tiny_world: Path) -> None:
    """As Stable-Baselines3's predict hands them out for one environment."""
    one, other = (gymnasium.make(ID, world=tiny_world, **CPU) for _ in range(2))
    one.reset(seed=0), other.reset(seed=0)
    assert np.array_equal(one.step(np.array([1]))[0], other.step(1)[0])


def test_cleanrls_wrappers(tiny_world: Path) -> None:
    """The chain that CleanRL puts around every environment of its PPO, and its vector env."""

    def make() -> gymnasium.Env:
        env = gymnasium.make(ID, world=tiny_world, **CPU)
        env = gymnasium.wrappers.RecordEpisodeStatistics(env)
        env = gymnasium.wrappers.ResizeObservation(env, (84, 84))
        env = gymnasium.wrappers.GrayscaleObservation(env)
        return gymnasium.wrappers.FrameStackObservation(env, 4)

    envs = gymnasium.vector.SyncVectorEnv([make] * 2)
    observation, _ = envs.reset(seed=1)
    assert observation.shape == (2, 4, 84, 84)
    for _ in range(12):
        observation, reward, *_ = envs.step(np.array([0, 2]))
    assert np.isfinite(reward).all()
