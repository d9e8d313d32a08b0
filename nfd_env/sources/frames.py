"""Frames of any environment as a world has them; what an environment hands over is checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from nfd_env.named import described
from nfd_env.sources.keys import KeymapError, resting_action
from nfd_env.sources.place import OwnPlace
from nfd_env.sources.processes import GUARD
from nfd_env.sources.spec import (
    GameFailedError,
    SourceConfig,
    SourceError,
    area_resize,
    check_fps,
    short,
)
from nfd_env.stopping import asked_by_signal


class FrameRateError(SourceError):
    """An environment says of itself what is no frame rate."""


class FrameObservation(gymnasium.Wrapper):
    """Observes the cropped and resized RGB frame of any environment that shows one.

    Action space, rewards and ends are the wrapped environment's own. It is foreign code: actions
    are copied before and observations and infos after each call, so that neither side changes what
    the other one holds, and what is no frame or no number is refused by name, episode and step.

    Attributes:
        fps: steps a second at which a person plays; ``metadata`` has it rounded.
    """

    fps: float

    def __init__(
        self,
        env: gymnasium.Env,
        source: SourceConfig,
        render_mode: str | None = None,
        place: OwnPlace | None = None,
    ) -> None:
        """Wrap ``env``; see ``SourceConfig``.

        Args:
            env: the environment.
            source: what it is.
            render_mode: "rgb_array" to show what is observed whatever the environment can show.
            place: where the environment is, if it has changed the current folder.

        Raises:
            SourceError: when it shows no RGB frames, or has no such actions.
        """
        super().__init__(env)
        self.source, self._shows = source, render_mode
        self._place = place or OwnPlace()
        if not isinstance(getattr(env, "action_space", None), spaces.Space):
            raise SourceError(f"{source.env_id} has no action_space")
        if source.actions:
            self.action_space = _chosen_actions(env.action_space, source)
        if source.opening:
            try:
                self._rest = resting_action(self.action_space, source.action_names)
            except KeymapError as error:
                raise SourceError(
                    f"source.opening of {source.env_id} needs a rest: {error}"
                ) from None
        self.fps = source.fps or frame_rate(env)
        # Whole, because gymnasium.utils.play and writers of films need that.
        self.metadata = {**(env.metadata or {}), "render_fps": max(1, round(self.fps))}
        self._last: np.ndarray | None = None
        self._episode, self._step = -1, 0
        if source.frames == "observation":
            space = env.observation_space
            if source.key:
                if not isinstance(space, spaces.Dict) or source.key not in space.spaces:
                    raise SourceError(f"{source.env_id} has no observation entry {source.key!r}")
                space = space[source.key]
            shape = space.shape if isinstance(space, spaces.Box) else None
            if shape is None:
                raise SourceError(f"{source.env_id} observes {space}; {_INSTEAD}")
            wrong = _what_is_wrong(shape, space.dtype, rendered=False)
            if wrong:
                raise SourceError(f"{source.env_id} observes {space}: {wrong}; {_INSTEAD}")
        else:
            with GUARD.watching():
                self._call("reset", env.reset, seed=0)
            shape = self._raw(None).shape
        self._shape = (int(shape[0]), int(shape[1]))
        top, bottom, left, right = source.crop or (0, shape[0], 0, shape[1])
        if not (0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]):
            raise SourceError(f"crop {source.crop} does not lie inside a {shape[:2]} frame")
        self._crop = (slice(top, bottom), slice(left, right))
        height, width = source.size or (bottom - top, right - left)
        self._size = (int(height), int(width))
        cropped = (bottom - top, right - left)
        self._resize = area_resize() if self._size != cropped else None
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    @property
    def render_mode(self) -> str | None:
        """How ``render`` shows the game."""
        return self._shows or self.env.render_mode

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the first frame."""
        seed = kwargs.get("seed")
        if isinstance(seed, bool | np.bool_):  # which games take for 0 or 1
            raise ValueError(f"a seed must be a whole number, got {seed}")
        self._episode, self._step = self._episode + 1, 0
        if self._last is None:  # ViZDoom starts its game at the first reset
            with GUARD.watching():
                made = self._call("reset", self.env.reset, **kwargs)
        else:
            made = self._call("reset", self.env.reset, **kwargs)
        observation, info = self._parts("reset", made, ("observation", "info"))
        for _ in range(self.source.opening):
            made = self._call("step", self.env.step, self._own(self._rest))
            observation, _, *ends, info = self._parts("step", made, _TRANSITION)
            if any(self._ends(*ends)):
                raise self._failed(f"it ended within its opening of {self.source.opening} steps")
        self._last = self._observe(observation)
        return self._last.copy(), _copied(info)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One transition of the real game."""
        self._step += 1
        made = self._call("step", self.env.step, self._own(action))
        observation, reward, *ends, info = self._parts("step", made, _TRANSITION)
        total, ends = self._number("reward", reward), self._ends(*ends)
        if not (any(ends) and not self.source.terminal_frame):
            self._last = self._observe(observation)
        assert self._last is not None
        return self._last.copy(), total, *ends, _copied(info)

    def render(self) -> Any:
        """The frame that is observed, when the render mode is "rgb_array"."""
        if self.render_mode == "rgb_array" and self._last is not None:
            return self._last.copy()
        return self._call("render", self.env.render)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call foreign code, which must not end this program."""
        try:
            with self._place.entered():
                return function(*args, **kwargs)
        except (gymnasium.error.ResetNeeded, gymnasium.error.ClosedEnvironmentError):
            raise  # of whoever calls
        except KeyboardInterrupt:
            raise  # by Ctrl-C, which arrives in the middle of the game's code
        except BaseException as error:  # whatever the game's own code raises; Rust's does so
            if asked_by_signal(error):
                raise  # this process was told to stop while the game was at work
            if isinstance(error, SystemExit):
                raise self._failed(f"{name}() called exit({error.code!r})") from error
            raise self._failed(f"{name}() raised {described(error)}") from error

    def _parts(self, name: str, made: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        if not isinstance(made, tuple) or len(made) != len(names):
            raise self._error(f"{name}() must return ({', '.join(names)}), got {short(made)}")
        return made

    def _number(self, name: str, value: Any) -> float:
        """``value`` as a float; an array of one number is one."""
        try:
            array = np.asarray(value)
            if array.size != 1 or array.dtype.kind not in "buif":
                raise ValueError
        except (TypeError, ValueError, RuntimeError):
            raise self._error(f"the {name} must be one number, got {short(value)}") from None
        number = float(array.reshape(-1)[0])
        if not math.isfinite(number) or abs(number) > _LARGEST:
            raise self._error(f"the {name} must be a finite number, got {number}")
        return number

    def _own(self, action: Any) -> Any:
        """The environment's own action, which it may change."""
        if self.source.actions:
            chosen = int(action)
            if not 0 <= chosen < len(self.source.actions):  # a list would count from its end
                raise ValueError(
                    f"an action is a number from 0 to {len(self.source.actions) - 1}, got {chosen}"
                )
            return self.source.actions[chosen]
        return copy.deepcopy(action)

    def _ends(self, terminated: Any, truncated: Any) -> tuple[bool, bool]:
        return (
            bool(self._number("terminated", terminated)),
            bool(self._number("truncated", truncated)),
        )

    def _raw(self, observation: Any) -> np.ndarray:
        """The whole frame, uint8 (H, W, 3), perhaps in the environment's own memory."""
        rendered = self.source.frames == "render"
        if rendered:
            frame = self._call("render", self.env.render)
        elif self.source.key:
            try:
                frame = observation[self.source.key]
            except (KeyError, IndexError, TypeError):
                raise self._error(f"there is no observation entry {self.source.key!r}") from None
        else:
            frame = observation
        if not isinstance(frame, np.ndarray):
            raise self._error(
                f"it shows {type(frame).__name__} instead of an RGB array"
                + ("; it must know the render mode rgb_array" if rendered else f"; {_INSTEAD}")
            )
        wrong = _what_is_wrong(frame.shape, frame.dtype, rendered)
        if wrong:
            raise self._error(f"its frames are {frame.dtype} {frame.shape}: {wrong}")
        if frame.ndim == 2:
            frame = frame[:, :, None]
        return frame.repeat(3, 2) if frame.shape[2] == 1 else frame[:, :, :3]

    def _observe(self, observation: Any) -> np.ndarray:
        raw = self._raw(observation)
        if raw.shape[:2] != self._shape:
            raise self._error(
                f"the frame is {raw.shape[0]} x {raw.shape[1]} pixels, those before were "
                f"{self._shape[0]} x {self._shape[1]}; all frames of a game must have one size"
            )
        frame = raw[self._crop]
        if self._resize is not None:
            frame = self._resize(frame, self._size)
        return np.array(frame, order="C")  # a copy: the environment may draw over its own

    def _error(self, message: str) -> SourceError:
        return SourceError(f"{self._where()}: {message}")

    def _failed(self, message: str) -> GameFailedError:
        return GameFailedError(f"{self._where()}: {message}")

    def _where(self) -> str:
        when = f", episode {self._episode}, step {self._step}" if self._episode >= 0 else ""
        return f"{self.source.env_id}{when}"


def frame_rate(env: gymnasium.Env) -> float:
    """Steps a second of ``env``, by what it says of itself; 30 where it says nothing.

    Raises:
        FrameRateError: when it says what is no frame rate.
    """
    layer = env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, FrameObservation):
            return layer.fps
        layer = layer.env
    told = (env.metadata or {}).get("render_fps") or FRAME_RATE
    try:
        rate = float(told)
        check_fps("render_fps", rate)
    except (TypeError, ValueError):
        name = env.spec.id if env.spec else type(env.unwrapped).__name__
        raise FrameRateError(
            f"the metadata of {name} say that its render_fps is {short(told)}, which is no frame "
            "rate; set source.fps in the game's file"
        ) from None
    return rate


