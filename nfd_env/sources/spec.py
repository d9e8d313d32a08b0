"""What a real environment is, as plain values, and what is said when it is not that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import numpy as np

from nfd_env.config import check_ranges, config_class

# What a person sees and presses: it can change later without anything to be recorded anew.
PRESENTATION = ("action_names", "keys", "display_aspect", "fps")
# Settings that recordings and records of runs may be too old to know; they then had none of it.
_LATER = ("opening",)

# How ids of recordings begin that were made elsewhere, see nfd_env.data.importers.
VIDEOS, MINARI = "videos:", "minari:"

_SLOWEST, _FASTEST = 0.01, 10_000  # frames a second
_WIDEST = 100  # times as wide as high


def is_imported(env_id: str) -> bool:
    """Whether an id names recordings that were made elsewhere, and no game."""
    return env_id.startswith((VIDEOS, MINARI))


def recorded_part(source: Mapping[str, Any]) -> dict[str, Any]:
    """What of the values of a ``SourceConfig`` decides what is recorded."""
    return {
        name: value
        for name, value in source.items()
        if name not in PRESENTATION and (value or name not in _LATER)
    }


class SourceError(RuntimeError):
    """The real environment of a world cannot be made here, or does what no environment should."""


class GameFailedError(SourceError):
    """The game's own code raised an error; another seed may do."""


@config_class
class SourceConfig:
    """Which real environment to record, and how its frames become observations.

    Attributes:
        env_id: Gymnasium id of the real environment; "envpool/" and the name of an EnvPool task;
            or recordings that were made elsewhere: "videos:" and a folder, "minari:" and a data set
            (see ``nfd_env.data.importers``).
        imports: modules to import first, so that the id is registered.
        kwargs: passed to ``gymnasium.make``.
        frames: "observation" or "render": where the RGB frames come from.
        key: entry of a Dict observation that holds the frame; "" for a plain Box observation.
        crop: [top, bottom, left, right] in pixels; empty for the whole frame.
        size: [height, width] after an area-averaging resize; empty for no resize.
        terminal_frame: False when the environment shows no frame at the terminal step (ViZDoom
            hands out zeros there): the last frame is then shown again.
        opening: steps with the resting action that are taken after each reset before the first
            frame is observed: an opening in which nothing can be played, such as CarRacing's zoom.
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
    opening: int = 0
    actions: list[int] = field(default_factory=list)
    fps: float = 0.0
    display_aspect: float = 0.0
    action_names: list[str] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.frames not in ("observation", "render"):
            raise ValueError(f"source.frames must be observation or render, got {self.frames!r}")
        if self.size and not (len(self.size) == 2 and min(self.size) > 0):
            raise ValueError(f"source.size must be [height, width] above 0, got {self.size}")
        if self.crop:
            top, bottom, left, right = [*self.crop, 0, 0, 0, 0][:4]
            if len(self.crop) != 4 or not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(
                    "source.crop must be [top, bottom, left, right] of a part of the frame, got "
                    f"{self.crop}"
                )
        check_ranges(self, "source.", opening="[0, 10000]")
        if self.fps:
            check_fps("source.fps", self.fps)
        if not 0 <= self.display_aspect < _WIDEST:
            raise ValueError(
                f"source.display_aspect must be from 0 to {_WIDEST}, got {self.display_aspect}"
            )


def check_fps(name: str, fps: float) -> None:
    """Refuse a frame rate that no game has and no film can be written at; raises ValueError."""
    if not _SLOWEST <= fps <= _FASTEST:
        raise ValueError(f"{name} must be from {_SLOWEST} to {_FASTEST}, got {fps:g}")


def area_resize() -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
    """A function that brings a frame to (height, width), each pixel the mean of an area.

    Raises:
        SourceError: when OpenCV, which does it, cannot be imported: its libraries are not
            everywhere, and nothing else gives the same numbers.
    """
    try:
        import cv2
    except ImportError as error:
        raise SourceError(
            f"source.size needs OpenCV, which cannot be imported ({error}): apt install libgl1 "
            "libglib2.0-0, or leave source.size out and record the frames as they are"
        ) from None

    def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        frame = np.ascontiguousarray(frame)
        return cv2.resize(frame, (size[1], size[0]), interpolation=cv2.INTER_AREA)

    return resize


def short(value: Any) -> str:
    """``value`` in one line of an error message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a foreign object, or a number of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
