"""How a finished world plays on, beside the recordings it was made from.

The heads have learned on recorded frames and are less sure on generated ones. One factor on the
odds of an end is fitted so that, from the same moments and under the same actions, as many episodes
end in the world as ended in the recordings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from nfd_env.data.shards import RecordedDataset
from nfd_env.recipe.replay import moments, replay
from nfd_env.worlds.load import World

_SHOWN = 4  # frames that the world is shown first
_LONG, _ROLLOUTS = 512, 8  # frames and rollouts that tell whether pictures last
_MOST_ODDS = 8.0  # a factor beyond this would hide that the heads do not see ends at all


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and what it was fitted to.

    Attributes:
        hazard_odds: factor on the odds of an end.
        ends: expected ends in the world with that factor, over recorded ends; NaN without any.
        reward: sum of the predicted rewards over that of the recorded ones; NaN where that is 0.
        windows: rollouts.
        frames: of each.
    """

    hazard_odds: float
    ends: float
    reward: float
    windows: int
    frames: int


def calibrate(
    world: World, recordings: RecordedDataset, windows: int = 192, frames: int = 64, seed: int = 0
) -> Calibration:
    """Play recorded moments of training episodes on in ``world`` with the recorded actions.

    After a recorded end the last action is held. A window whose episode goes on beyond its frames
    counts as one without an end.

    Args:
        world: exported with odds of 1.
        recordings: what it was trained on.
        windows: rollouts.
        frames: frames each.
        seed: of the choice of moments and of the world's noise.
    """
    where = moments(recordings.split("train"), _SHOWN, 1, windows, seed)
    lengths = torch.tensor([min(frames, moment.left) for moment in where])
    ended = [m.left <= frames and bool(m.episode.terminated[-1]) for m in where]
    rewards = sum(float(m.episode.rewards[m.now :][:frames].sum()) for m in where)
    hazards, predicted = [], 0.0
    for frame, drawn in enumerate(replay(world, where, frames, seed)):
        hazards.append(drawn.hazard.double().cpu())
        predicted += float((drawn.reward.cpu() * (frame < lengths)).sum())
    hazard, true = torch.stack(hazards, 1), float(sum(ended))
    odds = _fit(hazard, true) if true else 1.0
    return Calibration(
        hazard_odds=odds,
        ends=_expected(hazard, odds) / true if true else math.nan,
        reward=predicted / rewards if rewards else math.nan,
        windows=windows,
        frames=frames,
    )


def energy_at_last(
    world: World, recordings: RecordedDataset, frames: int = _LONG, seed: int = 0
) -> tuple[int, float]:
    """Whether pictures last: errors that add up make latents larger and larger.

    Args:
        world: plays held-out moments on under the recorded actions.
        recordings: what it was trained on.
        frames: frames ahead; fewer where no held-out episode is as long.
        seed: of the choice of moments and of the world's noise.

    Returns:
        The frames ahead, and the mean square of the latents there over that of the recorded ones.
    """
    episodes = recordings.split("validation")
    ahead = min(frames, max(len(e) for e in episodes) + 1 - _SHOWN)
    where = moments(episodes, _SHOWN, ahead, _ROLLOUTS, seed)
    made = 0.0
    for drawn in replay(world, where, ahead, seed):
        made = float(drawn.latents.double().square().mean())
    shown = np.stack([m.episode.frames[m.now + ahead] for m in where])
    with torch.inference_mode():
        real = world.model.encode(torch.from_numpy(shown)).double().square().mean()
    return ahead, made / float(real)


def _expected(hazard: torch.Tensor, odds: float) -> float:
    """How many of the rows (windows, frames) end, with a factor on the odds of each frame."""
    scaled = hazard * odds / (1 - hazard + hazard * odds)
    return float((1 - (1 - scaled).prod(1)).sum())


def _fit(hazard: torch.Tensor, true: float) -> float:
    """The factor with which as many rows end as in truth, from 1 / 8 to 8; by bisection."""
    low, high = math.log(1 / _MOST_ODDS), math.log(_MOST_ODDS)
    for _ in range(40):
        middle = (low + high) / 2
        if _expected(hazard, math.exp(middle)) < true:
            low = middle
        else:
            high = middle
    return round(math.exp((low + high) / 2), 3)
