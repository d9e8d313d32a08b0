"""A scripted player of ViZDoom's DefendTheLine that turns to the nearest monster and shoots it.

It is a recording policy: it lives longer than random play and hits, so that an agent that gets good
inside the learned world still finds itself inside the data.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np

_NOOP, _SHOOT, _RIGHT, _LEFT = 0, 1, 2, 3
_PLAYER = "DoomPlayer"
_MONSTERS = ("Demon", "DoomImp")
_HALF_WIDTH = 20.0  # of a monster, map units


class Turret:
    """Every episode has a steadiness of its own, so that recordings show good and bad shots."""

    real_kwargs = {"objects_info_enabled": True}  # what ``nfd eval-agent`` makes the game with

    def __init__(self, patience: int = 6) -> None:
        """Defend.

        Args:
            patience: tics for which a target is kept at least.
        """
        self._patience = patience

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """Begin an episode of ``VizdoomDefendLine-v1`` made with ``objects_info_enabled=True``."""
        self._game_env: Any = env.unwrapped
        self._rng, self._target, self._kept = rng, -1, 0
        self._spread = rng.uniform(0.3, 1.5)  # of the aim, in half widths of a monster

    def act(self, observation: np.ndarray) -> int:
        """The next action: 0 nothing, 1 shoot, 2 turn right, 3 turn left."""
        objects = self._game_env.state.objects
        player = next(o for o in objects if o.name == _PLAYER)
        monsters = {o.id: o for o in objects if o.name in _MONSTERS}
        self._kept -= 1
        if self._target not in monsters or self._kept < 0:
            if not monsters:
                return _NOOP
            # The nearest, but rather one that is nearly aimed at than one to the side.
            self._target = min(monsters, key=lambda m: _effort(player, monsters[m]))
            self._kept = self._patience
            self._aside = self._rng.normal(0, self._spread) * _HALF_WIDTH
        target = monsters[self._target]
        distance, turn = _seen_from(player, target)
        turn += math.degrees(self._aside / max(distance, _HALF_WIDTH))
        if abs(turn) <= max(1.5, math.degrees(_HALF_WIDTH / max(distance, _HALF_WIDTH))):
            return _SHOOT
        return _LEFT if turn > 0 else _RIGHT


def _seen_from(player: Any, other: Any) -> tuple[float, float]:
    """How far away ``other`` is, in map units, and how far to the left, in degrees."""
    x, y = other.position_x - player.position_x, other.position_y - player.position_y
    turn = math.degrees(math.atan2(y, x)) - player.angle
    return math.hypot(x, y), (turn + 180) % 360 - 180


def _effort(player: Any, other: Any) -> float:
    distance, turn = _seen_from(player, other)
    return distance + 4 * abs(turn)
