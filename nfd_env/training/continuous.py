"""The continuous-time part of distillation (sCM, arXiv 2410.11081): what a tangent asks for."""

from __future__ import annotations

import torch
from torch import nn

from nfd_env.models.dynamics import Dynamics
from nfd_env.models.layers import sinusoid


@torch.no_grad()
def smooth_levels(network: Dynamics, fastest: float) -> None:
    """Make ``network``'s response to the level smooth, in place and for good.

    A sinusoidal feature that turns f radians a unit of level contributes f times its weight to the
    derivative by the level. Flow training leaves random weight on the fast ones, which does nothing
    to the velocity but drowns the tangent. Their part is replaced by what the slower features can
    express of it, by least squares over the levels, and their weights stay zero in training.

    Args:
        network: changed only in ``embed_level[0]``.
        fastest: radians a unit of level; faster features are silenced.

    Raises:
        ValueError: when no feature would be left.
    """
    linear = network.embed_level[0]
    assert isinstance(linear, nn.Linear)
    levels = torch.linspace(0, 1, 4001)
    features = sinusoid(levels, linear.in_features).double()
    # A feature turns by its speed over the whole range of levels: read the speed off ``sinusoid``.
    half = linear.in_features // 2
    first = torch.atan2(features[1, half:], features[1, :half])
    slow = (first / levels[1].double() <= fastest).repeat(2)
    if not slow.any():
        raise ValueError(f"no level feature turns as slowly as {fastest} radians")
    weight, bias = linear.weight.double().cpu(), linear.bias.double().cpu()
    kept = torch.cat((features[:, slow], torch.ones(len(levels), 1)), 1)
    missing = features[:, ~slow] @ weight[:, ~slow].T
    # The slowest features are nearly constant, so the change is kept small by a ridge.
    gram = kept.T @ kept / len(levels) + 1e-4 * torch.eye(kept.shape[1])
    change = torch.linalg.solve(gram, kept.T @ missing / len(levels)).T
    weight[:, slow] += change[:, :-1]
    weight[:, ~slow] = 0
    linear.weight.copy_(weight)
    linear.bias.copy_(bias + change[:, -1])
    if linear.weight.requires_grad:
        mask = slow.float()
        linear.weight.register_hook(lambda gradient: gradient * mask.to(gradient.device))
