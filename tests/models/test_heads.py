from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfd_env.models.heads import Heads, HeadsConfig

VALUES = [-2.0, 0.0, 0.5, 3.0]


def small_heads(values: list[float] = VALUES, dropout: float = 0.1) -> Heads:
    torch.manual_seed(0)
    return Heads(HeadsConfig(24, 3, 16, values, dropout)).eval()


def sequence(batch: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, count, 2, 3, 4, generator=generator),
        torch.randn(batch, count, 3, generator=generator),
    )


def test_step_by_step_equals_the_sequence() -> None:
    heads = small_heads()
    latents, actions = sequence(3, 9)
    logits, last = heads(latents, actions, heads.initial_state(3))
    assert logits.shape == (3, 9, 1 + len(VALUES))
    state = heads.initial_state(3)
    for t in range(9):
        seen = heads.step(latents[:, t], actions[:, t], state)
        torch.testing.assert_close(seen.hazard, logits[:, t, 0].sigmoid())
        torch.testing.assert_close(seen.reward, heads.reward(logits[:, t]))
        state = seen.state
    torch.testing.assert_close(state, last)


def test_the_state_carries_the_past_and_not_the_future() -> None:
    heads = small_heads()
    latents, actions = sequence(1, 6)
    before, _ = heads(latents, actions, heads.initial_state(1))
    latents = latents.clone()
    latents[:, 3] += 1
    moved = (heads(latents, actions, heads.initial_state(1))[0] - before).abs().amax((0, 2))
    assert (moved[:3] == 0).all() and (moved[3:] > 1e-5).all()


def test_predictions_lie_in_their_ranges() -> None:
    heads = small_heads()
    with torch.no_grad():
        heads.output.weight.mul_(100)
    latents, actions = sequence(64, 1)
    seen = heads.step(latents[:, 0], actions[:, 0], heads.initial_state(64))
    assert seen.hazard.min() >= 0 and seen.hazard.max() <= 1
    assert seen.reward.min() >= VALUES[0] and seen.reward.max() <= VALUES[-1]
    assert seen.reward.std() > 0.1


def test_two_hot_expectation_is_the_reward() -> None:
    heads = small_heads()
    rewards = torch.linspace(-2, 3, 41).reshape(41, 1)
    mixture = heads.two_hot(rewards)
    assert mixture.shape == (41, 1, 4)
    assert (mixture >= 0).all() and ((mixture > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(mixture.sum(-1), torch.ones(41, 1))
    torch.testing.assert_close((mixture * torch.tensor(VALUES)).sum(-1), rewards)
    # What the network is asked for is what it then predicts.
    logits = torch.cat((torch.zeros(41, 1, 1), mixture.log()), -1)
    torch.testing.assert_close(heads.reward(logits), rewards)


def test_two_hot_at_the_values_and_beyond_them() -> None:
    heads = small_heads()
    assert torch.equal(heads.two_hot(torch.tensor(VALUES)), torch.eye(4))
    assert torch.equal(heads.two_hot(torch.tensor([-9.0, 9.0])), torch.eye(4)[[0, 3]])


def test_a_single_reward_value() -> None:
    heads = small_heads([1.5])
    assert torch.equal(heads.two_hot(torch.zeros(2, 3)), torch.ones(2, 3, 1))
    latents, actions = sequence(2, 1)
    reward = heads.step(latents[:, 0], actions[:, 0], heads.initial_state(2)).reward
    assert torch.equal(reward, torch.full((2,), 1.5))


def test_dropout_only_in_training() -> None:
    heads = small_heads(dropout=0.5)
    latents, actions = sequence(2, 4)
    state = heads.initial_state(2)
    assert torch.equal(heads(latents, actions, state)[0], heads(latents, actions, state)[0])
    heads.train()
    assert not torch.equal(heads(latents, actions, state)[0], heads(latents, actions, state)[0])


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, 0.0]])
def test_reward_values_must_ascend(values: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly ascending"):
        HeadsConfig(reward_values=values)
