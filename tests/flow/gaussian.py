"""Gaussian data, whose flow is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from nfd_env.flow.path import expand

MEAN = torch.tensor([1.5, -0.3, 0.0, 0.7], dtype=torch.float64)
SCALE = torch.tensor([0.4, 1.0, 2.0, 0.05], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Levels away from the ends, where divisions by s lose digits."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 + 0.96 * torch.rand(*shape, dtype=torch.float64, generator=generator)


def _standard_deviation(level: Tensor) -> Tensor:
    """Of x_s when x0 is N(MEAN, SCALE^2)."""
    return ((1 - level).square() * SCALE.square() + level.square()).sqrt()


def velocity(x: Tensor, level: Tensor) -> Tensor:
    """E[eps - x0 | x_s]: the slope of (1 - s) MEAN + std(s) c, on which x_s travels."""
    level = expand(level, x)
    std = _standard_deviation(level)
    slope = (level - (1 - level) * SCALE.square()) / std
    return slope / std * (x - (1 - level) * MEAN) - MEAN


def travel(x: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Where the flow carries x from level ``now`` to level ``after``, exactly."""
    now, after = expand(now, x), expand(after, x)
    c = (x - (1 - now) * MEAN) / _standard_deviation(now)
    return (1 - after) * MEAN + _standard_deviation(after) * c


def consistent_velocity(x: Tensor, level: Tensor) -> Tensor:
    """The velocity whose data estimate x_s - s v is the end of the flow."""
    return (x - travel(x, level, torch.zeros_like(level))) / expand(level, x)
