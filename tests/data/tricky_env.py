"""Games that are not what one would wish, each in its own way."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.counter_env import CounterEnv

ENV_ID = "tests/Tricky-v0"


class TrickyEnv(CounterEnv):
    """A counter env with a whim, from its third step on, in episodes whose seed fits."""

    def __init__(self, whim: str, every: int = 1, render_mode: str | None = None) -> None:
        super().__init__(length=8, render_mode=render_mode)
        self.whim, self.every = whim, every

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.bad = (seed or 0) % self.every == 0
        if self.bad and self.whim == "raise at reset":
            raise RuntimeError("no such level")
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.bad and self.steps == 3:
            if self.whim == "raise":
                raise RuntimeError("the game's own bug")
            if self.whim == "exit":
                raise SystemExit(0)
            if self.whim == "leave":
                os._exit(0)
            if self.whim == "abort":
                signal.signal(signal.SIGABRT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGABRT)
            if self.whim == "be killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.whim == "nan":
                reward = float("nan")
        return observation, reward, terminated, truncated, info


class SpoilingEnv(gymnasium.Env):
    """A Box game that draws over its one buffer, halves actions in place, and keeps them."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, **answers: Any) -> None:
        self.answers, self.buffer, self.sent = answers, np.zeros((8, 8, 3), np.uint8), []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._frame(), {"frame": self.buffer}

    def _frame(self) -> np.ndarray:
        self.buffer[:] = self.steps
        return self.answers.get("frames", lambda frame, step: frame)(self.buffer, self.steps)

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.sent.append(np.array(action))
        action *= 0.5
        frame = self._frame()
        reward = self.answers.get("reward", lambda step: 1.0)(self.steps)
        ended = self.answers.get("terminated", lambda step: step == 6)(self.steps)
        return frame, reward, ended, False, {"frame": self.buffer}


class SpoilingPolicy:
    """Hands out one array again and again, and scribbles over what it sees."""

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        self.action = np.zeros(2, np.float32)
        self.step = 0

    def act(self, observation: np.ndarray) -> np.ndarray:
        assert (observation == self.step).all()
        observation[:] = 99
        self.step += 1
        self.action[:] = self.step / 10, -self.step / 10
        return self.action


gymnasium.register(ENV_ID, entry_point="tests.data.tricky_env:TrickyEnv", disable_env_checker=True)
