"""Recordings as latents: encoded once, kept on disk, trained on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from nfd_env.data.episodes import EpisodeReference
from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import Places, actions_into, shown_lengths, shown_transitions
from nfd_env.parts import WHOLE, Part

_KEPT = 4_000_000  # transitions whose actions and rewards stay in memory: some 100 bytes each
_MAPS = 256  # files that are open at a time


@dataclass(frozen=True)
class LatentEpisode:
    """An episode as the dynamics and the heads see it; T transitions, T+1 latents.

    Attributes:
        latents: float16 (T+1, C, h, w), read-only; memory is taken by what is looked at.
        actions: float32 (T, action_width), encoded; ``actions[t]`` leads into ``latents[t + 1]``.
        rewards: float32 (T,).
        terminated: bool (T,).
        signals: float32 (T, k), see ``CollectConfig.signals``.
    """

    latents: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    signals: np.ndarray


class LatentEpisodes(Sequence[LatentEpisode]):
    """The episodes of one split as latents; read when they are asked for, the latest ones kept."""

    def __init__(self, recordings: RecordedDataset, folder: str | Path, split: str) -> None:
        """See ``LatentDataset``."""
        self._codec, self._folder = recordings.spec.codec, Path(folder)
        self._episodes = recordings.split(split)
        shown = shown_lengths(self._episodes)
        self._chosen = np.flatnonzero(shown >= 2)
        self.lengths = shown[self._chosen]
        ended = self._episodes.terminated() if len(shown) else np.zeros(0, bool)
        self.ended = ended[self._chosen]
        most = len(self) * _KEPT // max(1, int(self.lengths.sum()))
        self._latents = lru_cache(_MAPS)(self._mapped)
        self._episode = lru_cache(max(64, most))(self._made)

    def _mapped(self, shard: str) -> np.ndarray:
        return np.load(self._folder / f"{shard}.npy", mmap_mode="r")

    def reference(self, number: int) -> EpisodeReference:
        """Where the recording of one of them lies."""
        return self._episodes[int(self._chosen[number])]

    def _made(self, number: int) -> LatentEpisode:
        reference = self.reference(number)
        count, terminated = shown_transitions(reference)
        begin = reference.frame_offset
        return LatentEpisode(
            self._latents(reference.shard_name)[begin : begin + count + 1],
            self._codec.encode(torch.from_numpy(reference.actions[:count])).numpy(),
            reference.rewards[:count],
            terminated,
            reference.signals[:count],
        )

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._chosen)

    @overload
    def __getitem__(self, where: int) -> LatentEpisode: ...
    @overload
    def __getitem__(self, where: slice) -> list[LatentEpisode]: ...
    def __getitem__(self, where: int | slice) -> LatentEpisode | list[LatentEpisode]:
        """One of them, or several."""
        numbers = range(len(self))[where]
        if isinstance(numbers, range):
            return [self._episode(number) for number in numbers]
        return self._episode(numbers)


class LatentDataset:
    """Windows of the episodes of one split, as latents."""

    def __init__(self, recordings: RecordedDataset, folder: str | Path, split: str) -> None:
        """Open what encoding the recordings has written, ``SHARD.npy`` for each shard.

        A last transition whose frame was not shown is left out, see ``shown_transitions``.
        """
        self.episodes = LatentEpisodes(recordings, folder, split)
        if not self.episodes:
            raise ValueError(f"{recordings.folder} has no {split} episodes")
        self._lengths, self._ends = self.episodes.lengths, self.episodes.ended

    @property
    def transitions(self) -> int:
        """Transitions in all episodes."""
        return int(self._lengths.sum())

    def windows(
        self,
        rng: np.random.Generator,
        count: int,
        frames: int,
        ending_share: float = 0.0,
        ending_frames: int = 0,
        part: Part = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        """Random windows of ``frames`` frames within episodes.

        Args:
            rng: the randomness.
            count: windows.
            frames: frames each.
            ending_share: in [0, 1], the probability that a window lies at the end of an episode
                that terminated. What ends episodes is rare, and all windows alike hardly show it.
            ending_frames: such a window stops fewer than so many frames before the episode's last;
                0 for ``frames``.
            part: which of the windows to read; all are drawn.

        Returns:
            float32 latents (rows, frames, C, h, w) of ``part``, and encoded actions
            (rows, frames, action_width) leading *into* each frame; zeros into an episode's first.
        """
        places = Places(self._lengths + 1, frames)
        if not len(places):
            raise ValueError(f"no episode has {frames} frames")
        room = places.room
        ended = np.flatnonzero(self._ends & (room > 0))
        chosen = []
        for place in rng.integers(0, len(places), count):
            number, start = places.find(place)
            # No draw without a share, so that batches stay what they were.
            if ending_share and len(ended) and rng.random() < ending_share:
                number = int(rng.choice(ended))
                most = min(ending_frames or frames, room[number])
                start = int(room[number] - 1 - rng.integers(most))
            chosen.append((number, start))
        latents, actions = [], []
        for number, start in chosen[part.rows(count)]:
            episode = self.episodes[number]
            latents.append(episode.latents[start : start + frames])
            actions.append(actions_into(episode.actions, start, frames))
        return (
            torch.from_numpy(np.stack(latents)).float(),
            torch.from_numpy(np.stack(actions)),
        )
