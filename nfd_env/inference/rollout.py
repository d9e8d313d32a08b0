"""Generating latent frames one after the other through the ring cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nfd_env.flow.path import interpolate
from nfd_env.flow.solvers import Velocity
from nfd_env.models.cache import FrameCache
from nfd_env.models.dynamics import Dynamics

Sampler = Callable[[Velocity, Tensor], Tensor]
"""Turns (velocity, noise (B, n, C, h, w)) into data of the same shape."""


def new_cache(network: Dynamics, batch: int, drafts: int = 1, commits: int = 1) -> FrameCache:
    """An empty cache that fits ``network``."""
    c = network.config
    weight = network.embed.weight
    return FrameCache(
        batch,
        c.layers,
        c.heads,
        c.width // c.heads,
        c.tokens,
        c.sight,
        drafts,
        commits,
        device=weight.device,
        dtype=weight.dtype,
    )


def denoise(
    network: Dynamics,
    cache: FrameCache,
    pending: Tensor,
    pending_actions: Tensor,
    actions: Tensor,
    noise: Tensor,
    sampler: Sampler,
    history_level: float,
    pending_counts: Sequence[int] | None = None,
) -> Tensor:
    """Generate the frames that follow ``pending``, committing ``pending`` in the first pass.

    Rows with different numbers of pending frames share that pass: each row's frames stand without a
    gap, its new ones right behind its pending ones, and what is left over behind them is not seen
    by anything.

    Args:
        network: the dynamics.
        cache: everything before ``pending``; advanced by it.
        pending: (B, c, C, h, w), finished frames already at the history level.
        pending_actions: (B, c, action_width), the actions that led into them.
        actions: (B, n, action_width), the actions leading into the new frames.
        noise: (B, n, C, h, w), the new frames' noise.
        sampler: integrates the velocity from noise to data.
        history_level: the level of ``pending``.
        pending_counts: how many of its ``pending`` frames each row has, 1 to c; None for all.

    Returns:
        (B, n, C, h, w), the new frames without history noise.
    """
    batch, commit = pending.shape[:2]
    counts = [commit] * batch if pending_counts is None else list(pending_counts)
    fused = True

    def first(x: Tensor, levels: Tensor) -> Tensor:
        held = x.new_full((batch, commit), history_level)
        if min(counts) == commit:
            return network.stream(
                cache,
                torch.cat((pending, x), 1),
                torch.cat((held, levels), 1),
                torch.cat((pending_actions, actions), 1),
                commit=commit,
            )
        rows = torch.arange(batch, device=x.device)[:, None]
        new = torch.arange(x.shape[1], device=x.device)
        places = torch.tensor(counts, device=x.device)[:, None] + new

        def behind(finished: Tensor, unfinished: Tensor) -> Tensor:
            both = torch.cat((finished, torch.zeros_like(unfinished)), 1)
            both[rows, places] = unfinished
            return both

        out = network.stream(
            cache,
            behind(pending, x),
            behind(held, levels),
            behind(pending_actions, actions),
            commit=counts,
        )
        return out[rows, places - min(counts)]

    def velocity(x: Tensor, level: float) -> Tensor:
        nonlocal fused
        levels = x.new_full((batch, x.shape[1]), level)
        if not fused:
            return network.stream(cache, x, levels, actions, commit=0)
        fused = False
        return first(x, levels)

    return sampler(velocity, noise)


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
        sampler: see ``denoise``.
        history_level: the level at which finished frames are remembered.
        generator: source of all noise.

    Returns:
        (B, n, C, h, w).
    """
    batch, known = context.shape[:2]
    cache = new_cache(network, batch)

    def randn() -> Tensor:
        return torch.randn(
            (batch, 1, *context.shape[2:]), generator=generator, device=context.device
        )

    def remember(frame: Tensor) -> Tensor:
        return interpolate(frame, randn(), frame.new_full((batch, 1), history_level)).x

    level = context.new_full((batch, 1), history_level)
    for t in range(known - 1):
        network.stream(
            cache, remember(context[:, t : t + 1]), level, actions[:, t : t + 1], commit=1
        )
    frame = context[:, -1:]
    made = []
    for t in range(known, actions.shape[1]):
        frame = denoise(
            network,
            cache,
            remember(frame),
            actions[:, t - 1 : t],
            actions[:, t : t + 1],
            randn(),
            sampler,
            history_level,
        )
        made.append(frame)
    return torch.cat(made, 1)
