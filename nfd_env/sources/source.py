"""The real game as a Gymnasium env with exactly a world's observations, actions and frame rate."""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces

from nfd_env.sources.envpool_env import PREFIX, EnvPoolEnv, EnvPoolError

# What a person sees and presses: it can change later without anything to be recorded anew.
PRESENTATION = ("action_names", "keys", "display_aspect", "fps")


class SourceError(RuntimeError):
    """The real environment of a world cannot be made here."""


@dataclass(frozen=True)
class SourceConfig:
    """Which real environment to record, and how its frames become observations.

    Attributes:
        env_id: Gymnasium id of the real environment, or "envpool/" and the name of an EnvPool task.
        imports: modules to import first, so that the id is registered.
        kwargs: passed to ``gymnasium.make``.
        frames: "observation" or "render": where the RGB frames come from.
        key: entry of a Dict observation that holds the frame; "" for a plain Box observation.
        crop: [top, bottom, left, right] in pixels; empty for the whole frame.
        size: [height, width] after an area-averaging resize; empty for no resize.
        terminal_frame: False when the environment shows no frame at the terminal step (ViZDoom
            hands out zeros there): the last frame is then shown again.
        actions: where the environment has Discrete actions, those that the world has, in this
            order; empty for all. Many games have keys that do nothing.
        fps: frames a second at which a person plays it, frame skip counted; 0 for what the
            environment says of itself.
        display_aspect: width / height at which a person should see a frame; 0 for square pixels.
        action_names: one name per Discrete action, e.g. ["noop", "right", "left"].
        keys: action name -> key names that a person holds for it.
    """

    env_id: str
    imports: list[str] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    frames: str = "observation"
    key: str = ""
    crop: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    terminal_frame: bool = True
    actions: list[int] = field(default_factory=list)
    fps: float = 0.0
    display_aspect: float = 0.0
    action_names: list[str] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)


def make_source(source: SourceConfig, **kwargs: Any) -> gymnasium.Env:
    """Make the real environment that ``source`` describes, observing uint8 RGB (H, W, 3) frames.

    Args:
        source: what to make.
        kwargs: further arguments of ``gymnasium.make``, over those in ``source.kwargs``.

    Raises:
        SourceError: when a needed package is not installed or the environment has no RGB frames.
    """
    for module in source.imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.split(".")[0]
            raise SourceError(
                f"the real game {source.env_id} needs the package {package!r}: "
                f"pip install {package} ({error})"
            ) from None
    arguments = {**source.kwargs, **kwargs}
    if source.frames == "render":
        arguments.setdefault("render_mode", "rgb_array")
    elif source.frames != "observation":
        raise SourceError(f"source.frames must be observation or render, got {source.frames!r}")
    try:
        with _GUARD.watching():
            if source.env_id.startswith(PREFIX):
                env = EnvPoolEnv(source.env_id.removeprefix(PREFIX), **arguments)
            else:
                env = gymnasium.make(source.env_id, **arguments)
    except (
        gymnasium.error.Error,
        EnvPoolError,
    ) as error:  # not registered, or a package of its own is missing
        raise SourceError(f"the real game {source.env_id} cannot be made: {error}") from None
    return FrameObservation(env, source)


