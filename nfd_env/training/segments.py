"""Random segments of episodes for what learns from rare ends: drawn often, weighted back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nfd_env.data.latents import LatentEpisode
from nfd_env.data.windows import Places


@dataclass(frozen=True)
class Segment:
    """Transitions ``start`` to ``stop`` - 1 of the episode with this number."""

    number: int
    start: int
    stop: int


class SegmentSampler:
    """Draws segments of up to ``frames`` transitions, a share of them at episodes' ends."""

    def __init__(self, episodes: Sequence[LatentEpisode], frames: int, end_share: float) -> None:
        """Draw from ``episodes``; ``end_share`` in [0, 1) is of those that terminated."""
        self._episodes, self._frames, self._share = episodes, frames, end_share
        self._ends = [i for i, e in enumerate(episodes) if e.terminated[-1]]
        # A segment may begin up to frames - 1 transitions before an episode does, which cuts it
        # short: only so is every transition in equally many segments.
        self._places = Places(len(e.actions) + frames - 1 for e in episodes)

    def draw(self, rng: np.random.Generator) -> Segment:
        """A random segment."""
        frames = self._frames
        if self._ends and rng.random() < self._share:
            number = self._ends[rng.integers(len(self._ends))]
            start = len(self._episodes[number].actions) - int(rng.integers(1, frames + 1))
        else:
            number, place = self._places.find(int(rng.integers(len(self._places))))
            start = place - frames + 1
        stop = min(len(self._episodes[number].actions), start + frames)
        return Segment(number, max(0, start), stop)

    def importance(self, segment: Segment) -> np.ndarray:
        """How much rarer each transition is in the recordings than in the segments.

        Returns:
            Above 0, (stop - start,); a loss weighted by it is that of transitions drawn uniformly.
        """
        share, frames, total = self._share, self._frames, len(self._places)
        uniform = np.full(segment.stop - segment.start, frames / total)
        if not self._ends:
            return np.ones_like(uniform)
        drawn = (1 - share) * uniform
        episode = self._episodes[segment.number]
        if episode.terminated[-1]:
            before_end = len(episode.actions) - 1 - np.arange(segment.start, segment.stop)
            drawn += share / len(self._ends) * np.clip(1 - before_end / frames, 0, None)
        return uniform / drawn
