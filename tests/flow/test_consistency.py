"""On Gaussian data the teacher and the perfect student are known, so their tangents are too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nfd_env.flow import consistency as c
from nfd_env.flow.path import data_from_velocity, expand, interpolate
from nfd_env.flow.solvers import level_grid, sample_consistency
from nfd_env.flow.trigflow import (
    angle_from_level,
    level_from_angle,
    trig_from_flow,
    trig_network,
)
from nfd_env.models.dynamics import Dynamics
from tests.flow.gaussian import (
    MEAN,
    SCALE,
    consistent_velocity,
    rand,
    randn,
    travel,
    velocity,
)
from tests.models.small import random_frames, small_dynamics

LEVEL = rand(6, 5)
X = interpolate(MEAN + SCALE * randn(6, 5, 4), randn(6, 5, 4, seed=1), LEVEL).x
ANGLE, TRIG = angle_from_level(LEVEL), trig_from_flow(X, LEVEL)
DRIFT = trig_network(velocity)(TRIG, ANGLE)


def test_the_perfect_student_has_no_tangent() -> None:
    here = c.tangent(trig_network(consistent_velocity), TRIG, ANGLE, DRIFT)
    torch.testing.assert_close(here.direction, torch.zeros_like(X), rtol=0, atol=1e-10)
    torch.testing.assert_close(here.output, trig_network(consistent_velocity)(TRIG, ANGLE))


def test_any_student_s_tangent_is_the_slope_of_its_jumps_along_the_flow() -> None:
    """The tangent g = cos t df/dt, where df/dt is measured on two points of one trajectory."""

    def student(x: Tensor, level: Tensor) -> Tensor:
        return torch.sin(2 * x) + expand(level, x) * x

    def jumped(angle: Tensor) -> Tensor:
        level = level_from_angle(angle)
        x = travel(X, LEVEL, level)
        return data_from_velocity(x, student(x, level), level)

    h = 1e-5
    slope = (jumped(ANGLE + h) - jumped(ANGLE - h)) / (2 * h)
    here = c.tangent(trig_network(student), TRIG, ANGLE, DRIFT)
    torch.testing.assert_close(here.direction, expand(ANGLE.cos(), X) * slope, rtol=0, atol=1e-7)


def test_warm_up_scales_the_part_with_the_derivative() -> None:
    network = trig_network(lambda x, level: x.square())
    none, half, full = (
        c.tangent(network, TRIG, ANGLE, DRIFT, r).direction for r in (0.0, 0.5, 1.0)
    )
    pull = -expand(ANGLE.cos(), X).square() * (network(TRIG, ANGLE) - DRIFT)
    torch.testing.assert_close(none, pull)
    torch.testing.assert_close(half, (none + full) / 2)


def test_the_direction_is_constant_and_the_output_is_not() -> None:
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, angle: Tensor) -> Tensor:
        return gain * x.sin()

    here = c.tangent(network, TRIG, ANGLE, DRIFT)
    assert not here.direction.requires_grad
    (slope,) = torch.autograd.grad(here.output.sum(), gain)
    torch.testing.assert_close(slope, TRIG.sin().sum())


def test_normalised_frame_by_frame() -> None:
    g = randn(3, 4, 2, 5) * torch.tensor([1e-4, 0.3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    unit = c.normalise(g, 2, 0.1)
    before, after = (x.flatten(2).square().mean(-1).sqrt() for x in (g, unit))
    torch.testing.assert_close(after, before / (before + 0.1))
    assert after.max() < 1
    changed = g.clone()
    changed[:, 3] *= 1e6
    assert torch.equal(c.normalise(changed, 2, 0.1)[:, :3], unit[:, :3])


def test_weight_is_bounded() -> None:
    angle = torch.tensor([0.0, 1e-3, 0.5, 1.0, torch.pi / 2], dtype=torch.float64)
    weight = c.bounded_weight(angle, 4.0)
    torch.testing.assert_close(weight[2:4], 1 / angle[2:4].tan())
    assert weight[0] == weight[1] == 4 and weight[4] == 0.25
    assert torch.equal(c.bounded_weight(angle, 1.0), torch.ones_like(angle))


def test_angles_have_normal_levels() -> None:
    torch.manual_seed(0)
    level = level_from_angle(c.sample_angles((20_000,), 0.2, 1.6))
    logit = torch.logit(level)
    assert abs(logit.mean() - 0.2) < 0.05 and abs(logit.std() - 1.6) < 0.05


def test_the_loss_and_its_gradient() -> None:
    output = randn(3, 4, 2, 5, seed=5).requires_grad_()
    direction, weight = randn(3, 4, 2, 5, seed=6), rand(3, 4)
    square = direction.flatten(2).square().mean(-1)
    loss = c.distillation_loss(output, direction, weight)
    torch.testing.assert_close(loss, weight * square)
    (slope,) = torch.autograd.grad(loss.sum(), output)
    torch.testing.assert_close(slope, -2 * expand(weight, direction) * direction / 10)


def between(share: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    """A student between the teacher (0) and the perfect student (1), or beyond."""

    def student(x: Tensor, level: Tensor) -> Tensor:
        teacher = velocity(x, level)
        return teacher + share * (consistent_velocity(x, level) - teacher)

    return student


@pytest.mark.parametrize(("share", "sign"), [(0.0, -1), (0.5, -1), (1.5, 1)])
def test_the_gradients_point_to_the_perfect_student(share: float, sign: int) -> None:
    """In continuous and in discrete time, from either side."""
    free = torch.tensor(share, dtype=torch.float64, requires_grad=True)
    here = c.tangent(trig_network(between(free)), TRIG, ANGLE, DRIFT)
    g = c.normalise(here.direction, 2)
    loss = c.distillation_loss(here.output, g, c.bounded_weight(ANGLE, 4.0)).mean()
    (slope,) = torch.autograd.grad(loss, free)
    assert sign * slope > 1e-3
    after = LEVEL / 2
    loss = c.discrete_loss(
        between(free)(X, LEVEL), between(share), X, LEVEL, travel(X, LEVEL, after), after
    ).mean()
    (slope,) = torch.autograd.grad(loss, free)
    assert sign * slope > 1e-3


def test_the_perfect_student_has_no_discrete_loss() -> None:
    for after in (torch.zeros_like(LEVEL), LEVEL / 2):
        loss = c.discrete_loss(
            consistent_velocity(X, LEVEL),
            lambda x, level: consistent_velocity(x, level.clamp_min(1e-9)),
            X,
            LEVEL,
            travel(X, LEVEL, after),
            after,
        )
        assert loss.max() < 1e-12


def test_discrete_loss_on_the_output_is_the_loss_on_the_data_over_the_level() -> None:
    student, after = between(0.3), LEVEL / 3
    moved = c.jump(velocity, X, LEVEL, after)
    loss = c.discrete_loss(student(X, LEVEL), student, X, LEVEL, moved, after)
    gap = data_from_velocity(X, student(X, LEVEL), LEVEL) - data_from_velocity(
        moved, student(moved, after), after
    )
    torch.testing.assert_close(loss, gap.square().mean(-1) / LEVEL.square())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_jumps_have_their_order(solver: str, order: int) -> None:
    errors = []
    for share in (0.02, 0.01):
        after = LEVEL * (1 - share)
        made = c.jump(velocity, X, LEVEL, after, solver)
        errors.append((made - travel(X, LEVEL, after)).abs()[..., :3].mean())
    # The midpoint rule's h^3 term happens to vanish on Gaussians.
    assert errors[0] / errors[1] > 0.95 * 2 ** (order + 1)


def test_jumps_never_ask_for_the_velocity_of_data() -> None:
    asked = []

    def recording(x: Tensor, level: Tensor) -> Tensor:
        asked.append(level)
        return velocity(x, level)

    c.jump(recording, X, LEVEL, torch.zeros_like(LEVEL))
    assert torch.stack(asked).min() >= LEVEL.min() / 2
    with pytest.raises(ValueError, match="euler or midpoint"):
        c.jump(velocity, X, LEVEL, LEVEL / 2, "heun")


def test_grid() -> None:
    torch.manual_seed(0)
    now, after = c.sample_grid_steps((5000,), 8)
    torch.testing.assert_close(now - after, torch.full_like(now, 1 / 8))
    assert set((8 * now).long().tolist()) == set(range(1, 9)) and after.min() == 0
    progress = torch.tensor([0.0, 0.24, 0.26, 0.5, 0.76, 1.0, 2.0])
    assert c.grid_size(progress, 4, 3).tolist() == [4, 4, 8, 16, 32, 32, 32]
    assert c.grid_size(progress, 4, 0).tolist() == [4] * 7


class Correction(nn.Module):
    """A student that starts as the teacher and learns an affine correction at each level."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 8)).double()
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        gain, shift = self.layers(level[..., None]).chunk(2, -1)
        return velocity(x, level) + gain * x + shift


