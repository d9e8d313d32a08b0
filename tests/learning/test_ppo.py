"""Rollouts, advantages and updates of the native PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.learning.ppo import Position, PPOConfig, gae, ppo_loss, rollout, update
from nfd_env.players.policy import ActorCritic, AgentSpec, PolicyConfig

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def make(world: Path, num_envs: int = 3, **kwargs: Any) -> tuple[Any, ActorCritic]:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"obs_type": "latent", "max_episode_steps": 6, **CPU, **kwargs}
    env = NFDVectorEnv(world, num_envs, output="torch", autoreset_mode="SameStep", **arguments)
    return env, ActorCritic(PolicyConfig(AgentSpec.of(env, 2), channels=8, width=16))


@pytest.mark.parametrize("obs_type", ["latent", "rgb"])
def test_a_rollout_is_what_was_played(tiny_world: Path, obs_type: str) -> None:
    env, policy = make(tiny_world, obs_type=obs_type)
    start = Position.start(env.reset(seed=2)[0], 2)
    batch, player = rollout(env, policy.act, start, 20)
    assert batch.batch_size == (20, 3) and batch["observation"].dtype == start.stack.dtype
    # The same actions again, step by step.
    observation, _ = env.reset(seed=2)
    total, ends = torch.zeros(3), 0
    values = torch.cat([batch["value"], policy.act(player.stack)[2][None]])
    for step in range(20):
        row = batch[step]
        assert torch.equal(row["observation"][:, -1], observation)
        observation, reward, terminated, truncated, info = env.step(row["action"])
        ended = terminated | truncated
        total += reward
        torch.testing.assert_close(row["reward"], reward)
        torch.testing.assert_close(row["hazard"], info["hazard"])
        assert torch.equal(row["ended"], ended)
        assert torch.equal(row["terminated"], terminated)
        torch.testing.assert_close(row["score"][ended], total[ended])
        assert row["score"][~ended].isnan().all()
        torch.testing.assert_close(row["next_value"][~ended], values[step + 1][~ended])
        if ended.any():
            # What ends an episode is valued as it was, not as the episode that follows.
            last = torch.stack([row["observation"][:, -1], info["final_obs"]], 1)
            expected = policy(last)[1]
            torch.testing.assert_close(row["next_value"][ended], expected[ended])
        total = total.masked_fill(ended, 0.0)
        ends += int(ended.sum())
    assert ends > 6
    assert torch.equal(player.stack[:, -1], observation)
    torch.testing.assert_close(player.score, total)


def test_rollouts_go_on_where_the_last_one_stopped(tiny_world: Path) -> None:
    env, policy = make(tiny_world)

    def act(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return policy.act(stack, greedy=True)

    player = Position.start(env.reset(seed=0)[0], 2)
    whole, _ = rollout(env, act, player, 16)
    player = Position.start(env.reset(seed=0)[0], 2)
    first, player = rollout(env, act, player, 7)
    second, _ = rollout(env, act, player, 9)
    both = torch.cat([first, second])
    for name in ("observation", "action", "reward", "score", "ended", "hazard", "value"):
        torch.testing.assert_close(both[name], whole[name], equal_nan=True)
    torch.testing.assert_close(both["next_value"], whole["next_value"])


def test_a_batch_keeps_what_the_policy_looks_at(tiny_world: Path) -> None:
    env, _ = make(tiny_world)
    config = PolicyConfig(AgentSpec.of(env, 5), channels=8, width=16, frame_offsets=[0, 3])
    policy = ActorCritic(config)
    player = Position.start(env.reset(seed=0)[0], 5)
    batch, player = rollout(env, policy.act, player, 12, policy.look)
    seen = batch["observation"]
    assert seen.shape == (12, 3, 2, 4, 4, 6)
    for step in range(3, 12):
        unbroken = ~batch["ended"][step - 3 : step].any(0)
        assert torch.equal(seen[step, unbroken, 0], seen[step - 3, unbroken, 1])
    assert torch.equal(policy.look(player.stack)[:, 1], player.stack[:, -1])
    update(policy, torch.optim.Adam(policy.parameters()), batch, PPOConfig(minibatch_size=12))


def test_episodes_begin_with_what_came_before_them(tiny_world: Path) -> None:
    env, _ = make(tiny_world, context_observations=2)
    policy = ActorCritic(PolicyConfig(AgentSpec.of(env, 3), channels=8, width=16))
    begun = [env.reset(seed=0)]
    step = env.step

    def watched(action: Tensor) -> Any:
        result = step(action)
        begun.append((result[0], result[-1]))
        return result

    env.step = watched
    player = Position.start(begun[0][0], 3, begun[0][1]["context"])
    batch, player = rollout(env, policy.act, player, 20)
    stacks = [*batch["observation"], player.stack]
    count = 0
    for stack, (observation, info) in zip(stacks, begun, strict=True):
        for row in np.flatnonzero(info["_context"]) if "context" in info else ():
            assert torch.equal(stack[row, :2], info["context"][row])
            assert torch.equal(stack[row, 2], observation[row])
            count += 1
    assert count > 6


def test_the_real_game_has_no_hazard_but_its_ends(counter_world: Path) -> None:
    env: Any = RealVectorEnv(counter_world, 2, obs_type="latent", output="torch", length=3, **CPU)
    policy = ActorCritic(PolicyConfig(AgentSpec.of(env, 2), channels=8, width=16))
    batch, _ = rollout(env, policy.act, Position.start(env.reset(seed=0)[0], 2), 6)
    assert batch["terminated"][:, 0].tolist() == [False, False, True] * 2
    assert torch.equal(batch["hazard"], batch["terminated"].float())


def reference_gae(
    reward: Tensor, value: Tensor, after: Tensor, termination: Tensor, ended: Tensor
) -> Tensor:
    """The definition: a sum of discounted errors up to the end of the episode."""
    steps, batch = reward.shape
    result = torch.zeros_like(reward)
    for b in range(batch):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                alive = 1 - float(termination[k, b])
                error = reward[k, b] + 0.9 * alive * after[k, b] - value[k, b]
                result[t, b] += weight * error
                weight *= 0.9 * 0.8 * alive
                if ended[k, b]:
                    break
    return result


@pytest.mark.parametrize("expected_ends", [False, True])
def test_advantages_by_definition(expected_ends: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value, after = torch.randn(3, 12, 4, generator=generator, dtype=torch.float64)
    ended = torch.rand(12, 4, generator=generator) < 0.3
    terminated = ended & (torch.rand(12, 4, generator=generator) < 0.6)
    hazard = torch.rand(12, 4, generator=generator, dtype=torch.float64) * 0.5
    termination = hazard if expected_ends else terminated.double()
    torch.testing.assert_close(
        gae(reward, value, after, termination, ended, 0.9, 0.8),
        reference_gae(reward, value, after, termination, ended),
    )


def test_hazard_has_the_mean_of_drawn_ends_without_their_variance() -> None:
    """One decision before an end that is drawn: same expected advantage, no luck."""
    count, hazard = 100_000, 0.2
    reward, value, after = (
        torch.ones(1, count),
        torch.full((1, count), 5.0),
        torch.full((1, count), 9.0),
    )
    ended = torch.rand(1, count, generator=torch.Generator().manual_seed(0)) < hazard
    drawn = gae(reward, value, after, ended.float(), ended, 0.99, 0.95)
    expected = gae(reward, value, after, torch.full((1, count), hazard), ended, 0.99, 0.95)
    assert drawn.mean() == pytest.approx(float(expected.mean()), abs=0.05)
    assert expected.std() < 1e-4 < 1 < drawn.std()


def test_everything_compiles_without_a_break(tiny_world: Path) -> None:
    env, policy = make(tiny_world)
    config = PPOConfig(rollout_steps=4, minibatch_size=6, epochs=2)
    batch, _ = rollout(env, policy.act, Position.start(env.reset(seed=0)[0], 2), 4)

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)

    state = {k: v.clone() for k, v in policy.state_dict().items()}
    results = []
    for loss_of, advantage_of in ((ppo_loss, gae), (compiled(ppo_loss), compiled(gae))):
        policy.load_state_dict(state)
        torch.manual_seed(0)
        optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
        logs = update(policy, optimiser, batch, config, loss_of, advantage_of)
        results.append({**logs, "weight": policy.critic.weight.detach().clone()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


class Bandit:
    """Pays for the action that the sign of the observation calls for; episodes of one decision."""

    def __init__(self, num_envs: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.num_envs = num_envs

    def observe(self) -> Tensor:
        sign = torch.randint(0, 2, (self.num_envs, 1, 1, 1), generator=self.generator) * 2.0 - 1
        self.wanted = (sign.flatten() > 0).long()
        return sign.expand(-1, 4, 4, 6)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        reward = (action == self.wanted).float()
        yes = torch.ones(self.num_envs, dtype=torch.bool)
        final = torch.zeros(self.num_envs, 4, 4, 6)
        return self.observe(), reward, yes, ~yes, {"final_obs": final}


@pytest.mark.parametrize("use_hazard", [False, True])
def test_it_learns(tiny_world: Path, use_hazard: bool) -> None:
    _, policy = make(tiny_world)
    env = Bandit(32)
    config = PPOConfig(rollout_steps=8, minibatch_size=64, use_hazard=use_hazard)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    player = Position.start(env.observe(), 2)
    batch = TensorDict()
    for _ in range(15):
        batch, player = rollout(env, policy.act, player, config.rollout_steps)
        logs = update(policy, optimiser, batch, config)
    assert batch["reward"].mean() > 0.95  # chance gives 1/3
    assert logs["explained_variance"] > 0 or batch["reward"].mean() == 1
    assert batch["score"].mean() == batch["reward"].mean()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"discount": 1.0}, "discount must be at least 0 and below 1"),
        ({"gae_lambda": 1.5}, "gae_lambda must be from 0 to 1"),
        ({"epochs": 0}, "must be at least 1"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**values)
