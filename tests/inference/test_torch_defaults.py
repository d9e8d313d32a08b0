"""What the caller has made torch's default changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nfd_env.inference.rollout import rollout_latents
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.speculation import advance
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import load_world
from tests.models.small import random_frames, small_dynamics


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def strange(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of device "meta" every tensor that is made without naming a device fails when it is read."""
    yield None
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def change(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["strange"] == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.node.callspec.params["strange"]))


def play(model: WorldModel, frames: int, begin: Context, actions: Tensor) -> list[Tensor]:
    state = model.start([begin, begin], [(1, 0), (2, 0)], frames)
    made = [advance(model, state, a) for a in actions]
    model.check_fits(state.fork(), frames)
    seen = model.features_along(begin)
    shown = model.decode(made[-1].latents)
    return [*(x for m in made for x in vars(m).values()), seen, shown, model.encode(shown)]


@pytest.mark.parametrize("sampling", [SamplingConfig(2, "consistency"), SamplingConfig(3)])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_world_steps_alike(
    endless_world: Path,
    strange: None,
    frames: int,
    sampling: SamplingConfig,
    request: pytest.FixtureRequest,
) -> None:
    model = load_world(endless_world, "cpu", "fp32").model.with_sampling(sampling)
    begin = Context(torch.randn(3, 4, 4, 6), torch.zeros(3, 3))
    actions = torch.eye(3)[torch.tensor([[0, 1], [0, 1], [2, 1], [2, 1]])]
    expected = play(model, frames, begin, actions)
    change(request)
    for a, b in zip(play(model, frames, begin, actions), expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def test_training_passes_compute_alike(strange: None, request: pytest.FixtureRequest) -> None:
    network, (latents, levels, actions) = small_dynamics(), random_frames(2, 6)
    generator = torch.Generator()

    def computed() -> list[Tensor]:
        sampler = SamplingConfig(2).sample
        arguments = network, latents[:, :2], actions, sampler, 0.2, generator.manual_seed(0)
        return [
            network(latents, levels, actions),
            network.forward_two_copies(latents, levels, latents, levels, actions),
            rollout_latents(*arguments),
        ]

    expected = computed()
    change(request)
    for a, b in zip(computed(), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_under_a_callers_autocast_a_world_steps_alike_and_goes_on_after(tiny_world: Path) -> None:
    """Its state had taken the other number format, with which no later step could go on."""
    from nfd_env.envs.vector_env import NFDVectorEnv

    def played() -> list[np.ndarray]:
        first = env.reset(seed=3)[0]
        return [first, *(env.step([1, 2])[0] for _ in range(3))]

    env = NFDVectorEnv(tiny_world, 2, "cpu", precision="fp32")
    wanted = played()
    with torch.autocast("cpu", torch.bfloat16):
        within = played()
        assert torch.is_autocast_enabled("cpu")
    for frames in within, played():
        assert all(np.array_equal(a, b) for a, b in zip(frames, wanted, strict=True))
