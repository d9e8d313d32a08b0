"""A scripted player of ViZDoom TakeCover that sees the game's object list and dodges fireballs.

It is a recording policy: it lives several times longer than random play, so that an agent that gets
good inside the learned world still finds itself inside the data.
"""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np

# Movement along the wall, read off the game (map units and tics).
_THRUST, _FRICTION, _Y_MIN, _Y_MAX = 0.75, 0.90625, 16.0, 752.0
_NOOP, _RIGHT, _LEFT = 0, 1, 2
_THRUST_OF = np.array([0.0, -_THRUST, _THRUST])  # right is towards smaller y
_HORIZON = 56
_TOUCH = 22.0  # player radius 16 + fireball radius 6


# Signals for the heads: where fireballs will cross the player's line, and when.
_ARRIVAL = np.array([0.0, 4.0, 9.0, 16.0, 26.0, 40.0, 60.0])  # tics
_ASIDE = np.array([_TOUCH, 48.0, 75.0, 110.0, 160.0, 240.0])  # map units to either side
_ASIDE = np.concatenate((-_ASIDE[::-1], [0.0], _ASIDE))


def approaching(env: gymnasium.Env) -> np.ndarray:
    """Where fireballs are coming to, in the picture or not: what ends episodes.

    Args:
        env: a ``VizdoomTakeCover-v1`` made with ``objects_info_enabled=True``.

    Returns:
        (72,), 1 where a fireball will reach the player's line in 0 to 4, 4 to 9, 9 to 16, 16 to 26,
        26 to 40, or 40 to 60 tics (12 numbers each), so many map units to a side of where the
        player stands now; NaN after the player's death.
    """
    game_env: Any = env.unwrapped
    if game_env.state is None:
        return np.full((len(_ARRIVAL) - 1) * (len(_ASIDE) - 1), np.nan, np.float32)
    told = np.zeros((len(_ARRIVAL) - 1, len(_ASIDE) - 1), np.float32)
    player = next(o for o in game_env.state.objects if o.name == "DoomPlayer")
    for ball in game_env.state.objects:
        if "Ball" not in ball.name or ball.velocity_x >= 0:
            continue
        tics = (ball.position_x - player.position_x) / -ball.velocity_x
        aside = ball.position_y + ball.velocity_y * tics - player.position_y
        row, column = np.searchsorted(_ARRIVAL, tics, "right"), np.searchsorted(_ASIDE, aside)
        if 0 < row <= told.shape[0] and 0 < column <= told.shape[1]:
            told[row - 1, column - 1] = 1.0
    return told.flatten()


class Dodger:
    """Plans a few held keys ahead against the fireballs that it sees, and keeps off the corners."""

    real_kwargs = {"objects_info_enabled": True}  # what ``nfd eval-agent`` makes the game with

    def __init__(self, caution: float = 14.0, replan: int = 3, memory: int | None = None) -> None:
        """Dodge.

        Args:
            caution: map units to keep away from fireballs.
            replan: decide anew every so many steps.
            memory: know of no fireball that has been out of the picture for more than so many
                tics (looked at whenever it decides), to tell what a player of the picture could
                do; None to know of all.
        """
        self._caution, self._replan, self._memory = caution, replan, memory
        plans = itertools.product((_NOOP, _RIGHT, _LEFT), (4, 9, 16, 28), (_NOOP, _RIGHT, _LEFT))
        self._plans = np.array(
            [[first] * n + [second] * (_HORIZON - n) for first, n, second in plans]
        )

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """Begin an episode of ``VizdoomTakeCover-v1`` made with ``objects_info_enabled=True``."""
        self._game_env: Any = env.unwrapped
        self._rng, self._left, self._action = rng, 0, _NOOP
        self._tic, self._seen = 0, dict[int, int]()
        self._favourite = rng.uniform(120, 650)

    def act(self, observation: np.ndarray) -> int:
        """The next action: 0 nothing, 1 right, 2 left."""
        if self._left == 0:
            self._action, self._left = self._plan(), self._replan
        self._left -= 1
        self._tic += 1
        return self._action

    def _knows(self, ball: Any, player: Any) -> bool:
        if self._memory is None:
            return True
        # The picture shows 45 degrees to either side.
        aside = abs(ball.position_y - player.position_y)
        if aside < ball.position_x - player.position_x:
            self._seen[ball.id] = self._tic
        return self._tic - self._seen.get(ball.id, -(10**9)) <= self._memory

    def _plan(self) -> int:
        objects = self._game_env.state.objects
        player = next(o for o in objects if o.name == "DoomPlayer")
        if self._rng.random() < 0.02:
            self._favourite = self._rng.uniform(120, 650)
        y = np.full(len(self._plans), player.position_y)
        speed = np.full(len(self._plans), player.velocity_y)
        path = np.empty((len(self._plans), _HORIZON))
        for t in range(_HORIZON):
            speed = speed + _THRUST_OF[self._plans[:, t]]
            y = np.clip(y + speed, _Y_MIN, _Y_MAX)
            speed = speed * _FRICTION
            path[:, t] = y
        cost = 2e-4 * np.abs(path[:, -1] - self._favourite)
        cost += 2e-4 * (np.diff(self._plans, axis=1) != 0).sum(1) + 1e-6 * self._rng.random(len(y))
        tics = np.arange(1, _HORIZON + 1)
        for ball in objects:
            if "Ball" not in ball.name or ball.velocity_x >= 0 or not self._knows(ball, player):
                continue
            x = ball.position_x + ball.velocity_x * tics
            near = np.abs(x - player.position_x) < _TOUCH + 6
            if not near.any():
                continue
            gap = np.abs(path[:, near] - (ball.position_y + ball.velocity_y * tics)[near]).min(1)
            cost += np.where(gap < _TOUCH + 2, 10.0, 0.0)
            cost += np.clip(1 - (gap - _TOUCH) / self._caution, 0, 1)
        return int(self._plans[np.argmin(cost), 0])
