"""An environment whose frames say exactly what happened, to find actions that are off by one.

A counter moves by -1, 0 or 1. Frames show the counter, the number of steps and the episode's random
tag as black and white cells (their binary digits), which can be read back from a frame.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from nfd_env import config
from nfd_env.data.policies import RandomHeld
from nfd_env.data.record import record_episode
from nfd_env.data.shards import DatasetSpec, ShardWriter
from nfd_env.sources.source import SourceConfig, make_source
from nfd_env.spaces import space_to_dict

ENV_ID = "tests/Counter-v0"
HEIGHT, WIDTH, CELL = 32, 48, 8


def move(action: Any) -> Any:
    """By how much an action moves the counter."""
    return np.asarray(action, np.int64) - 1


class CounterEnv(gymnasium.Env):
    """Ends after ``length`` steps; the reward is the counter's move."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(
        self,
        length: int = 12,
        hide_terminal: bool = False,
        dict_key: str = "",
        render_mode: str | None = None,
    ) -> None:
        self.length, self.hide_terminal, self.dict_key = length, hide_terminal, dict_key
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(3)
        frame = spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.observation_space = spaces.Dict({dict_key: frame}) if dict_key else frame
        self.frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)  # one buffer, drawn over every step

    def _observe(self) -> Any:
        paint(self.frame, self.counter, self.steps, self.tag)
        return {self.dict_key: self.frame} if self.dict_key else self.frame

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.counter, self.steps = int(self.np_random.integers(60, 200)), 0
        self.tag = int(self.np_random.integers(128))
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.counter += int(move(action))
        self.steps += 1
        terminated = self.steps >= self.length
        observation = self._observe()
        if terminated and self.hide_terminal:
            self.frame[:] = 0
        return observation, float(move(action)), terminated, False, {}

    def render(self) -> np.ndarray:
        return self.frame.copy()


def tell(env: gymnasium.Env) -> np.ndarray:
    """Signals: the counter and the number of steps."""
    counter: Any = env.unwrapped
    return np.array([counter.counter, counter.steps]) / 256


def paint(frame: np.ndarray, counter: int, steps: int, tag: int) -> None:
    """Draw the binary digits of three numbers into ``frame``, and a mark that is always there."""
    cells = np.zeros((HEIGHT // CELL) * (WIDTH // CELL), np.uint8)
    cells[:8] = [counter >> i & 1 for i in range(8)]
    cells[8:16] = [steps >> i & 1 for i in range(8)]
    cells[16:23] = [tag >> i & 1 for i in range(7)]
    cells[-1] = 1
    grid = cells.reshape(HEIGHT // CELL, WIDTH // CELL) * np.uint8(255)
    frame[:] = grid.repeat(CELL, 0).repeat(CELL, 1)[..., None]


def read(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counters and step numbers of frames (..., H, W, 3)."""
    size = frames.shape[-3] * CELL // HEIGHT
    cells = frames[..., size // 2 :: size, size // 2 :: size, 0] > 127
    flat = cells.reshape(*cells.shape[:-2], -1).astype(np.int64)
    assert flat[..., -1].all(), "not a frame of the counter env"
    digits = 2 ** np.arange(8)
    return flat[..., :8] @ digits, flat[..., 8:16] @ digits


def source(**kwargs: Any) -> SourceConfig:
    """How to make the counter env anywhere; ``kwargs`` are fields of ``SourceConfig``."""
    return SourceConfig(env_id=ENV_ID, imports=["tests.counter_env"], **kwargs)


def dataset_spec(source_values: dict[str, Any] | None = None) -> DatasetSpec:
    return DatasetSpec(
        frame_shape=(HEIGHT, WIDTH, 3),
        action_shape=(),
        action_dtype="int64",
        action_space=space_to_dict(spaces.Discrete(3)),
        source=source_values or {},
        fps=25.0,
    )


def record_counter_episodes(
    folder: Path,
    episodes: int,
    validation_every: int = 4,
    writer: str = "w00",
    frames_per_shard: int = 20_000,
    terminal_frame: bool = True,
    first: int = 0,
    **env_kwargs: Any,
) -> None:
    """Record into ``folder`` in this process, as a collecting worker does."""
    settings = source(kwargs=env_kwargs, terminal_frame=terminal_frame)
    spec = dataset_spec(config.to_dict(settings))
    spec.save(folder)
    env = make_source(settings)
    with ShardWriter(folder, spec, writer, frames_per_shard) as shards:
        for number in range(first, first + episodes):
            split = "validation" if number % validation_every == 0 else "train"
            policy = RandomHeld(1, 4)
            shards.add(record_episode(env, policy, number, 1000, policy="held", split=split))
    env.close()


class AlwaysRight:
    """A custom policy; its frames must have arrived untouched."""

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        self.steps = 0

    def act(self, observation: np.ndarray) -> int:
        assert read(observation)[1] == self.steps
        self.steps += 1
        return 2


class WithoutTorch(AlwaysRight):
    """Fails where torch has been imported, or would take all processors."""

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        if "torch" in sys.modules:
            raise RuntimeError("torch was imported")
        if not os.environ.get("OMP_NUM_THREADS", "").isdecimal():
            raise RuntimeError("a network would compute in as many threads as there are cores")


class Failing(AlwaysRight):
    """A policy with a bug."""

    def act(self, observation: np.ndarray) -> int:
        raise RuntimeError("the policy's own bug")


class Killed(AlwaysRight):
    """Kills its process in the middle of its third episode, as the machine's end would."""

    episodes = 0

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self.episodes += 1

    def act(self, observation: np.ndarray) -> int:
        if self.episodes == 3 and self.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(observation)


gymnasium.register(ENV_ID, entry_point="tests.counter_env:CounterEnv", disable_env_checker=True)
