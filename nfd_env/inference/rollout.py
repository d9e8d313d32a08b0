"""Generating latent frames one after the other through the ring cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfd_env.flow.path import interpolate
from nfd_env.inference.sampling import Sampler
from nfd_env.models.cache import FrameCache
from nfd_env.models.dynamics import Dynamics


def new_cache(network: Dynamics, batch: int, room: int = 1) -> FrameCache:
    """An empty cache that fits ``network``, for passes that finish or draft ``room`` frames."""
    c, weight = network.config, network.embed.weight
    head_width = c.width // c.heads
    sizes = c.layers, c.heads, head_width, c.tokens, (c.recent, *c.latent_shape), c.window, room
    return FrameCache.empty(batch, *sizes, weight.device, weight.dtype)


class Ahead(NamedTuple):
    """What is to be drawn next, and what has been drawn before it.

    Attributes:
        cache: everything before ``pending``.
        pending: (B, c, C, h, w), finished frames already at the history level.
        pending_actions: (B, c, action_width), the actions that led into them.
        actions: (B, n, action_width), the actions leading into the new frames.
        counts: how many of its ``pending`` frames each row has, 1 to c; None for all.
    """

    cache: FrameCache
    pending: Tensor
    pending_actions: Tensor
    actions: Tensor
    counts: Sequence[int] | None = None


class FusedVelocity:
    """Velocities of new frames; the first pass also commits the pending ones to the cache.

    Rows with different numbers of pending frames share that pass: each row's frames stand without a
    gap, its new ones right behind its pending ones, and what is left over behind them is not seen
    by anything.
    """

    def __init__(self, network: Dynamics, ahead: Ahead, history_level: float) -> None:
        """Of frames ``ahead``, the pending ones at ``history_level``; the first call commits."""
        self._network, self._ahead, self._level = network, ahead, history_level
        self._committed = False

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """See ``nfd_env.flow.solvers.Velocity``: x (B, n, C, h, w) -> the same shape."""
        cache, pending, into, actions, all_counts = self._ahead
        levels = x.new_full(x.shape[:2], level)
        if self._committed:
            return self._network.stream(cache, x, levels, actions, commit=0)
        self._committed = True
        held = x.new_full(pending.shape[:2], self._level)
        parts = [(pending, x), (held, levels), (into, actions)]
        if all_counts is None:
            both = (torch.cat(part, 1) for part in parts)
            return self._network.stream(cache, *both, commit=pending.shape[1])
        counts = torch.tensor(all_counts, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        places = counts[:, None] + torch.arange(x.shape[1], device=x.device)
        packed = []
        for finished, unfinished in parts:
            frames = torch.cat((finished, torch.zeros_like(unfinished)), 1)
            frames[rows, places] = unfinished
            packed.append(frames)
        out = self._network.stream(cache, *packed, commit=all_counts)
        return out[rows, places - min(all_counts)]


@torch.inference_mode()
def rollout_latents(
    network: Dynamics,
    context: Tensor,
    actions: Tensor,
    sampler: Sampler,
    history_level: float,
    generator: torch.Generator,
) -> Tensor:
    """Continue ``context`` frame by frame under given actions.

    Args:
        network: the dynamics, in eval mode.
        context: (B, K, C, h, w) real latents, K >= 1.
        actions: (B, K + n, action_width); ``actions[:, t]`` leads into frame t.
        sampler: integrates the velocity from noise to data.
        history_level: the level at which finished frames are remembered.
        generator: source of all noise.

    Returns:
        (B, n, C, h, w).
    """
    batch, known = context.shape[:2]
    cache = new_cache(network, batch)
    shape = batch, 1, *context.shape[2:]
    level = context.new_full((batch, 1), history_level)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator, device=context.device, dtype=context.dtype)

    def remember(frame: Tensor) -> Tensor:
        return interpolate(frame, randn(), level).x

    for t in range(known - 1):
        frame = remember(context[:, t : t + 1])
        network.stream(cache, frame, level, actions[:, t : t + 1], commit=1)
    frame, made = context[:, -1:], []
    for t in range(known, actions.shape[1]):
        into, action = actions[:, t - 1 : t], actions[:, t : t + 1]
        ahead = Ahead(cache, remember(frame), into, action)
        velocity = FusedVelocity(network, ahead, history_level)
        frame = sampler(velocity, randn())
        made.append(frame)
    return torch.cat(made, 1)