@pytest.mark.parametrize("discrete", [True, False])
def test_distilling_a_gaussian_makes_one_step_samples_right(discrete: bool) -> None:
    """One step from noise reaches the flow's end, which the teacher's one step misses by far."""
    torch.manual_seed(0)
    student = Correction()
    optimiser = torch.optim.Adam(student.parameters(), 1e-2)
    noise = randn(4000, 4, seed=8)
    one = torch.ones(len(noise), dtype=torch.float64)
    goal = MEAN + SCALE * noise

    def error() -> float:
        with torch.no_grad():
            return float((noise - student(noise, one) - goal).square().mean())

    before = error()
    for step in range(250):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / 250)
        data, eps = MEAN + SCALE * torch.randn(256, 4).double(), torch.randn(256, 4).double()
        if discrete:
            now, after = (s.double() for s in c.sample_grid_steps((256,), 16))
            x = interpolate(data, eps, now).x
            moved = c.jump(velocity, x, now, after)
            loss = c.discrete_loss(student(x, now), student, x, now, moved, after)
        else:
            angle = c.sample_angles((256,), 0.2, 1.6).double()
            x = expand(angle.cos(), data) * data + expand(angle.sin(), data) * eps
            drift = trig_network(velocity)(x, angle)
            here = c.tangent(trig_network(student), x, angle, drift, min(1, step / 100))
            loss = c.distillation_loss(
                here.output, c.normalise(here.direction, 1), torch.ones(256).double()
            )
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    assert error() < 0.1 * before


