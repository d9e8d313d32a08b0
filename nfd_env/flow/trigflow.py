"""TrigFlow (arXiv 2410.11081) as a change of variables of a flow network.

TrigFlow's path is a quarter circle, x_t = cos(t) x0 + sin(t) eps with the *angle* t in [0, pi / 2],
and its network F estimates dx_t / dt = cos(t) eps - sin(t) x0. With the level
s = sin t / (sin t + cos t) and n = sqrt(s^2 + (1 - s)^2) = 1 / (sin t + cos t) the flow's point is
x_s = n x_t, so a velocity network *is* a TrigFlow network and nothing has to be retrained. All of
this assumes latents of unit variance (sigma_d = 1); scale data of another variance first.

Levels and angles have the shape of the leading dimensions of the data that they go with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nfd_env.flow.path import expand

LevelVelocity = Callable[[Tensor, Tensor], Tensor]
"""(x_s, levels) -> velocity eps - x0, shaped like x_s."""

AngleNetwork = Callable[[Tensor, Tensor], Tensor]
"""(x_t, angles) -> TrigFlow's F, shaped like x_t."""


def angle_from_level(level: Tensor) -> Tensor:
    """The angle t in [0, pi / 2] with tan t = s / (1 - s)."""
    return torch.atan2(level, 1 - level)


def level_from_angle(angle: Tensor) -> Tensor:
    """The level s in [0, 1] with s = sin t / (sin t + cos t)."""
    return angle.sin() / (angle.sin() + angle.cos())


def flow_from_trig(x: Tensor, angle: Tensor) -> Tensor:
    """The flow's point x_s = sqrt(s^2 + (1 - s)^2) x_t."""
    return x / expand(angle.sin() + angle.cos(), x)


def trig_from_flow(x: Tensor, level: Tensor) -> Tensor:
    """TrigFlow's point x_t = x_s / sqrt(s^2 + (1 - s)^2)."""
    return x / expand(_length(level), x)


def trig_velocity(x: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """TrigFlow's F = ((1 - 2s) x_s + (1 - 2s + 2s^2) v) / sqrt(s^2 + (1 - s)^2).

    It follows from x0 = x_s - s v, eps = x_s + (1 - s) v and F = cos(t) eps - sin(t) x0.

    Args:
        x: the flow's point x_s.
        velocity: v there.
        level: s.
    """
    length = _length(level)
    return expand((1 - 2 * level) / length, x) * x + expand(length, x) * velocity


def velocity_from_trig(x: Tensor, output: Tensor, level: Tensor) -> Tensor:
    """The flow velocity v at the flow's point ``x`` = x_s of a TrigFlow ``output`` F."""
    length = _length(level)
    return (output - expand((1 - 2 * level) / length, x) * x) / expand(length, x)


def consistency(x: Tensor, output: Tensor, angle: Tensor) -> Tensor:
    """The consistency function f(x_t, t) = cos(t) x_t - sin(t) F.

    In the flow's terms this is the data estimate x_s - s v, so a distilled velocity network needs
    no other interface than its teacher.
    """
    return expand(angle.cos(), x) * x - expand(angle.sin(), x) * output


def trig_network(velocity: LevelVelocity) -> AngleNetwork:
    """F as a function of (x_t, t), of a velocity as a function of (x_s, s); differentiable."""

    def network(x: Tensor, angle: Tensor) -> Tensor:
        point, level = flow_from_trig(x, angle), level_from_angle(angle)
        return trig_velocity(point, velocity(point, level), level)

    return network


def _length(level: Tensor) -> Tensor:
    return (level.square() + (1 - level).square()).sqrt()
