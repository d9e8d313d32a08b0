"""SPEC 2.3's change of variables, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nfd_env.flow.path import data_from_velocity, interpolate
from nfd_env.flow.trigflow import (
    angle_from_level,
    consistency,
    flow_from_trig,
    level_from_angle,
    trig_from_flow,
    trig_network,
    trig_velocity,
    velocity_from_trig,
)
from tests.flow.gaussian import rand, randn

X, LEVEL = randn(5, 3, 2, 4), rand(5, 3)
ANGLE = angle_from_level(LEVEL)
EXACT = {"rtol": 0, "atol": 1e-13}


def test_levels_and_angles_there_and_back() -> None:
    torch.testing.assert_close(level_from_angle(ANGLE), LEVEL, **EXACT)
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([0, math.pi / 4, math.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(angle_from_level(ends), expected, **EXACT)
    torch.testing.assert_close(level_from_angle(expected), ends, **EXACT)


def test_points_there_and_back() -> None:
    torch.testing.assert_close(flow_from_trig(trig_from_flow(X, LEVEL), ANGLE), X, **EXACT)


def test_velocities_there_and_back() -> None:
    v = randn(5, 3, 2, 4, seed=1)
    back = velocity_from_trig(X, trig_velocity(X, v, LEVEL), LEVEL)
    torch.testing.assert_close(back, v, **EXACT)


def test_both_paths_are_the_same_points_and_slopes() -> None:
    """From one pair (x0, eps): x_t = cos t x0 + sin t eps, F = cos t eps - sin t x0."""
    data, noise = randn(5, 3, 2, 4, seed=2), randn(5, 3, 2, 4, seed=3)
    cos, sin = (f(ANGLE)[..., None, None] for f in (torch.cos, torch.sin))
    flow = interpolate(data, noise, LEVEL)
    point, slope = cos * data + sin * noise, cos * noise - sin * data
    torch.testing.assert_close(trig_from_flow(flow.x, LEVEL), point, **EXACT)
    torch.testing.assert_close(trig_velocity(flow.x, flow.velocity, LEVEL), slope, **EXACT)
    torch.testing.assert_close(consistency(point, slope, ANGLE), data, **EXACT)


def test_the_consistency_function_is_the_flow_s_data_estimate() -> None:
    """Whatever the network says, right or wrong."""
    v = randn(5, 3, 2, 4, seed=4)
    f = consistency(trig_from_flow(X, LEVEL), trig_velocity(X, v, LEVEL), ANGLE)
    torch.testing.assert_close(f, data_from_velocity(X, v, LEVEL), **EXACT)


@pytest.mark.parametrize(("level", "sign"), [(0.0, 1.0), (1.0, -1.0)])
def test_the_ends_are_finite(level: float, sign: float) -> None:
    """At s = 0, f is x itself, and F = x + v; at s = 1, F = v - x."""
    v, s = randn(5, 3, 2, 4, seed=5), torch.full((5, 3), level, dtype=torch.float64)
    torch.testing.assert_close(trig_velocity(X, v, s), v + sign * X, **EXACT)
    f = consistency(X, v + sign * X, angle_from_level(s))
    torch.testing.assert_close(f, X if level == 0 else X - v, **EXACT)


def test_a_network_is_asked_at_the_flow_s_point_and_level() -> None:
    asked = []

    def velocity(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        asked.append((x, level))
        return x.square()

    output = trig_network(velocity)(trig_from_flow(X, LEVEL), ANGLE)
    torch.testing.assert_close(asked[0][0], X, **EXACT)
    torch.testing.assert_close(asked[0][1], LEVEL, **EXACT)
    torch.testing.assert_close(output, trig_velocity(X, X.square(), LEVEL), **EXACT)