def in_float64(monkeypatch: pytest.MonkeyPatch) -> Dynamics:
    """A small network without its casts to float32, which would drown finite differences."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)
    return small_dynamics().double()


def test_the_tangent_goes_through_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JVP of F along (dx/dt, 1) against central differences, with the history held fixed."""
    network = in_float64(monkeypatch)
    latents, levels, actions = (x.double() for x in random_frames(2, 5))
    history = randn(2, 5, 2, 4, 6, seed=9)
    angle = angle_from_level(0.1 + 0.8 * levels)

    def f(x: Tensor, angle: Tensor) -> Tensor:
        return trig_network(
            lambda x, s: network.forward_two_copies(history, 0.3 * levels, x, s, actions)
        )(x, angle)

    drift = randn(2, 5, 2, 4, 6, seed=10)
    product = angle.cos() * angle.sin()
    h = 1e-6
    ahead, behind = (
        f(latents + d * expand(product, latents) * drift, angle + d * product) for d in (h, -h)
    )
    change = (ahead - behind) / (2 * h)
    expected = -expand(angle.cos(), latents).square() * (f(latents, angle) - drift)
    expected = expected - (expand(product, latents) * latents + change)
    made = c.tangent(f, latents, angle, drift).direction
    assert made.dtype == torch.float64
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_of_the_perfect_student(steps: int) -> None:
    """Each step ends at the data; between steps it is noised with the given noise."""

    def student(x: Tensor, level: float) -> Tensor:
        return consistent_velocity(x, torch.full(x.shape[:1], level, dtype=torch.float64))

    noise, more = randn(50, 4, seed=11), list(randn(steps - 1, 50, 4, seed=12))
    expected = MEAN + SCALE * noise
    for level, fresh in zip(level_grid(steps)[1:-1], more, strict=True):
        x = (1 - level) * expected + level * fresh
        expected = travel(x, torch.tensor([level]).double(), torch.zeros(1).double())
    before = noise.clone()
    made = sample_consistency(student, noise, level_grid(steps), more)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    assert torch.equal(noise, before)


def test_consistency_sampling_calls_once_a_step_and_uses_no_other_randomness() -> None:
    called: list[float] = []

    def student(x: Tensor, level: float) -> Tensor:
        called.append(level)
        return x.sin()

    noise, more = randn(3, 4), list(randn(3, 3, 4, seed=1))
    state = torch.get_rng_state()
    first = sample_consistency(student, noise, level_grid(4, 2.0), more)
    assert called == level_grid(4, 2.0)[:-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample_consistency(student, noise, level_grid(4, 2.0), more), first)
    one = sample_consistency(student, noise, level_grid(1), [])
    assert torch.equal(one, noise - noise.sin())


def test_too_few_noises() -> None:
    with pytest.raises(ValueError, match="4 consistency steps need 3 further noises, got 2"):
        sample_consistency(lambda x, s: x, randn(2, 4), level_grid(4), list(randn(2, 2, 4)))
