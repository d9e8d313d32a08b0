"""Consistency distillation: a student learns to jump to where its teacher's flow would end.

Continuous time is sCM (arXiv 2410.11081) with every frame at its own angle; discrete time (arXiv
2303.01469) needs no derivatives and is a cheap way to begin. See ``nfd_env.flow.trigflow`` for the
symbols. "Per frame" means: over the dimensions of the data that levels and angles do not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nfd_env import parts
from nfd_env.flow.path import data_from_velocity, expand
from nfd_env.flow.trigflow import AngleNetwork, LevelVelocity


@dataclass(frozen=True)
class Tangent:
    """What one evaluation of the student gives.

    Attributes:
        output: F(x_t, t), shaped like the data; it can be differentiated for the parameters.
        direction: g, a constant shaped like the data: where F should move.
    """

    output: Tensor
    direction: Tensor


def sample_angles(
    shape: tuple[int, ...], mean: float, spread: float, device: torch.device | None = None
) -> Tensor:
    """Independent t = arctan(e^N(mean, spread)) in (0, pi / 2); the level is sigmoid(N)."""
    return torch.atan(torch.exp(mean + spread * parts.randn(shape, device)))


def tangent(
    network: AngleNetwork, x: Tensor, angle: Tensor, drift: Tensor, warmup: float | Tensor = 1.0
) -> Tangent:
    """The tangent cos(t) df/dt along the teacher's flow, arXiv 2410.11081 algorithm 1.

    g = -cos^2(t) (F - dx/dt) - r cos(t) sin(t) (x_t + dF/dt). The total derivative dF/dt is a
    Jacobian-vector product in forward mode along (cos t sin t dx/dt, cos t sin t): with the factor
    inside, it stays bounded at both ends of the path.

    Args:
        network: the student, F of (x_t, t).
        x: x_t.
        angle: t, the shape of x's leading dimensions.
        drift: dx_t / dt, the teacher's F.
        warmup: r in [0, 1]; 0 leaves out the part with the derivative.
    """
    cos, product = expand(angle.cos(), x), angle.cos() * angle.sin()
    along = (expand(product, x) * drift, product)
    output, change = torch.func.jvp(network, (x, angle), along)[:2]
    g = -cos.square() * (output.detach() - drift)
    g = g - warmup * (expand(product, x) * x + change.detach())
    return Tangent(output, g.detach())


def normalise(direction: Tensor, frame_dimensions: int, constant: float = 0.1) -> Tensor:
    """The tangent g / (||g|| + constant), frame by frame.

    The norm is the root mean square over a frame, so that ``constant`` means the same for latents
    of any size. A norm over a whole window would let its noisiest frame silence the others.

    Args:
        direction: g.
        frame_dimensions: how many leading dimensions count frames, e.g. 2 for (batch, frames).
        constant: frames whose tangent is shorter than this are left small.
    """
    norm = direction.flatten(frame_dimensions).square().mean(-1).sqrt()
    return direction / expand(norm + constant, direction)


def bounded_weight(angle: Tensor, bound: float) -> Tensor:
    """The weight 1 / tan t kept within [1 / ``bound``, ``bound``]; 1 weighs all angles alike.

    Without the bounds an almost clean frame outweighs a whole batch, and almost pure noise, where
    a single step begins, counts for nothing.
    """
    return (angle.cos() / angle.sin().clamp_min(1e-6)).clamp(1 / bound, bound)


def distillation_loss(output: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """The loss w ||F - sg(F) - g||^2 per frame; its gradient for F is -2 w g / (values a frame).

    Args:
        output: F.
        direction: g, normalised.
        weight: w, one a frame.

    Returns:
        One value a frame, the mean over the frame's values.
    """
    error = (output - output.detach() - direction).flatten(weight.ndim).square().mean(-1)
    return weight * error


def jump(
    velocity: LevelVelocity, x: Tensor, now: Tensor, after: Tensor, solver: str = "midpoint"
) -> Tensor:
    """One step of the teacher's flow dx/ds = v, every frame from its own level to its own level.

    Args:
        velocity: v of (x_s, s).
        x: x_s at the levels ``now``.
        now: levels, the shape of x's leading dimensions.
        after: levels to go to.
        solver: "euler" or "midpoint". The second-order rule is the midpoint's and not Heun's
            because it never asks for the velocity at level 0, which flow training hardly visits.

    Raises:
        ValueError: on another solver.
    """
    step = expand(after - now, x)
    first = velocity(x, now)
    if solver == "euler":
        return x + step * first
    if solver == "midpoint":
        return x + step * velocity(x + step / 2 * first, (now + after) / 2)
    raise ValueError(f"solver must be euler or midpoint, got {solver!r}")


def sample_grid_steps(
    shape: tuple[int, ...], count: Tensor | int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Random neighbours (s_i, s_(i-1)) on the grid s_i = i / ``count``, i from 1 to ``count``."""
    index = torch.floor(parts.rand(shape, device) * count)
    return (index + 1) / count, index / count


def grid_size(progress: Tensor, coarsest: int, doublings: int) -> Tensor:
    """``coarsest`` times 2^k, with k rising from 0 to ``doublings`` as ``progress`` goes 0 to 1.

    Neighbours far apart carry the data to the noise in few links but with the teacher's large step
    errors; close ones are accurate, once there is something to carry.
    """
    return coarsest * 2 ** (progress * (doublings + 1)).floor().clamp(0, doublings)


def discrete_loss(
    velocity: Tensor, previous: LevelVelocity, x: Tensor, now: Tensor, moved: Tensor, after: Tensor
) -> Tensor:
    """The loss ||v - v'||^2 per frame; x_s - s v' is the student's estimate one jump closer.

    Equal to ||f(x_s, s) - sg(f(x_s', s'))||^2 / s^2 (arXiv 2303.01469 equation 7 with weight
    1 / s^2), i.e. measured on what the network puts out. The target is the student itself without
    gradient, not an average of it: arXiv 2310.14189 found that the average only lags behind.

    Args:
        velocity: the student's v at (``x``, ``now``), with gradient.
        previous: the student as a function of (x_s, s).
        x: x_s.
        now: s.
        moved: ``x`` after the teacher's jump to ``after``.
        after: s' < s; where it is 0, ``moved`` itself is the target.

    Returns:
        One value a frame, the mean over the frame's values.
    """
    with torch.no_grad():
        goal = data_from_velocity(moved, previous(moved, after), after)
        target = (x - goal) / expand(now, x)
    return (velocity - target).flatten(now.ndim).square().mean(-1)
