"""What a frame's velocity is likely to be, judged by the frame before it, place by place.

Most of a picture stays as it is from one frame to the next, and what a network adds to it by
mistake, it adds again with every frame. A network that says how much each place may change, and
beside it what else it knows in units of the uncertainty that this leaves, copies what stands still
as exactly as it is sure of that. This is the preconditioning of EDM (arXiv 2206.00364, section 5)
with a second observation: beside the noisy frame x_s = (1 - s) x0 + s eps also the one before it,
p = (1 - h) z + h eps', where x0 and z have mean 0, deviation 1, and x0 = sqrt(1 - q) z + sqrt(q) n
with n independent of z: q is the share of the place's variance that is new.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-4
"""The smallest share of change that is reckoned with: beyond it all hangs on rounding."""


def linear_guess(
    level: Tensor, before_level: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best linear guess v = a x_s + b p of the velocity eps - x0, and how far off it is.

    Args:
        level: s in [0, 1], (...).
        before_level: h in [0, 1], (...); 1 where there is no frame before.
        change: q in [``LEAST``, 1 - ``LEAST``], (..., C, h, w), or what broadcasts to it.

    Returns:
        a, b and the standard deviation of v given x_s and p, each (..., C, h, w).
    """
    s, h = (x[..., None, None, None].float() for x in (level, before_level))
    kept = (1 - h).square()
    before = kept + h.square()
    # Mean b' p and variance of x0 given p; then Bayes' rule with x_s, and v = (x_s - x0) / s.
    mean = (1 - change).sqrt() * (1 - h) / before
    variance = (h.square() + change * kept) / before
    total = s.square() + variance * (1 - s).square()
    a = (s - variance * (1 - s)) / total
    return a, -s / total * mean, (variance / total).sqrt()


def trusted(change: Tensor, stillness: float) -> Tensor:
    """The share of a network's correction of ``linear_guess`` that is believed, like ``change``.

    Where next to nothing changes a correction is mostly the network's own error, which is made
    again with every frame, so that walls grow brighter until nothing else is seen. As in Wiener's
    filter, signal over signal and error: q / (q + ``stillness``), the latter being the share of
    variance from which on a correction is signal rather than error; 0 believes all.
    """
    return change / (change + stillness)


def shrinkage(level: Tensor) -> Tensor:
    """What to multiply x_s with for the mean of x0 that it lets one expect, like ``level`` = s."""
    return (1 - level) / ((1 - level).square() + level.square())


def frame_change(frames: Tensor) -> Tensor:
    """The share q of each latent channel's variance that is new in a frame, over all places.

    Args:
        frames: (n, T, C, h, w), T >= 2, with mean 0.

    Returns:
        float32 (C,), between ``LEAST`` and 1.
    """
    now, before = frames[:, 1:].double(), frames[:, :-1].double()
    axes = (0, 1, 3, 4)
    power = (now.square().sum(axes) * before.square().sum(axes)).sqrt()
    correlation = (now * before).sum(axes) / power.clamp_min(torch.finfo(torch.float64).tiny)
    return (1 - correlation.clamp_min(0).square()).clamp(LEAST, 1).float()
