"""One recorded episode in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Episode:
    """An episode of T transitions: T+1 frames, and what happened between them.

    ``actions[t]`` is the action taken while ``frames[t]`` was shown; it *causes* ``frames[t + 1]``,
    ``rewards[t]``, ``terminated[t]`` and ``truncated[t]``.

    Attributes:
        frames: uint8 (T+1, H, W, 3), RGB.
        actions: (T, ...) in the environment's own action format.
        rewards: float32 (T,).
        terminated: bool (T,); True at most at the last transition.
        truncated: bool (T,); True at most at the last transition.
        seed: the seed that the episode's environment was reset with.
        policy: name of the behaviour policy.
        split: "train" or "validation".
        signals: float32 (T, k), what the environment told beyond its frames after each transition;
            by default k = 0.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    seed: int = 0
    policy: str = "unknown"
    split: str = "train"
    signals: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check lengths and types.

        Raises:
            ValueError: when the arrays do not belong together.
        """
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
            if len(getattr(self, name)) != transitions:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {transitions} actions"
                )

    def __len__(self) -> int:
        """Number of transitions T."""
        return len(self.actions)