class FrameObservation(gymnasium.Wrapper):
    """Observes the cropped and resized RGB frame of any environment that shows one.

    Action space, rewards and ends are the wrapped environment's own.
    """

    def __init__(self, env: gymnasium.Env, source: SourceConfig) -> None:
        """Wrap ``env``; see ``SourceConfig``."""
        super().__init__(env)
        self.source = source
        if source.actions:
            self.action_space = _chosen_actions(env.action_space, source)
        if source.fps:
            self.metadata = {**env.metadata, "render_fps": source.fps}
        self._last: np.ndarray | None = None
        if source.frames == "observation":
            space = env.observation_space
            if source.key:
                if not isinstance(space, spaces.Dict) or source.key not in space.spaces:
                    raise SourceError(f"{source.env_id} has no observation entry {source.key!r}")
                space = space[source.key]
            shape = space.shape
            if space.dtype != np.uint8 or shape is None or len(shape) != 3 or shape[2] != 3:
                raise SourceError(
                    f"{source.env_id} must observe uint8 RGB (H, W, 3) frames, got {space}; "
                    "set frames: render to record its picture instead"
                )
        else:
            env.reset(seed=0)
            shape = self._raw(None).shape
        top, bottom, left, right = source.crop or (0, shape[0], 0, shape[1])
        if not (0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]):
            raise SourceError(f"crop {source.crop} does not lie inside a {shape[:2]} frame")
        self._crop = (slice(top, bottom), slice(left, right))
        height, width = source.size or (bottom - top, right - left)
        self._size = (int(width), int(height))
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    def _raw(self, observation: Any) -> np.ndarray:
        if self.source.frames == "render":
            frame = self.env.render()
            if not isinstance(frame, np.ndarray) or frame.ndim != 3:
                raise SourceError(f"{self.source.env_id} does not render RGB arrays")
            return frame
        return observation[self.source.key] if self.source.key else observation

    def _observe(self, observation: Any) -> np.ndarray:
        frame = self._raw(observation)[self._crop]
        if (frame.shape[1], frame.shape[0]) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        return np.array(frame, order="C")  # a copy: the environment may draw over its own

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the first frame."""
        if self._last is None:  # ViZDoom starts its game at the first reset
            with _GUARD.watching():
                observation, info = self.env.reset(**kwargs)
        else:
            observation, info = self.env.reset(**kwargs)
        self._last = self._observe(observation)
        return self._last.copy(), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One transition of the real game."""
        if self.source.actions:
            action = self.source.actions[int(action)]
        observation, reward, terminated, truncated, info = self.env.step(action)
        ended = bool(terminated or truncated)
        if not (ended and not self.source.terminal_frame):
            self._last = self._observe(observation)
        assert self._last is not None
        return self._last.copy(), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """The frame that is observed, when the render mode is "rgb_array"."""
        if self.render_mode == "rgb_array" and self._last is not None:
            return self._last.copy()
        return self.env.render()


def _chosen_actions(space: spaces.Space, source: SourceConfig) -> spaces.Discrete:
    """The action space that is left where ``source.actions`` chooses some."""
    known = isinstance(space, spaces.Discrete) and all(a in space for a in source.actions)
    if not known or len(set(source.actions)) != len(source.actions):
        raise SourceError(
            f"source.actions must name actions of {source.env_id}, each once; it has {space}, "
            f"got {source.actions}"
        )
    return spaces.Discrete(len(source.actions))


class _Guard:
    """Kills games that run in processes of their own when this process dies, in whatever way.

    ViZDoom's games outlive a parent that was killed. A small process holds the end of a pipe: it
    ends when this process does, and then the games that are still there are killed. Where there is
    no /proc, nothing is watched.
    """

    _PROGRAM = """
import os, sys
games = dict(line.split() for line in sys.stdin)
for pid, started in games.items():
    try:
        with open(f"/proc/{pid}/stat") as file:
            same = file.read().rpartition(")")[2].split()[19] == started
        if same:
            os.kill(int(pid), 9)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._parent = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Guard the processes that are started within the block."""
        before = _children()
        yield
        new = _children().items() - before.items()
        if new:
            with self._lock:
                process = self._start()
                # Another thread may have started the guard itself in the meantime.
                new = {(pid, started) for pid, started in new if pid != process.pid}
                pipe = process.stdin
                assert pipe is not None
                pipe.writelines(f"{pid} {started}\n" for pid, started in new)
                pipe.flush()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._parent != os.getpid():  # a fork needs its own
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", self._PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # what ends this process's group leaves the guard alone
            )
            self._parent = os.getpid()
            atexit.register(self._stop, self._process, self._parent)
        return self._process

    @staticmethod
    def _stop(process: subprocess.Popen[str], parent: int) -> None:
        if os.getpid() == parent:
            process.communicate()


_GUARD = _Guard()


def _children() -> dict[int, str]:
    """Process number and start time of each child of this process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == os.getpid():
            found[int(path.parent.name)] = fields[19]
    return found
