from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.refilled import RefilledModel
from nfd_env.flow.solvers import level_grid, sample_euler
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.dynamics import Dynamics
from nfd_env.worlds.load import load_world
from tests.tiny_world import noise_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
WINDOW = 5
ONE_HOT = torch.eye(3)


@pytest.fixture(scope="module")
def model(endless_world: Path) -> WorldModel:
    model = load_world(endless_world, "cpu", "fp32").model
    return model.with_sampling(SamplingConfig(3, "euler"))


def start(lengths: list[int]) -> tuple[list[Context], list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(3)
    contexts = [
        Context(
            torch.randn(n, 4, 4, 6, generator=generator), torch.randn(n, 3, generator=generator)
        )
        for n in lengths
    ]
    return contexts, [(i, 0) for i in range(len(lengths))]


def test_it_equals_the_ring_until_the_window_is_full(model: WorldModel) -> None:
    refilled = RefilledModel(model)
    one, other = (m.start(*start([1, 2, 1])) for m in (model, refilled))
    for t in range(WINDOW - 2):
        action = ONE_HOT[[t % 3, 1, 2]]
        mine, its = refilled.step(other, action), model.step(one, action)
        for a, b in zip(vars(mine).values(), vars(its).values(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_every_frame_sees_its_window_and_nothing_else(model: WorldModel) -> None:
    """Unlike in the ring, whose keys and values were computed from frames that are gone by now."""
    refilled = RefilledModel(model)
    (context,), (seed,) = start([3])
    state = refilled.start([context], [seed])
    level = model.sampling.history_level
    draws = [noise_of(model, seed, t) for t in range(20)]
    history = [torch.lerp(x, draws[t][1], level) for t, x in enumerate(context.latents)]
    into = list(context.actions)
    for t in range(12):
        action = ONE_HOT[t % 3]
        past, before = torch.stack(history)[1 - WINDOW :], torch.stack(into)[1 - WINDOW :]

        def velocity(
            x: torch.Tensor, at: float, past=past, before=before, action=action
        ) -> torch.Tensor:
            levels = torch.full((1, len(past) + 1), level)
            levels[:, -1] = at
            frames = torch.cat((past[None], x), 1)
            actions = torch.cat((before, action[None]))[None]
            return model.dynamics(frames, levels, actions)[:, -1:]

        expected = sample_euler(velocity, draws[t + 3][0][None, None], level_grid(3))[0, 0]
        made = refilled.step(state, action[None]).latents[0]
        torch.testing.assert_close(made, expected, **CLOSE)
        history.append(torch.lerp(made, draws[t + 3][1], level))
        into.append(action)


def test_it_costs_a_window_and_a_pass_a_step(
    endless_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int]] = []
    stream, fill = Dynamics.stream, Dynamics.fill

    def counted(self, cache, latents, levels, actions, commit):
        passes.append((latents.shape[1], commit))
        return stream(self, cache, latents, levels, actions, commit)

    def filled(self, cache, latents, *args):
        passes.append((latents.shape[1], latents.shape[1]))
        return fill(self, cache, latents, *args)

    env = NFDVectorEnv(endless_world, 2, "cpu", sampling_steps=4, precision="fp32")
    env.model = RefilledModel(env.model)
    env.reset(seed=0)
    for _ in range(env.model.dynamics.config.window):
        env.step([0, 1])
    monkeypatch.setattr(Dynamics, "stream", counted)
    monkeypatch.setattr(Dynamics, "fill", filled)
    env.step([0, 1])
    assert passes == [(WINDOW - 1, WINDOW - 1)] + [(1, 0)] * 4


def test_it_plays_through_resets(make_world: Callable[..., Path]) -> None:
    """Rows whose window is not full beside others."""
    world = make_world(hazard_bias=-1.5)
    env, alone = (
        NFDVectorEnv(world, n, "cpu", precision="fp32", obs_type="latent") for n in (3, 1)
    )
    for e in (env, alone):
        e.model = RefilledModel(e.model)
        e.reset(seed=0)
    ends = 0
    for t in range(30):
        (
            observation,
            *_,
        ) = env.step([t % 3, 1, 2])
        torch.testing.assert_close(observation[:1], alone.step([t % 3])[0], **CLOSE)
        ends += int(env._now.ended.sum())
    assert ends > 3
