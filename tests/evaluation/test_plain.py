from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_env.evaluation.plain import PlainDynamics, PlainModel
from nfd_env.evaluation.refilled import RefilledModel
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.low_rank import with_low_rank
from nfd_env.worlds.load import load_world
from tests.models.small import WINDOW, random_frames, small_dynamics

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def network(rank: int = 0, qk_norm: bool = False) -> Dynamics:
    """With every weight away from where it starts."""
    made = small_dynamics(qk_norm=qk_norm)
    for block in made.blocks:
        for norm in (block.norm_attention, block.norm_mlp):
            norm.weight.uniform_(0.5, 1.5)
    return with_low_rank(made, torch.eye(3), rank)[0].requires_grad_(False) if rank else made


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("rank", "qk_norm"), [(0, False), (4, False), (0, True)])
def test_it_has_the_velocities_of_the_dynamics(rank: int, qk_norm: bool, folded: bool) -> None:
    fast = network(rank, qk_norm)
    expected = fast(*random_frames(2, WINDOW))
    if folded:  # as a loaded world's is
        fast.fold_norms()
    plain = PlainDynamics(fast, torch.float32)
    torch.testing.assert_close(plain(*random_frames(2, WINDOW))[0], expected, **CLOSE)


def test_frames_after_a_filled_cache_are_as_in_one_pass() -> None:
    plain = PlainDynamics(network(), torch.float32)
    latents, levels, actions = random_frames(3, WINDOW)
    expected, _ = plain(latents, levels, actions)
    _, past = plain(latents[:, :2], levels[:, :2], actions[:, :2])
    made, kept = plain(latents[:, 2:], levels[:, 2:], actions[:, 2:], past)
    torch.testing.assert_close(made, expected[:, 2:], **CLOSE)
    assert kept[0][0].shape[2] == 2 * plain.config.tokens  # of the new frames alone


def test_it_stays_close_in_bf16() -> None:
    fast = network()
    plain = PlainDynamics(fast, torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    made, expected = plain(*random_frames(2, WINDOW))[0], fast(*random_frames(2, WINDOW))
    assert made.dtype == torch.float32
    assert (made - expected).norm() < 0.03 * expected.norm()


def test_it_is_plain_and_its_modulation_sees_every_token() -> None:
    plain = PlainDynamics(network(rank=4), torch.float32)
    d, tokens = plain.config.width, plain.config.tokens
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    rows: list[torch.Size] = []
    for block in plain.blocks:
        assert block.modulation[1].weight.shape == (6 * d, d)
        block.modulation[1].register_forward_hook(lambda _, args, out: rows.append(args[0].shape))
    plain(*random_frames(2, 3))
    assert rows == [torch.Size((2, 3 * tokens, d))] * 2


def test_it_draws_the_frames_of_the_refilled_model(endless_world: Path) -> None:
    model = load_world(endless_world, "cpu", "fp32").model
    model = model.with_sampling(SamplingConfig(3, "dpm_solver_pp"))
    generator = torch.Generator().manual_seed(3)
    contexts = [
        Context(
            torch.randn(n, 4, 4, 6, generator=generator), torch.randn(n, 3, generator=generator)
        )
        for n in (1, 3)
    ]
    models = (RefilledModel(model), PlainModel(model, torch.float32))
    states = [m.start(contexts, [(0, 0), (1, 0)]) for m in models]
    for t in range(14):  # from unequal histories that are not full to full ones
        action = torch.eye(3)[[t % 3, 1]]
        one, other = (m.step(s, action) for m, s in zip(models, states, strict=True))
        torch.testing.assert_close(other.latents, one.latents, rtol=1e-3, atol=1e-3)


def test_it_costs_a_window_and_a_pass_a_step(
    endless_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_world(endless_world, "cpu", "fp32").model
    plain = PlainModel(model.with_sampling(SamplingConfig(4, "euler")), torch.float32)
    state = plain.start([Context(torch.randn(11, 4, 4, 6), torch.randn(11, 3))], [(0, 0)])
    frames: list[int] = []
    plain.plain.register_forward_hook(lambda _, args, out: frames.append(args[0].shape[1]))
    monkeypatch.setattr(model.dynamics, "_run", None)  # nothing else may be run
    plain.step(state, torch.eye(3)[[1]])
    # The latest four frames.
    assert frames == [4] + [1] * 4
