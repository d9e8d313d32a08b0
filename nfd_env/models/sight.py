"""Which earlier frames a frame attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """The latest frames, and beyond them every so-many-th one.

    What has left the picture can come back: a few frames that lie far apart remember long, at the
    price of a few. Which frames are key frames depends on their number only, so that what a frame
    sees far back is what the next one sees, and its keys and values need not move.

    Attributes:
        window: latest frames, the frame itself included.
        keyframes: further frames before those, of numbers that ``stride`` divides.
        stride: frames from one key frame to the next.
    """

    window: int
    keyframes: int = 0
    stride: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.window < 2:
            raise ValueError(f"window must be at least 2 frames, got {self.window}")
        if self.keyframes < 0 or self.stride < 1:
            raise ValueError("keyframes must not be negative, and their stride at least 1")

    @property
    def frames(self) -> int:
        """Most frames that a frame sees, itself included."""
        return self.window + self.keyframes

    @property
    def reach(self) -> int:
        """Frames from the farthest that can be seen to the frame itself, both included."""
        return self.window + self.keyframes * self.stride

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether frame number ``key`` is among the latest of frame number ``query``."""
        return (key <= query) & (key > query - self.window)

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether frame number ``key`` is one of the key frames of ``query`` before those."""
        between = (key <= query - self.window) & (key > query - self.reach)
        return between & (key % self.stride == 0)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether frame number ``query`` attends to frame number ``key``."""
        return self.near(query, key) | self.far(query, key)
