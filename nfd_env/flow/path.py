"""The straight path between data and noise; ``nfd_env.flow.trigflow`` bends it to a circle.

Throughout, the *level* s in [0, 1] says how noisy a frame is: x_s = (1 - s) x0 + s eps, so 0 is
data and 1 is noise. Levels have the shape of the leading dimensions (batch,
frames) of what they scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nfd_env import parts


@dataclass(frozen=True)
class PathSample:
    """A point on the path and the velocity there, both shaped like the data."""

    x: Tensor
    velocity: Tensor


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Append singleton dimensions to ``values`` until it broadcasts over ``like``."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def interpolate(data: Tensor, noise: Tensor, level: Tensor) -> PathSample:
    """x_s = (1 - s) x0 + s eps, and its velocity eps - x0 (flow matching, arXiv 2210.02747)."""
    s = expand(level, data)
    return PathSample(torch.lerp(data, noise, s), noise - data)


def data_from_velocity(x: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """The data estimate x0 = x_s - s v."""
    return x - expand(level, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """The noise estimate eps = x_s + (1 - s) v."""
    return x + (1 - expand(level, x)) * velocity


def sample_levels(
    shape: tuple[int, ...],
    shift: float = 3.0,
    device: torch.device | None = None,
    top: float = 0.0,
) -> Tensor:
    """Independent training levels: u = sigmoid(N(0, 1)), s = shift u / (1 + (shift - 1) u).

    ``shift`` 3 is the setting of arXiv 2506.01380; 1 leaves the logit-normal of arXiv 2403.03206.
    The share ``top`` of them is 1: all sampling begins there, and the others hardly come near it.
    """
    u = torch.sigmoid(parts.randn(shape, device))
    levels = shift * u / (1 + (shift - 1) * u)
    return levels.masked_fill(parts.rand(shape, device) < top, 1) if top else levels