_TRANSITION = "observation", "reward", "terminated", "truncated", "info"
FRAME_RATE = 30.0  # of games that say nothing; as ``gymnasium.utils.play`` has it
_INSTEAD = "set frames: render to record its picture instead"
_LARGEST = float(np.finfo(np.float32).max)  # rewards are recorded as float32


def _what_is_wrong(shape: tuple[int, ...], dtype: Any, rendered: bool) -> str:
    """Why frames of this shape and type cannot be taken; "" when they can."""
    if dtype != np.uint8:
        return f"frames must be uint8 from 0 to 255, not {dtype}"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)):  # grey is shown in grey
        return "" if min(shape) > 0 else "they are empty"
    if len(shape) == 3 and shape[2] == 4:
        # What render() gives can only be RGBA.
        return "" if rendered else "4 channels are RGBA or stacked frames; frames must be RGB"
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        return "the channels, or stacked frames, come first; frames must be RGB (H, W, 3)"
    return "frames must be RGB (H, W, 3) or grey (H, W), one at a time"


def _chosen_actions(space: spaces.Space, source: SourceConfig) -> spaces.Discrete:
    """The action space that is left where ``source.actions`` chooses some."""
    known = isinstance(space, spaces.Discrete) and all(a in space for a in source.actions)
    if not known or len(set(source.actions)) != len(source.actions):
        raise SourceError(
            f"source.actions must name actions of {source.env_id}, each once; it has {space}, "
            f"got {source.actions}"
        )
    return spaces.Discrete(len(source.actions))


def _copied(value: Any) -> Any:
    """``value`` with arrays and containers of its own."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_copied(part) for part in value)
    return value
