"""The EnvBase of TorchRL."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nfd_env.envs.vector_env import NFDVectorEnv

pytest.importorskip("torchrl")
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from nfd_env.torchrl import TorchRLEnv

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
SPACES = [
    {"type": "Discrete", "n": 3, "start": 0},
    {"type": "Discrete", "n": 3, "start": 2},
    {"type": "MultiDiscrete", "nvec": [3, 2], "start": [0, 0]},
    {"type": "MultiBinary", "n": 4},
    {"type": "Box", "low": [-1.0, -1.0], "high": [1.0, 1.0]},
]


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s['type']}-{s.get('start')}")
@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_specs(make_world: Callable[..., Path], space: dict[str, Any], obs_type: str) -> None:
    env = TorchRLEnv(make_world(action_space=space), 3, obs_type=obs_type, **CPU)
    check_env_specs(env, seed=0)


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_torchrls_own_wrapper(tiny_world: Path, mode: str) -> None:
    env = GymWrapper(NFDVectorEnv(tiny_world, 3, autoreset_mode=mode, **CPU))
    check_env_specs(env, seed=0)
    assert env.rollout(12, break_when_any_done=False).batch_size == (3, 12)


def test_a_rollout_is_that_of_the_vector_env(tiny_world: Path) -> None:
    env = TorchRLEnv(tiny_world, 3, obs_type="latent", max_episode_steps=6, **CPU)
    env.set_seed(5)
    batch = env.rollout(25, break_when_any_done=False)
    assert batch.batch_size == (3, 25) and not batch["observation"].is_inference()
    native = NFDVectorEnv(
        tiny_world,
        3,
        obs_type="latent",
        output="torch",
        max_episode_steps=6,
        autoreset_mode="SameStep",
        **CPU,
    )
    expected, _ = native.reset(seed=5)
    ends = 0
    for step in range(25):
        now, after = batch[:, step], batch[:, step]["next"]
        torch.testing.assert_close(now["observation"], expected)
        expected, reward, terminated, truncated, info = native.step(now["action"])
        torch.testing.assert_close(after["reward"][:, 0], reward)
        torch.testing.assert_close(after["hazard"][:, 0], info["hazard"])
        assert torch.equal(after["terminated"][:, 0], terminated)
        assert torch.equal(after["truncated"][:, 0], truncated)
        assert torch.equal(after["done"][:, 0], terminated | truncated)
        if "final_obs" in info:
            torch.testing.assert_close(after["observation"], info["final_obs"])
        ends += int((terminated | truncated).sum())
    assert ends > 8


def test_playing_on_until_all_have_ended(hasty_world: Path) -> None:
    env = TorchRLEnv(hasty_world, 3, max_episode_steps=12, **CPU)
    env.set_seed(1)
    alone = env.rollout(14, break_when_any_done=False)
    env.set_seed(1)
    together = env.rollout(
        14,
        policy=lambda td: td.set("action", alone["action"][:, td["n"][0]]),
        auto_reset=False,
        tensordict=env.reset().set("n", torch.zeros(3, dtype=torch.int64)),
        break_when_any_done=False,
        break_when_all_done=True,
    )
    assert together["next", "done"][:, -1].all()
    assert len({int(row.int().argmax()) for row in together["next", "done"][..., 0]}) > 1


def test_seeds(tiny_world: Path) -> None:
    env = TorchRLEnv(tiny_world, 2, **CPU)

    def observe(seed: int) -> torch.Tensor:
        env.set_seed(seed)
        return env.reset()["observation"]

    assert torch.equal(observe(3), observe(3)) and not torch.equal(observe(3), observe(4))


def test_options(tiny_world: Path) -> None:
    env = TorchRLEnv(tiny_world, 2, **CPU)
    observation = env.reset(options={"start": 2})["observation"]
    assert torch.equal(observation[0], observation[1])


def test_bad_input(tiny_world: Path, make_world: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="TorchRL decides on output"):
        TorchRLEnv(tiny_world, output="numpy")
    with pytest.raises(ValueError, match="obs_type must be one of"):
        TorchRLEnv(tiny_world, obs_type="sound")
    shifted = {"type": "MultiDiscrete", "nvec": [3, 2], "start": [1, 0]}
    with pytest.raises(ValueError, match="counts actions from 0"):
        TorchRLEnv(make_world(action_space=shifted), **CPU)


def test_without_torchrl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl.envs", None)
    monkeypatch.delitem(sys.modules, "nfd_env.torchrl")
    with pytest.raises(ImportError, match=r"pip install 'nfd-env\[torchrl\]'"):
        importlib.import_module("nfd_env.torchrl")
