"""Recorded moments played on in a world, under the recorded actions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nfd_env.data.shards import EpisodeReference
from nfd_env.data.windows import Places, encoded_into
from nfd_env.inference.state import Context, Transition
from nfd_env.worlds.load import World


@dataclass(frozen=True)
class Moment:
    """Where a rollout begins.

    Attributes:
        episode: the recorded one.
        first: number of the first frame that the world is shown.
        shown: frames that it is shown.
    """

    episode: EpisodeReference
    first: int
    shown: int

    @property
    def now(self) -> int:
        """Number of the last frame that the world is shown."""
        return self.first + self.shown - 1

    @property
    def left(self) -> int:
        """Transitions that the recording goes on for."""
        return len(self.episode) - self.now


def moments(
    episodes: Sequence[EpisodeReference], shown: int, ahead: int, count: int, seed: int = 0
) -> list[Moment]:
    """``count`` random moments with ``shown`` frames and at least ``ahead`` transitions after them.

    Raises:
        ValueError: when no episode is that long.
    """
    places = Places((len(e) + 1 for e in episodes), shown + ahead)
    if not len(places):
        raise ValueError(f"no episode has {shown + ahead} frames")
    chosen = np.random.default_rng(seed).integers(0, len(places), count)
    found = (places.find(int(place)) for place in chosen)
    return [Moment(episodes[number], first, shown) for number, first in found]


@torch.inference_mode()
def replay(world: World, where: Sequence[Moment], frames: int, seed: int) -> Iterator[Transition]:
    """Yield ``frames`` transitions of all rollouts; ends are reported, not acted on.

    After the end of its recording a rollout holds the last action.
    """
    model, codec = world.model, world.codec
    contexts, actions = [], []
    for moment in where:
        shown = np.array(moment.episode.frames[moment.first : moment.now + 1])
        into = encoded_into(moment.episode, codec, moment.first, moment.shown)
        contexts.append(
            Context(model.encode(torch.from_numpy(shown)), into, beginning=moment.first == 0)
        )
        known = min(frames, moment.left)
        ahead = encoded_into(moment.episode, codec, moment.now + 1, known)
        actions.append(torch.cat((ahead, ahead[-1:].expand(frames - known, -1))))
    state = model.start(contexts, [(seed, number) for number in range(len(where))])
    every = torch.stack(actions)
    for frame in range(frames):
        yield model.step(state, every[:, frame])
