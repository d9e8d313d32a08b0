"""A moment of a batch of environments: what the future of each depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nfd_env.inference.state import WorldState


@dataclass
class EnvState:
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

    def take(self, rows: Sequence[int]) -> EnvState:
        """An independent copy of some environments, in this order, repeated where repeated."""
        listed = [int(r) for r in rows]
        index = torch.tensor(listed, device=self.shown.device)
        return EnvState(
            self.world.take(listed),
            self.shown[index],
            self.memory[index],
            self.steps[listed],
            self.ended[listed],
            [self.seeds[r] for r in listed],
            [self.episodes[r] for r in listed],
        )

    def put(self, rows: Sequence[int], other: EnvState) -> None:
        """Replace some environments by those of ``other``."""
        listed = [int(r) for r in rows]
        index = torch.tensor(listed, device=self.shown.device)
        self.world.put(listed, other.world)
        # Out of place, so that tensors handed out earlier keep their values.
        self.shown = self.shown.index_copy(0, index, other.shown)
        self.memory = self.memory.index_copy(0, index, other.memory)
        self.steps[listed], self.ended[listed] = other.steps, other.ended
        for row, seed, episode in zip(listed, other.seeds, other.episodes, strict=True):
            self.seeds[row], self.episodes[row] = seed, episode
