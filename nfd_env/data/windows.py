"""Places in episodes: of windows of frames, of the actions into frames, of ends that were shown.

An episode of T transitions has frames 0 to T. ``actions[t]`` leads from frame t *into* frame t + 1;
nothing leads into frame 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from nfd_env.spaces import ActionCodec

if TYPE_CHECKING:
    from torch import Tensor

    from nfd_env.data.episodes import EpisodeReference, Episodes


RUN = 16
"""Frames in a row that are drawn together where decoding one costs as much as decoding many."""


class Places:
    """Numbers the places of all windows of as many consecutive frames, episode after episode."""

    def __init__(self, frames: Iterable[int], window: int = 1) -> None:
        """Count the places.

        Args:
            frames: frames of each episode.
            window: frames of a window; an episode of n frames has n - window + 1 places for it.
        """
        self.room = np.maximum(np.fromiter(frames, np.int64) - window + 1, 0)
        self._ends = np.cumsum(self.room)

    def __len__(self) -> int:
        """Places in all episodes; 0 where none is as long as the window."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, place: int) -> tuple[int, int]:
        """Number of the episode and of the window's first frame in it."""
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)}")
        episode = int(np.searchsorted(self._ends, place, side="right"))
        return episode, int(place - self.number(episode, 0))

    def draw(self, rng: np.random.Generator, count: int, run: int = 1) -> np.ndarray:
        """``count`` random places; ``run`` of them follow one another, where episodes allow it."""
        if run == 1:
            return rng.integers(0, len(self), count)
        begins = rng.integers(0, len(self), -(-count // run))
        # Not beyond the episode's last place; a run that would go there begins earlier.
        last = self._ends[np.searchsorted(self._ends, begins, side="right")] - 1
        begins = np.minimum(begins, np.maximum(last - run + 1, last + 1 - self._room_of(begins)))
        places = begins[:, None] + np.arange(run)
        return np.minimum(places, last[:, None]).ravel()[:count]

    def _room_of(self, places: np.ndarray) -> np.ndarray:
        return self.room[np.searchsorted(self._ends, places, side="right")]

    def number(self, episode: int, first: int) -> int:
        """The place of the window that begins at frame ``first`` of an episode."""
        return int(self._ends[episode] - self.room[episode]) + first


def actions_into(actions: np.ndarray, first: int, frames: int) -> np.ndarray:
    """Encoded actions that lead into frames ``first`` to ``first + frames - 1``.

    Args:
        actions: (T, action_width), those of a whole episode.
        first: number of the first frame.
        frames: how many.

    Returns:
        (frames, action_width); zeros into an episode's first frame.
    """
    into = np.zeros((frames, *actions.shape[1:]), actions.dtype)
    into[max(0, 1 - first) :] = actions[max(0, first - 1) : first + frames - 1]
    return into


def encoded_into(episode: EpisodeReference, codec: ActionCodec, first: int, frames: int) -> Tensor:
    """The same of a recorded episode, float32 (frames, action_width)."""
    import torch  # who records does without

    begin = max(0, first - 1)
    encoded = codec.encode(torch.from_numpy(episode.actions[begin : first + frames - 1]))
    return torch.from_numpy(actions_into(encoded.numpy(), first - begin, frames))


def shown_lengths(episodes: Episodes) -> np.ndarray:
    """How many transitions of each episode are shown, int64; see ``shown_transitions``.

    Episodes are looked at only where their environment may show no frame at an end.
    """
    if not len(episodes) or episodes[0].spec.source.get("terminal_frame", True):
        return episodes.lengths
    return np.array([shown_transitions(episode)[0] for episode in episodes], np.int64)


def shown_transitions(episode: EpisodeReference) -> tuple[int, np.ndarray]:
    """How many transitions led into a frame that was seen, and which of them ended the episode.

    An environment may show no frame at its end; the recording then repeats the one before. That
    copy would give the end away, so the last transition is left out, and the one before it counts
    as the end: after a termination, and where an environment of that kind truncated by itself.

    Returns:
        The number n, from 0 to T, and ``terminated``, boolean (n,).
    """
    count, terminated = len(episode), episode.terminated.copy()
    if not episode.spec.source.get("terminal_frame", True) and (
        terminated[-1] or np.array_equal(episode.frames[-2], episode.frames[-1])
    ):
        count -= 1
        terminated[count - 1] = terminated[count]
    return count, terminated[:count]
