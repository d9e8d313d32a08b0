"""Recorded play as a world draws it: its frames, with the rewards and ends of the recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nfd_env.data.latents import LatentEpisode
from nfd_env.training.starts import episode_context
from nfd_env.training.stretches import Stretch, StretchSampler
from nfd_env.worlds.format import World, load_world

_ROWS = 64  # drawn at a time


@dataclass(frozen=True)
class DrawnConfig:
    """Stretches of recorded play that a world draws again under the actions taken.

    Few frames: where the world's future parts from the recorded one, the recorded end says nothing
    about the frames any more.

    Attributes:
        world: an exported world, whose heads do not matter; "" for none.
        share: of the training sequences whose last frames are drawn.
        frames: most frames drawn on end.
        count: stretches, drawn once at the beginning.
        end_share: share of them at the ends of episodes.
        seed: of the choice and of the noise.
    """

    world: str = ""
    share: float = 0.5
    frames: int = 24
    count: int = 4096
    end_share: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.share <= 1 and 0 <= self.end_share < 1):
            raise ValueError("drawn.share must lie in [0, 1] and drawn.end_share in [0, 1)")
        if min(self.frames, self.count) < 1:
            raise ValueError("drawn.frames and drawn.count must be at least 1")


@dataclass(frozen=True)
class DrawnStretch:
    """A stretch and what was drawn for it.

    Attributes:
        stretch: its transitions.
        latents: float16 (stop - start, C, h, w), in place of the recorded frames after each.
        weight: float (stop - start,), see ``StretchSampler.importance``.
    """

    stretch: Stretch
    latents: np.ndarray
    weight: np.ndarray


def draw_stretches(
    settings: DrawnConfig,
    episodes: Sequence[LatentEpisode],
    device: str = "cpu",
    count: int | None = None,
    seed: int = 0,
) -> list[DrawnStretch]:
    """Have the world draw ``count`` (or ``settings.count``) stretches of ``episodes``.

    Raises:
        UnknownWorldError: when there is no such world.
        ValueError: when its latents or actions are not those of ``episodes``.
    """
    world = load_world(settings.world, device)
    shape = episodes[0].latents.shape[1:], episodes[0].actions.shape[1]
    known = world.model.dynamics.config
    if shape != (known.latent_shape, known.action_width):
        raise ValueError(f"{settings.world} draws other latents or takes other actions")
    sampler = StretchSampler(episodes, settings.frames, settings.end_share)
    rng = np.random.default_rng((settings.seed, seed))
    stretches = [sampler.draw(rng) for _ in range(count or settings.count)]
    # Rows of equally long contexts share a pass.
    stretches.sort(key=lambda s: s.start)
    made: list[DrawnStretch] = []
    with tqdm(total=len(stretches), desc="drawing", unit="stretch") as bar:
        for first in range(0, len(stretches), _ROWS):
            part = stretches[first : first + _ROWS]
            seeds = [(settings.seed, seed * 1_000_000 + first + i) for i in range(len(part))]
            latents = _draw(world, episodes, part, seeds).cpu().half().numpy()
            for stretch, row in zip(part, latents, strict=True):
                size = stretch.stop - stretch.start
                made.append(DrawnStretch(stretch, row[:size], sampler.importance(stretch)))
            bar.update(len(part))
    return made


def _draw(
    world: World,
    episodes: Sequence[LatentEpisode],
    stretches: list[Stretch],
    seeds: list[tuple[int, int]],
) -> Tensor:
    """What the world draws (rows, longest, C, h, w); shorter ones go on without an action."""
    longest = max(s.stop - s.start for s in stretches)
    contexts, actions = [], np.zeros((len(stretches), longest, world.codec.width), np.float32)
    for row, stretch in enumerate(stretches):
        episode = episodes[stretch.number]
        actions[row, : stretch.stop - stretch.start] = episode.actions[stretch.start : stretch.stop]
        known = min(stretch.start + 1, world.model.dynamics.config.sight.reach)
        contexts.append(episode_context(episode, stretch.start + 1 - known, known))
    state = world.model.start(contexts, seeds)
    steps = torch.from_numpy(actions).unbind(1)
    return torch.stack([world.model.step(state, action).latents for action in steps], 1)
