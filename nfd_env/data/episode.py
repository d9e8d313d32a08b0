"""One recorded episode in memory."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np

from nfd_env.data.lazy_frames import Frames, LazyFrames

SPLITS = ("train", "validation")
IMPORTED = "import:"
"""What the ``policy`` of an imported recording begins with; its name follows."""


@dataclass(frozen=True)
class Episode:
    """An episode of T transitions: T+1 frames, and what happened between them.

    ``actions[t]`` is the action taken while ``frames[t]`` was shown; it *causes* ``frames[t + 1]``,
    ``rewards[t]``, ``terminated[t]`` and ``truncated[t]``.

    Attributes:
        frames: uint8 (T+1, H, W, 3), RGB.
        actions: (T, ...) in the environment's own action format.
        rewards: float32 (T,), finite.
        terminated: bool (T,); True at most at the last transition.
        truncated: bool (T,); True at most at the last transition.
        seed: the seed that the episode's environment was reset with, a whole number of any size.
        policy: name of the behaviour policy.
        split: "train" or "validation".
        signals: float32 (T, k), what the environment told beyond its frames after each transition;
            by default k = 0.
    """

    frames: Frames
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    seed: int = 0
    policy: str = "unknown"
    split: str = "train"
    signals: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check lengths, types and values.

        Raises:
            ValueError: when the arrays do not belong together.
        """
        for name in ("frames", "actions", "rewards", "terminated", "truncated"):
            value = getattr(self, name)
            if not isinstance(value, LazyFrames):
                object.__setattr__(self, name, np.asarray(value))
        transitions = len(self.actions)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(
                f"frames must be uint8 (T+1, H, W, 3), got {self.frames.dtype} {self.frames.shape}"
            )
        if transitions < 1 or len(self.frames) != transitions + 1:
            raise ValueError(
                f"{transitions} actions need {transitions + 1} frames (one before each action and "
                f"one after the last), got {len(self.frames)}"
            )
        if self.signals is None:
            object.__setattr__(self, "signals", np.zeros((transitions, 0), np.float32))
        for name in ("rewards", "terminated", "truncated", "signals"):
            array = getattr(self, name)
            if array.ndim != 1 + (name == "signals") or array.dtype == object:
                raise ValueError(f"{name} must be numbers, one a transition, got {array.shape}")
            if len(array) != transitions:
                raise ValueError(f"{name} has {len(array)} entries for {transitions} actions")
        for name in ("actions", "rewards"):
            array = getattr(self, name)
            if array.dtype.kind not in "buif":
                raise ValueError(f"{name} must be numbers, got {array.dtype}")
            finite = np.isfinite(array).reshape(transitions, -1).all(1)
            if not finite.all():
                step = int(finite.argmin())
                raise ValueError(f"{name} must be finite, got {array[step]} at step {step}")
        if (self.terminated | self.truncated)[:-1].any():
            raise ValueError("an episode ends at its last transition, not before")
        object.__setattr__(self, "seed", operator.index(self.seed))
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")

    def __len__(self) -> int:
        """Number of transitions T."""
        return len(self.actions)


def kind_of(policy: str) -> str:
    """A policy; of an imported recording, whose name it has, only that it was imported."""
    return "import" if policy.startswith(IMPORTED) else policy
