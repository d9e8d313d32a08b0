"""Do episodes end in the world where they ended in the game?

Held-out episodes that terminated are played once more, in the world, from shortly before their end
and with the actions that were taken. What ends an episode is rare and fast; distances between
distributions of frames hardly show whether the world lets it happen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nfd_env.data.windows import shown_transitions
from nfd_env.evaluation.held_out import EncodedEpisodes, recorded_context
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import World

AHEAD = (4, 12, 32)  # frames before the end at which the world takes over
EARLIER = 3  # an end at most so many frames before the recorded one counts as that one
LATER = 8  # likewise behind it; the last action is kept up
_ENDING_SEEDS = 20_000  # episode numbers of their noise start there


@dataclass(frozen=True)
class Ending:
    """Probabilities of an end before the recorded one and about there.

    Attributes:
        before: that the world ends the episode earlier.
        there: that it does so about there.
        recorded_before: what the heads make of the recorded frames, which is as good as a world
            with these heads can be.
        recorded_there: likewise.
    """

    before: float
    there: float
    recorded_before: float
    recorded_there: float


@dataclass(frozen=True)
class ReplayedEndings:
    """How many episodes were played again, and what came of it.

    Attributes:
        episodes: that terminated and are long enough.
        ahead: by the number of frames before their end; empty without episodes.
    """

    episodes: int
    ahead: dict[int, Ending]


def replay_endings(
    world: World, model: WorldModel, encoded: EncodedEpisodes, seed: int
) -> ReplayedEndings:
    """Play the ends of held-out episodes again.

    Args:
        world: whose frames and actions they are.
        model: with the sampling to judge.
        encoded: the held-out episodes.
        seed: of the noise.
    """
    longest = max(AHEAD) + model.dynamics.config.window
    shown = [shown_transitions(episode) for episode in encoded.episodes]
    last = {i: n for i, (n, ends) in enumerate(shown) if n > longest and ends[-1]}
    endings = {}
    for ahead in AHEAD if last else ():
        contexts = [recorded_context(world, encoded, i, end - ahead) for i, end in last.items()]
        actions = torch.stack([_actions(world, encoded, *item, ahead) for item in last.items()], 1)
        frames = torch.stack([_latents(encoded, *item, ahead) for item in last.items()])
        seeds = [(seed, _ENDING_SEEDS + i) for i in range(len(contexts))]
        state = model.start(contexts, seeds)
        with torch.inference_mode():
            logits, _ = model.heads(
                frames.to(model.device),
                actions[:ahead].transpose(0, 1).to(model.device, torch.float32),
                state.memory,
            )
        hazard = torch.stack([model.step(state, action).hazard for action in actions], 1)
        recorded = _split(logits[..., 0].sigmoid(), ahead)
        endings[ahead] = Ending(*_split(hazard, ahead), *recorded)
    return ReplayedEndings(len(last), endings)


def _actions(world: World, encoded: EncodedEpisodes, index: int, end: int, ahead: int) -> Tensor:
    taken = encoded.episodes[index].actions[end - ahead : end]
    kept = np.concatenate((taken, np.repeat(taken[-1:], LATER, 0)))
    return world.codec.encode(torch.from_numpy(kept))


def _latents(encoded: EncodedEpisodes, index: int, end: int, ahead: int) -> Tensor:
    first = encoded.number(index, end - ahead + 1)
    return encoded.latents(np.arange(first, first + ahead))


def _split(hazard: Tensor, ahead: int) -> tuple[float, float]:
    """Mean probabilities of an end before the recorded one and about there."""
    alive = torch.cumprod(1 - hazard.double(), 1).mean(0)
    begin = ahead - 1 - EARLIER  # the last of ``ahead`` steps leads into the recorded end
    reached = float(alive[begin - 1]) if begin > 0 else 1.0
    return 1 - reached, reached - float(alive[-1])
