"""Games that do what no game should, each in its own way."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.recipe.dots import SIZE, DotsEnv

HOSTILE = "tests/Hostile-v0"


class Panic(BaseException):
    """What a game written in Rust raises is no Exception."""


class HostileEnv(DotsEnv):
    """Dots with a fault, see ``_fail``, ``reset`` and ``step``."""

    def __init__(
        self, fault: str = "", render_mode: str | None = None, length: int = 60, pause: float = 0.0
    ) -> None:
        super().__init__(length, render_mode)
        self.fault, self.pause = fault, pause
        if fault == "multi_discrete":
            self.action_space = spaces.MultiDiscrete([3, 2])
        if fault == "multi_binary":
            self.action_space = spaces.MultiBinary(2)
        spaces_of = {
            "dict": spaces.Dict(a=spaces.Discrete(2)),
            "huge": spaces.Discrete(10**9),
            "many_bounds": spaces.Box(np.arange(-20, 0) / 7, np.arange(1, 21) / 7, (20,), float),
        }
        self.action_space = spaces_of.get(fault, self.action_space)
        if fault == "none":
            del self.action_space
        if fault == "rust":
            raise Panic("rust")
        if fault == "rate":
            self.metadata = {**self.metadata, "render_fps": float("nan")}
        if fault == "elsewhere":
            os.chdir("/")
        if fault == "large":
            self.observation_space = spaces.Box(0, 255, (90, 70, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        frame, info = super().reset(seed=seed)
        self.episode = int(self.np_random.integers(100))
        if self.fault == "reset":
            raise KeyError("no level")
        return self._changed(frame), info

    def _changed(self, frame: np.ndarray) -> np.ndarray:
        if self.fault == "large":
            return np.resize(frame, (90, 70, 3)).astype(np.uint8)
        return np.zeros_like(frame) if self.fault == "still" else frame

    def close(self) -> None:
        if self.fault == "close":
            sys.exit(9)

    def step(self, action: Any) -> Any:
        if self.pause:
            time.sleep(self.pause)
        if self.fault == "multi_discrete":
            action = action[0]
        if self.fault == "many_bounds":
            action = 0
        if self.fault == "multi_binary":
            action = 1 + int(action[0]) - int(action[1])
        frame, reward, terminated, truncated, info = super().step(action)
        frame, late = self._changed(frame), self.steps > 5
        if self.fault == "sometimes" and self.episode % 4 == 0 and late:
            raise AttributeError("'NoneType' object has no attribute 'x'")
        if self.fault == "exit" and late:
            sys.exit(3)
        if self.fault == "size" and late:
            frame = np.zeros((SIZE, SIZE + 1, 3), np.uint8)
        if self.fault == "nan" and late:
            reward = float("nan")
        if self.fault == "shaped":
            reward = np.ones(2)
        if self.fault == "one_step":
            terminated = True
        if self.fault == "twelve_steps":
            terminated = self.steps >= 12
        if self.fault == "endless":
            terminated = truncated = False
        return frame, reward, terminated, truncated, info


gymnasium.register(HOSTILE, entry_point="tests.recipe.hostile:HostileEnv", disable_env_checker=True)
