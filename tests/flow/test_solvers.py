"""On Gaussian data the velocity and the exact solution are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfd_env.flow.solvers import level_grid, sample_dpm_solver_pp, sample_euler

MEAN = torch.tensor([1.5, -0.3, 0.0], dtype=torch.float64)
SCALE = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
NOISE = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SOLVERS = [sample_euler, sample_dpm_solver_pp]


def velocity(x: Tensor, level: float, scale: Tensor = SCALE) -> Tensor:
    """E[eps - x0 | x_s] where x0 is N(MEAN, scale^2)."""
    kept = 1 - level
    variance = kept**2 * scale**2 + level**2
    centred = x - kept * MEAN
    return level / variance * centred - (MEAN + kept * scale**2 / variance * centred)


def error(solver, steps: int, shift: float = 1.0) -> float:
    made = solver(velocity, NOISE, level_grid(steps, shift))
    return float((made - (MEAN + SCALE * NOISE)).square().mean().sqrt())


def test_euler_converges_at_first_order() -> None:
    for steps in (32, 64, 128):
        assert 1.8 < error(sample_euler, steps) / error(sample_euler, 2 * steps) < 2.2


def test_dpm_solver_pp_converges_faster_than_first_order() -> None:
    assert error(sample_dpm_solver_pp, 32) / error(sample_dpm_solver_pp, 128) > 8


@pytest.mark.parametrize("steps", [4, 8, 16, 32])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_pp_is_more_accurate_at_equal_steps(steps: int, shift: float) -> None:
    assert error(sample_dpm_solver_pp, steps, shift) < error(sample_euler, steps, shift)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_single_point_is_reached_exactly(solver, steps: int) -> None:
    point = torch.zeros(3, dtype=torch.float64)
    made = solver(lambda x, s: velocity(x, s, point), NOISE, level_grid(steps))
    torch.testing.assert_close(made, MEAN.expand_as(NOISE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_call_a_step_at_the_grid_levels(solver) -> None:
    called: list[float] = []

    def recording(x: Tensor, level: float) -> Tensor:
        called.append(level)
        return velocity(x, level)

    before = NOISE.clone()
    solver(recording, NOISE, level_grid(4, 2.0))
    assert called == level_grid(4, 2.0)[:-1]
    assert torch.equal(NOISE, before)


def test_level_grid() -> None:
    assert level_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert level_grid(1) == [1.0, 0.0]
    shifted = level_grid(4, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0
    assert shifted == sorted(shifted, reverse=True)
    assert all(s > u for s, u in zip(shifted[1:-1], level_grid(4)[1:-1], strict=True))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        level_grid(steps)
