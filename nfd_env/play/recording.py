"""An MP4 of a play, and the size at which a person should see a frame."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nfd_env.video import mp4_writer

_CRF = 19  # of films of a play; 18 is about where loss begins to be seen


def display_size(
    frame_shape: tuple[int, ...], aspect: float, height: int, pixelated: bool = False
) -> tuple[int, int]:
    """(width, height) in even pixels at which a person should see a frame.

    Args:
        frame_shape: (H, W, 3).
        aspect: width / height as shown; 0 for square pixels.
        height: about how high.
        pixelated: every pixel becomes a whole number of rows high, and of columns wide if its
            pixels are square.
    """
    ratio = aspect or frame_shape[1] / frame_shape[0]
    if pixelated:
        times = max(1, round(height / frame_shape[0]))
        times += times % 2 if frame_shape[0] % 2 or frame_shape[1] % 2 else 0
        height = times * frame_shape[0]
    return max(2, round(height * ratio / 2) * 2), max(2, round(height / 2) * 2)


class VideoFile:
    """An MP4 that is written while playing; encoding happens on another thread."""

    def __init__(
        self, path: str | Path, fps: float, size: tuple[int, int], pixelated: bool = False
    ) -> None:
        """Begin; see ``nfd_env.video.mp4_writer``, also for what is raised."""
        self._writing = mp4_writer(path, fps, size, _CRF, pixelated=pixelated, live=True)
        self._append = self._writing.__enter__()  # here, for the caller is to know of errors
        self._frames: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=600)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="video", daemon=True)
        self._thread.start()

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 (H, W, 3) of any size."""
        self._frames.put(frame)

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: when it could not be written.
        """
        self._frames.put(None)
        self._thread.join()
        if self._error is not None:
            raise OSError(f"the video could not be written: {self._error}")

    def _run(self) -> None:
        frames = self._added()
        try:
            with ExitStack() as stack:
                stack.push(self._writing)
                for frame in frames:
                    self._append(frame)
        except Exception as error:
            self._error = error
            for _ in frames:  # whoever adds does not wait for ever
                pass

    def _added(self) -> Iterator[np.ndarray]:
        while (frame := self._frames.get()) is not None:
            yield frame
