"""Frames that are read when a part of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class LazyFrames:
    """Frames that are read when they are asked for, and otherwise like the array of them."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray]) -> None:
        """Frames of ``shape`` (n, H, W, 3); ``read(a, b)`` gives those from a to b - 1."""
        self.shape, self._read = shape, read

    def __len__(self) -> int:
        """How many."""
        return self.shape[0]

    def __getitem__(self, where: Any) -> np.ndarray:
        """One frame, those of a slice, or those of an array of numbers."""
        if isinstance(where, slice):
            numbers = range(*where.indices(len(self)))
            if not len(numbers):
                return np.empty((0, *self.shape[1:]), np.uint8)
            first = min(numbers[0], numbers[-1])
            frames = self._read(first, max(numbers[0], numbers[-1]) + 1)
            return (
                frames[[n - first for n in numbers]]
                if abs(numbers.step) > 1
                else (frames if numbers.step == 1 else frames[::-1])
            )
        if isinstance(where, int | np.integer):
            number = range(len(self))[where]
            return self._read(number, number + 1)[0]
        return np.stack([self[int(number)] for number in np.asarray(where)])

    def __iter__(self) -> Iterator[np.ndarray]:
        """One after the other."""
        return (self[number] for number in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them."""
        return np.asarray(self[:], dtype)


Frames = np.ndarray | LazyFrames
