"""What a frame's velocity is likely to be, judged by the frame before it alone.

Most of a picture stays as it is from one frame to the next. A network that adds its output to the
best linear guess spends itself on what changes, and begins its training as a picture that stands
still. This is the preconditioning of EDM (arXiv 2206.00364, section 5) with a second observation:
beside the noisy frame x_s = (1 - s) x0 + s eps also the one before it, p = (1 - h) z + h eps',
where x0 and z have mean 0, deviation 1 and the correlation r.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 0.98
"""The largest correlation that is reckoned with: beyond it the guess would hang on rounding."""


def linear_guess(
    level: Tensor, before_level: Tensor, correlation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best linear guess v = a x_s + b p of the velocity eps - x0.

    Args:
        level: s in [0, 1], (...).
        before_level: h in [0, 1], (...); 1 where there is no frame before.
        correlation: r of each latent channel, (C,), between 0 and ``MOST``.

    Returns:
        a and b, each (..., C, 1, 1), and what to multiply a network's output with, (..., 1, 1, 1):
        how far a guess from x_s alone is off. That from both is off by less on average, but as much
        where something moves.
    """
    s, h = level[..., None].float(), before_level[..., None].float()
    # Variances of what is observed, their covariance, and the covariances with the velocity.
    noisy, before = (1 - s).square() + s.square(), (1 - h).square() + h.square()
    both = (1 - s) * (1 - h) * correlation
    with_noisy, with_before = 2 * s - 1, (h - 1) * correlation
    determinant = noisy * before - both.square()
    a = (with_noisy * before - with_before * both) / determinant
    b = (with_before * noisy - with_noisy * both) / determinant
    return a[..., None, None], b[..., None, None], noisy.rsqrt()[..., None, None]


def shrinkage(level: Tensor) -> Tensor:
    """What to multiply x_s with for the mean of x0 that it lets one expect, like ``level`` = s."""
    return (1 - level) / ((1 - level).square() + level.square())


def frame_correlation(frames: Tensor) -> Tensor:
    """The correlation of each latent channel with itself a frame earlier.

    Args:
        frames: (n, T, C, h, w), T >= 2, with mean 0.

    Returns:
        float32 (C,), between 0 and ``MOST``.
    """
    now, before = frames[:, 1:].double(), frames[:, :-1].double()
    axes = (0, 1, 3, 4)
    power = (now.square().sum(axes) * before.square().sum(axes)).sqrt()
    correlation = (now * before).sum(axes) / power.clamp_min(torch.finfo(torch.float64).tiny)
    return correlation.clamp(0, MOST).float()
