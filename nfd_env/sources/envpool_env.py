"""One EnvPool environment as a Gymnasium env that observes RGB frames.

EnvPool (https://envpool.readthedocs.io) steps many games in C++; its Procgen, Atari, Box2D and
ViZDoom tasks run at thousands of frames a second a core. Ids are written "envpool/BigfishEasy-v0".
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

PREFIX = "envpool/"

# What a task must be told so that it shows single colour frames, where it has such a setting.
_COLOUR = {"gray_scale": False, "stack_num": 1}


# Of every Procgen game. The last six do nothing in most: held for 8 frames from 16 moments of each
# game, they led to the frames of "noop" but for the first one in some, and for all of them in two.
_PROCGEN_MOVES = (
    *("left_down", "left", "left_up"),
    *("down", "noop", "up"),
    *("right_down", "right", "right_up"),
)
_PROCGEN_MORE = ("d", "a", "w", "s", "q", "e")
_PROCGEN_FIRE = ("Bossfight", "Caveflyer", "Dodgeball", "Fruitbot", "Plunder")
_PROCGEN_ALL = ("Ninja", "Starpilot")


class EnvPoolError(RuntimeError):
    """EnvPool, or this task of it, cannot be used here."""


class EnvPoolEnv(gymnasium.Env):
    """A single environment of an EnvPool task; observes uint8 RGB (H, W, 3).

    EnvPool resets an environment by itself at the step after an end; here ``reset`` does that, by a
    new environment with the seed that is asked for, which costs a few milliseconds.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(self, task: str, render_mode: str | None = None, **settings: Any) -> None:
        """Prepare ``task``.

        Args:
            task: EnvPool's id without the prefix, e.g. "BigfishEasy-v0".
            render_mode: None or "rgb_array".
            settings: of the task, e.g. ``num_levels`` or ``frame_skip``.

        Raises:
            EnvPoolError: when EnvPool is not installed, or does not know the task or a setting, or
                the task shows no frames.
        """
        try:
            import envpool
        except ImportError as error:
            raise EnvPoolError(
                f"the game {PREFIX}{task} needs EnvPool: pip install envpool; its Procgen games "
                f"also need Debian's package libqt5gui5 ({error})"
            ) from None
        self.render_mode = render_mode
        self._make = envpool.make
        if task not in envpool.list_all_envs():
            raise EnvPoolError(f"EnvPool has no task {task!r}; envpool.list_all_envs() names them")
        known = envpool.make_spec(task).config
        unknown = [name for name in settings if not hasattr(known, name)]
        if unknown:
            raise EnvPoolError(
                f"{PREFIX}{task} has no setting {unknown[0]!r}; it has: "
                f"{', '.join(sorted(known._fields))}"
            )
        colour = {name: value for name, value in _COLOUR.items() if hasattr(known, name)}
        self._task, self._known = task, known._fields
        self._settings: dict[str, Any] = {**colour, **settings}
        spec = envpool.make_spec(task, **self._settings)
        self.action_space = spec.gymnasium_action_space
        shown = spec.gymnasium_observation_space
        shape = shown.shape if isinstance(shown, spaces.Box) else None
        if shape is None or len(shape) != 3 or shown.dtype != np.uint8 or 3 not in shape:
            raise EnvPoolError(f"{PREFIX}{task} shows no RGB frames, it observes {shown}")
        self._channels_first = shape[2] != 3
        height, width = shape[1:] if self._channels_first else shape[:2]
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.metadata = {**self.metadata, "render_fps": _frame_rate(task, known, self._settings)}
        self._env: Any = None
        self._frame: np.ndarray | None = None

    def get_action_meanings(self) -> list[str]:
        """Names of the Discrete actions, where they are known; else none."""
        if "distribution_mode" not in self._known:
            return []
        more = ("fire", *_PROCGEN_MORE[1:]) if self._is(_PROCGEN_FIRE) else _PROCGEN_MORE
        return [*_PROCGEN_MOVES, *more]

    def get_acting(self) -> list[int]:
        """Discrete actions that do something, where it is known that others do not; else none."""
        if "distribution_mode" not in self._known or self._is(_PROCGEN_ALL):
            return []
        return list(range(len(_PROCGEN_MOVES) + self._is(_PROCGEN_FIRE)))

    def _is(self, games: tuple[str, ...]) -> bool:
        return self._task.startswith(games)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; the same seed gives the same one."""
        super().reset(seed=seed)
        self.close()
        number = int(self.np_random.integers(2**31 - 1))  # EnvPool takes 32 bits
        self._env = self._make(
            self._task,
            env_type="gymnasium",
            num_envs=1,
            num_threads=1,
            seed=number,
            **self._settings,
        )
        observation, _ = self._env.reset()
        return self._show(observation), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One transition."""
        if self._env is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        batch = np.array(action, self.action_space.dtype)[None]
        observation, reward, terminated, truncated, _ = self._env.step(batch)
        frame = self._show(observation)
        return frame, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The latest frame."""
        return None if self._frame is None else self._frame.copy()

    def close(self) -> None:
        """Free the game."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _show(self, observation: np.ndarray) -> np.ndarray:
        frame = observation[0]
        if self._channels_first:
            frame = frame.transpose(1, 2, 0)
        self._frame = np.array(frame, order="C")  # EnvPool goes on writing to its own
        return self._frame.copy()


def _frame_rate(task: str, known: Any, settings: dict[str, Any]) -> float:
    """Frames a second at which a person plays the task, frame skip counted."""
    native = 15.0 if hasattr(known, "distribution_mode") else 60.0  # Procgen is made for 15
    if "CarRacing" in task:
        native = 50.0
    if hasattr(known, "use_combined_action"):  # ViZDoom
        native = 35.0
    skip = settings.get("frame_skip", getattr(known, "frame_skip", 1))
    return native / max(1, int(skip))
