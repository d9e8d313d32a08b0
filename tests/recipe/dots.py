"""A small game that is learned quickly: a bright square is pushed left and right on a floor."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

ENV_ID = "tests/Dots-v0"
SIZE = 48


class DotsEnv(gymnasium.Env):
    """A square moves by -3, 0 or 3 pixels; the reward is 1 at the right wall, where it ends."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, length: int = 60, render_mode: str | None = None) -> None:
        self.length, self.render_mode = length, render_mode
        self.action_space = spaces.Discrete(3)
        self.observation_space = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def _frame(self) -> np.ndarray:
        frame = np.full((SIZE, SIZE, 3), 40, np.uint8)
        frame[36:] = (60, 90, 60)
        frame[28:36, self.place : self.place + 8] = (230, 60, 40)
        return frame

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.steps = int(self.np_random.integers(0, 30)), 0
        return self._frame(), {}

    def step(self, action: Any) -> Any:
        self.place = int(np.clip(self.place + 3 * (int(action) - 1), 0, SIZE - 8))
        self.steps += 1
        won = self.place == SIZE - 8 and self.steps > 40
        return self._frame(), float(won), won, self.steps >= self.length, {}

    def render(self) -> np.ndarray:
        return self._frame()

    def get_action_meanings(self) -> list[str]:
        return ["LEFT", "NOOP", "RIGHT"]


class RenderedOnly(DotsEnv):
    """Observes two numbers; the picture is only rendered. It names its actions as MiniGrid does."""

    actions = IntEnum("Actions", {"east": 2, "stay": 1, "west": 0})
    get_action_meanings: Any = None

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), *super().step(action)[1:]


class Symbols(gymnasium.Env):
    """Observes a map of 7 x 7 symbols, and shows nothing else."""

    metadata = {"render_modes": []}
    observation_space = spaces.Box(0, 255, (7, 7, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.ones((7, 7, 3), np.uint8), {}

    def step(self, action: Any) -> Any:
        return np.ones((7, 7, 3), np.uint8), 0.0, False, False, {}

    def render(self) -> None:
        return None


for _id, _entry in (
    (ENV_ID, "DotsEnv"),
    ("tests/RenderedOnly-v0", "RenderedOnly"),
    ("tests/Symbols-v0", "Symbols"),
):
    gymnasium.register(_id, entry_point=f"tests.recipe.dots:{_entry}", disable_env_checker=True)
