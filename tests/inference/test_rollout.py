from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfd_env.flow.solvers import Velocity, level_grid, sample_euler
from nfd_env.inference.rollout import Ahead, FusedVelocity, new_cache, rollout_latents
from tests.models.small import WINDOW, random_frames, small_dynamics


def sampler(velocity: Velocity, noise: Tensor) -> Tensor:
    return sample_euler(velocity, noise, level_grid(2))


def roll(context: Tensor, actions: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return rollout_latents(small_dynamics(), context, actions, sampler, 0.2, generator)


@pytest.mark.parametrize("known", [1, 3, WINDOW + 2])
def test_an_action_leads_into_its_frame(known: int) -> None:
    context, _, actions = random_frames(2, known + 6)
    context = context[:, :known]
    made = roll(context, actions)
    assert made.shape == (2, 6, 2, 4, 6)
    changed = actions.clone()
    changed[:, known + 2] += 1
    other = roll(context, changed)
    assert torch.equal(other[:, :2], made[:, :2])
    assert (other[:, 2:] - made[:, 2:]).abs().amax((0, 2, 3, 4)).min() > 1e-4


def test_all_randomness_comes_from_the_generator() -> None:
    context, _, actions = random_frames(2, 5)
    torch.manual_seed(1)
    first = roll(context[:, :2], actions)
    torch.manual_seed(2)
    assert torch.equal(roll(context[:, :2], actions), first)
    assert not torch.equal(roll(context[:, :2], actions, seed=1), first)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_frame_costs_one_pass_a_step(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_dynamics()
    inputs = random_frames(1, 3)
    cache = new_cache(network, 1)
    passes: list[tuple[int, int]] = []
    stream = network.stream

    def counted(cache, latents, levels, actions, commit):
        passes.append((latents.shape[1], commit))
        return stream(cache, latents, levels, actions, commit)

    monkeypatch.setattr(network, "stream", counted)
    latents, _, actions = inputs
    ahead = Ahead(cache, latents[:, :1], actions[:, :1], actions[:, 1:2])
    velocity = FusedVelocity(network, ahead, history_level=0.2)
    sample_euler(velocity, latents[:, 1:2], level_grid(steps))
    assert passes == [(2, 1)] + [(1, 0)] * (steps - 1)
    assert cache.length.tolist() == [1]


def test_the_fused_pass_equals_the_windowed_forward() -> None:
    network = small_dynamics()
    latents, _, actions = random_frames(2, 3)
    noise = random_frames(2, 1, 1)[0]
    cache = new_cache(network, 2)
    level = 0.2
    network.fill(
        cache, latents[:, :2], torch.full((2, 2), level), actions[:, :2]
    )  # frames 0 and 1 are history, frame 2 is pending

    def velocity(x: Tensor, now: float) -> Tensor:
        levels = torch.tensor([[level, level, level, now]]).expand(2, -1)
        return network(torch.cat((latents, x), 1), levels, all_actions)[:, 3:]

    all_actions = random_frames(2, 4, 2)[2]
    all_actions[:, :3] = actions
    ahead = Ahead(cache, latents[:, 2:], actions[:, 2:], all_actions[:, 3:])
    fused = FusedVelocity(network, ahead, level)
    made = sampler(fused, noise)
    torch.testing.assert_close(made, sampler(velocity, noise), rtol=1e-4, atol=2e-5)
