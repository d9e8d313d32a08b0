"""What led to a picture that is like no real one, as a file.

The signal is the tokenizer's re-encoding error, ``info["ood"]`` of the env, see
``NFDVectorEnv.watch_ood``. It tells broken pictures, not wrong ones that look sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import numpy as np

RED = 2.0
"""Of the mean of real frames: those of BigFish and TakeCover had 1.94 at most, of CarRacing 2 in
100 have more; what has more are mostly broken pictures (``python -m tests.play.measure_drift``)."""
KEPT = 256
"""Frames of the last play that are kept, 7 seconds of a game of 35 a second."""

Moment = tuple[np.ndarray, np.ndarray, float, int, int]
"""A dreamed frame, the action that led to it, its drift, episode and step."""


def save_trail(trail: Sequence[Moment], target: IO[bytes], seed: int | None) -> None:
    """Write the last frames of a dream, oldest first, as a NumPy archive (.npz).

    It holds ``frames`` (n, H, W, 3), uint8; ``actions``, of which ``actions[i]`` led to
    ``frames[i]``; ``drift`` (n,), the re-encoding error relative to that of real frames;
    ``episodes`` and ``steps`` (n,); ``seed`` (where None, -1) and ``red``, from which on a drift is
    marked.

    Raises:
        ValueError: when there is none.
    """
    if not trail:
        raise ValueError("there is no drift to keep: start with --drift, and dream first")
    frames, actions, drift, episodes, steps = zip(*trail, strict=True)
    np.savez_compressed(
        target,
        frames=np.stack(frames),
        actions=np.stack(actions),
        drift=np.array(drift, np.float32),
        episodes=np.array(episodes),
        steps=np.array(steps),
        seed=-1 if seed is None else seed,
        red=RED,
    )
