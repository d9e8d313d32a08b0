"""Samplers: plain functions of a velocity callable, with the noise injected by the caller.

``velocity(x, level)`` takes a batch shaped like the noise and one level (a float) for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def level_grid(steps: int, shift: float = 1.0) -> list[float]:
    """``steps`` + 1 levels from 1 to 0; ``shift`` > 1 spends more of them near the noise.

    Raises:
        ValueError: when ``steps`` < 1.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in uniform]


def sample_euler(velocity: Velocity, noise: Tensor, levels: list[float]) -> Tensor:
    """First-order integration of dx/ds = v from ``levels[0]`` = 1 down to ``levels[-1]`` = 0."""
    x = noise
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        x = x + (after - now) * velocity(x, now)
    return x


def sample_dpm_solver_pp(velocity: Velocity, noise: Tensor, levels: list[float]) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2, for alpha = 1 - s and sigma = s.

    With lambda = log(alpha / sigma), x0 estimates D and h = lambda_i - lambda_{i-1}:
    x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (e^{-h} - 1) D', where D' extrapolates the last
    two estimates linearly in lambda. The first step (from pure noise, lambda = -infinity) and the
    last (to data, lambda = infinity) are first order, where the formula has its limits, and so is
    the second, whose predecessor's lambda is infinite: up to 3 steps it equals Euler's method.
    """
    x = noise
    previous: Tensor | None = None
    previous_lambda = -math.inf
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        estimate = x - now * velocity(x, now)
        now_lambda, after_lambda = _log_snr(now), _log_snr(after)
        extrapolated = estimate
        if previous is not None and math.isfinite(previous_lambda) and math.isfinite(after_lambda):
            ratio = (after_lambda - now_lambda) / (now_lambda - previous_lambda)
            extrapolated = torch.lerp(previous, estimate, 1 + ratio / 2)
        # -alpha (e^{-h} - 1), written without logarithms so that s = 1 and s = 0 are exact.
        weight = (1 - after) - after / now * (1 - now)
        x = after / now * x + weight * extrapolated
        previous, previous_lambda = estimate, now_lambda
    return x


def sample_consistency(
    velocity: Velocity, noise: Tensor, levels: list[float], renoise: Sequence[Tensor]
) -> Tensor:
    """Multistep consistency sampling, arXiv 2303.01469 algorithm 1, of a distilled network.

    At each level the data estimate x0 = x_s - s v is where the flow would end; between the levels
    it is noised again with fresh noise. One step is ``noise`` - v(``noise``, 1).

    Args:
        velocity: of the distilled network.
        noise: x at ``levels[0]`` = 1.
        levels: from 1 to 0, see ``level_grid``.
        renoise: one tensor shaped like ``noise`` for each step after the first; more are ignored.

    Raises:
        ValueError: when ``renoise`` is too short.
    """
    if len(renoise) < len(levels) - 2:
        raise ValueError(
            f"{len(levels) - 1} consistency steps need {len(levels) - 2} further noises, "
            f"got {len(renoise)}"
        )
    x = noise
    for step, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x = x - now * velocity(x, now)
        if step < len(levels) - 2:
            x = torch.lerp(x, renoise[step], after)
    return x


def _log_snr(level: float) -> float:
    if level >= 1:
        return -math.inf
    return math.inf if level <= 0 else math.log((1 - level) / level)
