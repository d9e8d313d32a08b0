"""A behaviour policy for CarRacing that steers by the picture, to the middle of the road."""

from __future__ import annotations

import gymnasium
import numpy as np

# In a 96 x 96 frame: the car's front, and the rows of road that it looks at.
_CAR_X, _CAR_Y = 48, 66
_FAR, _NEAR = 12, 26  # rows ahead of the car
_PANEL = 84  # the rows below show speed and steering


class Driver:
    """See ``nfd_env.data.policies.BehaviourPolicy``.

    Every episode has a pace of its own, so that recordings show slow and fast driving.
    """

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """Begin an episode with another pace."""
        self._pace = float(rng.uniform(0.6, 1.4))
        self._steer = 0.0
        self._speed = 0.0

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Steering, gas and brake, float32 (3,)."""
        road = _road(observation)
        ahead = _middle(road, _CAR_Y - _NEAR, _CAR_Y - _FAR)
        close = _middle(road, _CAR_Y - _FAR, _CAR_Y - 2)
        if ahead is None:
            ahead = close
        offset = 0.0 if ahead is None else (ahead - _CAR_X) / 18.0
        if close is not None:
            offset = 0.7 * offset + 0.3 * (close - _CAR_X) / 12.0
        self._steer = 0.5 * self._steer + 0.5 * float(np.clip(offset, -1, 1))
        bend = abs(self._steer)
        speed = _speed(observation)
        wanted = self._pace * (0.55 - 0.4 * bend)
        gas = float(np.clip(2 * (wanted - speed), 0, 1))
        brake = float(np.clip(2 * (speed - 1.3 * wanted), 0, 0.8))
        return np.array([self._steer, gas, brake], np.float32)


def _road(frame: np.ndarray) -> np.ndarray:
    """Grey pixels above the panel, bool (84, 96)."""
    values = frame[:_PANEL].astype(np.int16)
    spread = values.max(-1) - values.min(-1)
    return (spread < 14) & (values.mean(-1) > 70) & (values.mean(-1) < 140)


def _middle(road: np.ndarray, top: int, bottom: int) -> float | None:
    """Mean column of the road in some rows, weighted towards the car's column; None without any."""
    columns = np.nonzero(road[top:bottom])[1]
    if len(columns) < 4:
        return None
    weight = 1 / (1 + ((columns - _CAR_X) / 20.0) ** 2)
    return float((columns * weight).sum() / weight.sum())


def _speed(frame: np.ndarray) -> float:
    """Height of the white bar of the panel, 0 to about 1."""
    bar = frame[_PANEL:, 11:15].min(-1).max(1) > 150
    return float(bar.sum()) / 10.0
