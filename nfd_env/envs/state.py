"""A moment of a batch of environments: what the future of each depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nfd_env.inference.state import WorldState
from nfd_env.models.rows import Rows


@dataclass(eq=False)
class EnvState(Rows):
    """A moment of a vector env, see ``NFDVectorEnv.save_state``.

    Attributes:
        world: what the next frames depend on.
        shown: (B, C, h, w), latents of the frames that are observed. Where an episode has ended
            within a ``frame_skip``, the world may have gone on; this and ``memory`` have not.
        memory: (B, width), the heads' recurrent state after these frames.
        steps: int64 (B,), of the running episodes.
        ended: bool (B,), episodes that have ended and wait for a reset.
        seeds: of each environment.
        episodes: number of the episode of its seed that each is in.
    """

    world: WorldState
    shown: Tensor
    memory: Tensor
    steps: np.ndarray
    ended: np.ndarray
    seeds: list[int]
    episodes: list[int]

    def __len__(self) -> int:
        """Number of environments."""
        return len(self.seeds)
