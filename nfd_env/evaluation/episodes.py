"""Whole episodes of an agent, each with a seed of its own, in a learned world or a real game."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nfd_env.players.player import Player
from nfd_env.progress import progress_bar


@dataclass(frozen=True)
class Episodes:
    """Whole episodes of one environment.

    Attributes:
        scores: float64 (N,), sums of rewards.
        steps: int64 (N,), decisions.
        truncated: bool (N,), cut off at the limit.
        film: uint8 (H, W, 3) frames of the first episode, one a decision.
    """

    scores: np.ndarray
    steps: np.ndarray
    truncated: np.ndarray
    film: list[np.ndarray]


def play_episodes(
    env: Any,
    player: Player,
    episodes: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    see: Callable[[Any], Any] | None = None,
    film: int = 0,
    progress: str = "",
) -> Episodes:
    """Play ``episodes`` whole episodes, number i with the environment seed ``seed`` + i.

    Args:
        env: a real or learned vector env with SAME_STEP autoreset and episodes that end. When most
            of its environments have no more to do, only the others go on (``take``).
        player: chooses the actions.
        episodes: how many.
        seed: of the first episode, and of the player.
        options: of every reset.
        see: what the player sees of an observation; None for all of it.
        film: frames of the first episode to keep.
        progress: label of a progress bar; "" for none.
    """
    count = env.num_envs
    scores, steps = np.zeros(episodes), np.zeros(episodes, np.int64)
    truncations = np.zeros(episodes, bool)
    seats = np.arange(count)  # which of the player's environments each row of ``env`` is
    # An environment whose work is done plays on unscored (-1) until the batch shrinks.
    playing = np.where(seats < episodes, seats, -1)
    waiting = iter(range(count, episodes))
    observation, _ = env.reset(seed=seed, options=dict(options or {}))
    player.reset(count, seed)
    shown, first = observation, None  # for the player, one a seat

    def picture() -> np.ndarray:
        return torch.as_tensor(env.frames([0])[0]).cpu().numpy()

    filmed = [picture()] if film else []
    with progress_bar(None, progress, bool(progress), total=episodes, unit="episode") as bar:
        while (playing >= 0).any():
            shown = _put(shown, seats, observation)
            actions = player.act(see(shown) if see else shown, first)[seats]
            observation, *outcome, _ = env.step(actions)
            reward, terminated, truncated = (torch.as_tensor(x).cpu().numpy() for x in outcome)
            ended, active = terminated | truncated, playing >= 0
            first = np.zeros(count, bool)
            first[seats] = ended
            scores[playing[active]] += reward[active]
            steps[playing[active]] += 1
            truncations[playing[active]] = (truncated & ~terminated)[active]
            if playing[0] == 0 and not ended[0] and len(filmed) < film:
                filmed.append(picture())
            seeds: list[int | None] = [None] * len(seats)
            for row in np.flatnonzero(ended & active):
                playing[row] = next(waiting, -1)
                if playing[row] >= 0:
                    seeds[row] = seed + int(playing[row])
            bar.set_postfix(decisions=int(steps.sum()), refresh=False)
            bar.update(int((ended & active).sum()))
            again = np.array([s is not None for s in seeds])
            if again.any():
                observation, _ = env.reset(
                    seed=seeds, options={**(options or {}), "reset_mask": again}
                )
            rows = np.flatnonzero(playing >= 0)
            if 0 < len(rows) <= len(seats) // 2:
                env, observation = env.take(rows), observation[rows]
                seats, playing = seats[rows], playing[rows]
    return Episodes(scores, steps, truncations, filmed)


def _put(shown: Any, seats: np.ndarray, observation: Any) -> Any:
    """``shown`` with these rows in place of its own, which a player may have kept."""
    if len(seats) == len(shown):
        return observation
    shown = shown.clone() if isinstance(shown, torch.Tensor) else shown.copy()
    shown[seats] = observation
    return shown
