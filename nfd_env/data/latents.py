"""Recordings as latents: encoded once, kept on disk, trained on from memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import Places, actions_into, shown_transitions
from nfd_env.parts import WHOLE, Part


@dataclass(frozen=True)
class LatentEpisode:
    """An episode as the dynamics and the heads see it; T transitions, T+1 latents.

    Attributes:
        latents: float16 (T+1, C, h, w).
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


class LatentDataset:
    """The episodes of one split as latents, in memory."""

    def __init__(self, recordings: RecordedDataset, folder: str | Path, split: str) -> None:
        """Load what encoding the recordings has written, ``SHARD.npy`` for each shard.

        A last transition whose frame was not shown is left out, see ``shown_transitions``.
        """
        codec = recordings.spec.codec
        arrays: dict[Path, np.ndarray] = {}
        self.episodes: list[LatentEpisode] = []
        for reference in recordings.split(split):
            if reference.shard not in arrays:
                arrays[reference.shard] = np.load(Path(folder) / f"{reference.shard.name}.npy")
            start = reference.frame_offset
            count, terminated = shown_transitions(reference)
            if count < 2:
                continue
            self.episodes.append(
                LatentEpisode(
                    arrays[reference.shard][start : start + count + 1],
                    codec.encode(torch.from_numpy(reference.actions[:count])).numpy(),
                    reference.rewards[:count],
                    terminated,
                    reference.signals[:count],
                )
            )
        if not self.episodes:
            raise ValueError(f"{recordings.folder} has no {split} episodes")
        self._lengths = np.array([len(e.actions) for e in self.episodes])
        self._ends = np.array([bool(e.terminated[-1]) for e in self.episodes])

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
