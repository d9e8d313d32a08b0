"""What is seen of a batch of frames: pictures, latents or features, as arrays or tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from nfd_env.inference.state import Context
from nfd_env.worlds.load import World

OBSERVATION_TYPES = ("rgb", "latent", "features")
OUTPUTS = ("numpy", "torch")


def observation_space(world: World, obs_type: str) -> spaces.Box:
    """What one environment of a world observes; see ``NFDVectorEnv``."""
    if obs_type == "rgb":
        return spaces.Box(0, 255, (*world.spec.frame_size, 3), np.uint8)
    model = world.model
    latent = obs_type == "latent"
    shape = model.dynamics.config.latent_shape if latent else (model.feature_size,)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def observe(
    world: World,
    obs_type: str,
    frames: Callable[[], Tensor],
    latents: Tensor,
    action: Tensor,
    memory: Tensor,
) -> Tensor:
    """Observations of type ``obs_type``; they belong to the caller.

    Args:
        world: whose frames they are.
        obs_type: see ``OBSERVATION_TYPES``.
        frames: gives the pictures, uint8 (B, H, W, 3), in memory of their own.
        latents: (B, C, h, w).
        action: encoded, (B, action_width), into these frames; zeros where they are the first.
        memory: (B, width), the heads' recurrent state after these frames.
    """
    if obs_type == "rgb":
        return frames()
    if obs_type == "latent":
        return latents.clone()
    # A clone, because what comes out of inference mode cannot be trained on.
    return world.model.features(latents, action, memory).clone()


def observe_before(
    world: World, obs_type: str, contexts: Sequence[Context], count: int, spacing: int
) -> Tensor:
    """The ``count`` observations before the last of each context, oldest first.

    Args:
        world: whose frames they are.
        obs_type: see ``OBSERVATION_TYPES``.
        contexts: one for each environment.
        count: how many; where a context does not reach so far back, its first one is repeated.
        spacing: frames from one to the next.

    Returns:
        (number of contexts, ``count``, *shape of an observation).
    """
    model = world.model
    places = [-1 - spacing * back for back in range(count, 0, -1)]
    seen = torch.stack(
        [
            (model.features_along(c) if obs_type == "features" else c.latents)[
                [max(place, -len(c.latents)) for place in places]
            ].to(model.device, torch.float32)
            for c in contexts
        ]
    )
    if obs_type == "rgb":
        return model.decode(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
    return seen


def to_output(value: Any, output: str) -> Any:
    """Tensors, or the arrays that they hold, also within dicts."""
    if output == "torch":
        return value
    if isinstance(value, dict):
        return {name: to_output(part, output) for name, part in value.items()}
    return value.cpu().numpy() if isinstance(value, Tensor) else value
