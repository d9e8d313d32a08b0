"""Worlds whose dynamics draw frames in a few consistency steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.cache import FrameCache
from nfd_env.models.layers import Block
from nfd_env.worlds.load import load_world
from tests.tiny_world import noise_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
Passes = list[tuple[int, int]]


@pytest.fixture(scope="module")
def model(endless_world: Path) -> WorldModel:
    return load_world(endless_world, "cpu", "fp32").model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """(frames, frames committed) of each pass through any transformer, however it is run."""
    seen: Passes = []
    committing: list[int] = []
    begin, forward = FrameCache.begin, Block.forward

    def counted_begin(self, count, commit):
        committing.append(commit)
        return begin(self, count, commit)

    def counted_forward(self, layer, x, *args):
        if layer == 0 and committing:
            seen.append((x.shape[1], committing.pop()))
        return forward(self, layer, x, *args)

    monkeypatch.setattr(FrameCache, "begin", counted_begin)
    monkeypatch.setattr(Block, "forward", counted_forward)
    return seen


def few_steps(model: WorldModel, steps: int) -> WorldModel:
    return model.with_sampling(SamplingConfig(steps, "consistency"))


def start(model: WorldModel, rows: list[int]):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 4, 4, 6, generator=generator)
    return model.start(
        [Context(latents[r], torch.zeros(3, 3)) for r in rows], [(20 + r, 1) for r in rows]
    )


def roll(model: WorldModel, rows: list[int], steps: int = 6) -> Tensor:
    state, action = start(model, rows), torch.eye(3)[[r % 3 for r in rows]]
    return torch.stack([model.step(state, action).latents for _ in range(steps)])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_step_costs_one_pass_a_consistency_step(
    model: WorldModel, passes: Passes, steps: int
) -> None:
    """The first commits the frame before, together with the new frame; nothing comes on top."""
    model = few_steps(model, steps)
    state, action = start(model, [0, 1, 2]), torch.eye(3)
    for _ in range(8):
        passes.clear()
        model.step(state, action)
        assert passes == [(2, 1)] + [(1, 0)] * (steps - 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_env_step_costs_one_pass_a_consistency_step(
    make_world: Callable[..., Path], passes: Passes, steps: int
) -> None:
    env = NFDVectorEnv(make_world(hazard_bias=-1000.0), 3, "cpu")
    env.sampling = SamplingConfig(steps, "consistency")
    env.reset(seed=0)
    for _ in range(5):
        passes.clear()
        env.step(env.action_space.sample())
        assert len(passes) == steps


def test_one_step_is_the_noise_less_its_velocity(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = few_steps(model, 1)
    state = start(model, [0])
    noise = noise_of(model, (20, 1), 3)[0]
    velocities: list[Tensor] = []
    stream = model.dynamics.stream

    def kept(*args, **kwargs):
        velocities.append(stream(*args, **kwargs))
        return velocities[-1]

    monkeypatch.setattr(model.dynamics, "stream", kept)
    made = model.step(state, torch.eye(3)[:1]).latents
    torch.testing.assert_close(made[0], noise - velocities[0][0, -1])


def test_further_noise_is_a_function_of_seed_episode_and_frame(model: WorldModel) -> None:
    four = few_steps(model, 4)
    first = noise_of(four, (3, 1), 5)
    assert first[3].shape == (3, 4, 4, 6)
    torch.manual_seed(99)
    noise_of(four, (8, 0), 0)
    for a, b in zip(noise_of(four, (3, 1), 5), first, strict=True):
        assert torch.equal(a, b)
    for other in (((4, 1), 5), ((3, 2), 5), ((3, 1), 6)):
        assert not torch.equal(noise_of(four, *other)[3], first[3])
    noises = [first[0], first[1], *first[3]]
    for i, a in enumerate(noises):
        for b in noises[:i]:
            assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.4


def test_the_other_draws_do_not_depend_on_the_sampler(model: WorldModel) -> None:
    samplings = [SamplingConfig(18), SamplingConfig(1, "consistency")]
    draws = [noise_of(model.with_sampling(s), (3, 1), 5) for s in samplings]
    draws.append(noise_of(few_steps(model, 4), (3, 1), 5))
    for part in range(3):
        assert torch.equal(draws[0][part], draws[1][part])
        assert torch.equal(draws[0][part], draws[2][part])
    assert [len(d[3]) for d in draws] == [0, 0, 3]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_rollouts_are_deterministic_and_rows_independent(model: WorldModel, steps: int) -> None:
    model = few_steps(model, steps)
    together = roll(model, [2, 0, 3])
    torch.manual_seed(5)
    assert torch.equal(roll(model, [2, 0, 3]), together)
    torch.testing.assert_close(roll(model, [0])[:, 0], together[:, 1], **CLOSE)
    assert torch.isfinite(together).all()


def test_a_fork_draws_the_same_noise(model: WorldModel) -> None:
    model = few_steps(model, 2)
    state = start(model, [0, 1])
    fork, action = state.fork(), torch.eye(3)[:2]
    assert torch.equal(model.step(state, action).latents, model.step(fork, action).latents)


def test_sampling_choices() -> None:
    assert SamplingConfig(4, "consistency").renoisings == 3
    assert SamplingConfig(4).renoisings == 0
    with pytest.raises(ValueError, match="sampling_steps must be at least 1"):
        SamplingConfig(0, "consistency")
    with pytest.raises(ValueError, match="euler, dpm_solver_pp, consistency"):
        SamplingConfig(1, "magic")
