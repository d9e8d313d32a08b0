"""The EnvBase of TorchRL."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as D
from torch import nn

from nfd_env.envs.vector_env import NFDVectorEnv

pytest.importorskip("torchrl")
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs
from torchrl.modules import (
    IndependentNormal,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from nfd_env.torchrl import TorchRLEnv
from tests.clients.action_spaces import ACTION_SPACES

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_specs(tiny_world: Path, obs_type: str) -> None:
    check_env_specs(TorchRLEnv(tiny_world, 3, obs_type=obs_type, **CPU), seed=0)


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_every_action_space(make_world: Callable[..., Path], name: str) -> None:
    env = TorchRLEnv(make_world(action_space=ACTION_SPACES[name]), 3, obs_type="latent", **CPU)
    check_env_specs(env, seed=0)
    taken: list[np.ndarray] = []
    step = env.env.step
    env.env.step = lambda actions: step(taken.append(actions.numpy().copy()) or actions)
    batch = env.rollout(30, break_when_any_done=False)
    seen, space = np.concatenate(taken), env.env.single_action_space
    assert all(space.contains(row.astype(space.dtype)) for row in seen)
    if isinstance(space, spaces.Discrete):
        assert set(seen) == {int(space.start) + i for i in range(3)}
        assert set(batch["action"].flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_every_action_space_learns(make_world: Callable[..., Path], name: str) -> None:
    """Through TorchRL's own collector and loss."""
    env = TorchRLEnv(make_world(action_space=ACTION_SPACES[name]), 3, obs_type="latent", **CPU)
    actor = _actor(env)
    critic = ValueOperator(nn.Sequential(nn.Flatten(-3), nn.Linear(96, 1)), ["observation"])
    loss = ClipPPOLoss(actor, critic)
    optimiser = torch.optim.Adam(loss.parameters(), 1e-3)
    collector = Collector(env, actor, frames_per_batch=24, total_frames=48)
    before = [p.detach().clone() for p in actor.parameters()]
    for batch in collector:
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(batch)
        losses = loss(batch.reshape(-1))
        total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        assert torch.isfinite(total)
    collector.shutdown()
    assert any(not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))


def _actor(env: TorchRLEnv) -> ProbabilisticActor:
    """A linear policy with the distribution that fits the action spec."""
    spec = env.action_spec_unbatched
    arguments: dict[str, Any] = {}
    width, kind, keys = spec.shape[-1] if spec.shape else spec.n, D.Categorical, ["logits"]
    if isinstance(spec, MultiCategorical):
        # Independent choices: TorchRL has no distribution of its own for them.
        width, kind, arguments = int(spec.nvec.sum()), Choices, {"nvec": spec.nvec.tolist()}
    elif isinstance(spec, Binary):
        kind = Switches
    elif not isinstance(spec, Categorical):
        kind, keys, bounds = TanhNormal, ["loc", "scale"], spec.space
        if isinstance(spec, Bounded):
            arguments = {"low": bounds.low.float(), "high": bounds.high.float()}
        else:
            kind = IndependentNormal
    layers: list[nn.Module] = [nn.Flatten(-3), nn.Linear(96, width * len(keys))]
    if len(keys) == 2:
        layers.append(NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(nn.Sequential(*layers), ["observation"], keys),
        in_keys=keys,
        spec=spec,
        distribution_class=kind,
        distribution_kwargs=arguments,
        return_log_prob=True,
    )


class Choices(D.Distribution):
    """Several categorical choices from one row of logits."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, logits: torch.Tensor, nvec: list[int]) -> None:
        self.parts = [D.Categorical(logits=part) for part in logits.split(nvec, -1)]
        super().__init__(logits.shape[:-1], torch.Size([len(nvec)]), validate_args=False)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        return torch.stack([part.mode for part in self.parts], -1)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return torch.stack([part.sample(sample_shape) for part in self.parts], -1)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.parts, value.unbind(-1), strict=True)
        return sum((part.log_prob(chosen) for part, chosen in pairs), torch.zeros(()))

    def entropy(self) -> torch.Tensor:
        return sum((part.entropy() for part in self.parts), torch.zeros(()))


class Switches(D.Independent):
    """Several switches from one row of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(D.Bernoulli(logits=logits), 1)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return super().sample(sample_shape).to(torch.int8)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return super().log_prob(value.float())


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
    following = env.set_seed(3)
    for some in ([None, 3], [3, None], torch.tensor([3, 4]), np.array([3, 4])):
        assert env.set_seed(some) == following and env.set_seed(some, static_seed=True) == 3
        env.reset()
        assert 3 in env.env.np_random_seed
    assert env.set_seed() is None


def test_options(tiny_world: Path) -> None:
    env = TorchRLEnv(tiny_world, 2, **CPU)
    observation = env.reset(options={"start": 2})["observation"]
    assert torch.equal(observation[0], observation[1])


def test_bad_input(tiny_world: Path) -> None:
    with pytest.raises(ValueError, match="TorchRL decides on output"):
        TorchRLEnv(tiny_world, output="numpy")
    with pytest.raises(ValueError, match="obs_type must be one of"):
        TorchRLEnv(tiny_world, obs_type="sound")
    for options in (5, [], "x"):
        with pytest.raises(ValueError, match="options must be a dict"):
            TorchRLEnv(tiny_world, **CPU).reset(options=options)


@pytest.mark.parametrize("seed", [-1, "a", 1.0, True])
def test_bad_seeds(tiny_world: Path, seed: Any) -> None:
    env, twin = TorchRLEnv(tiny_world, 2, **CPU), TorchRLEnv(tiny_world, 2, **CPU)
    for each in (env, twin):
        each.set_seed(4)
    with pytest.raises(ValueError, match=r"seeds? must (not be negative|be a whole number)"):
        env.set_seed(seed)
    assert torch.equal(env.reset()["observation"], twin.reset()["observation"])


def test_closing_closes_the_vector_env(tiny_world: Path) -> None:
    env = TorchRLEnv(tiny_world, 2, **CPU)
    env.reset()
    env.close()
    assert env.is_closed and env.env.closed
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        env.reset()
    env.close()  # once more does no harm


def test_without_torchrl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl.envs", None)
    monkeypatch.delitem(sys.modules, "nfd_env.torchrl")
    with pytest.raises(ImportError, match=r"pip install 'nfd-env\[torchrl\]'"):
        importlib.import_module("nfd_env.torchrl")
