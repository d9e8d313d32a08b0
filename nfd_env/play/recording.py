"""What is kept of a play: an MP4 to show, or a recording that ``nfd train`` reads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.data.episode import Episode
from nfd_env.data.shards import DatasetSpec, ShardWriter
from nfd_env.play.game import Outcome
from nfd_env.spaces import ActionCodec, space_to_dict
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


class PlayRecorder:
    """Appends episodes of play to a data set; a segment begins with the picture shown then."""

    def __init__(
        self,
        folder: str | Path,
        frame_shape: tuple[int, ...],
        space: spaces.Space,
        source: dict[str, Any],
        fps: float,
        limit: int = 4000,
    ) -> None:
        """Open ``folder``, a new data set or one of the same world.

        Args:
            folder: see ``nfd_env.data.shards``.
            frame_shape: (H, W, 3).
            space: the action space.
            source: the world's source section, plain values.
            fps: frames a second.
            limit: transitions after which a segment is committed as truncated, to bound memory.

        Raises:
            RecordingError: when the folder holds recordings of something else.
        """
        codec = ActionCodec(space)
        spec = DatasetSpec(
            frame_shape=(frame_shape[0], frame_shape[1], 3),
            action_shape=codec.shape,
            action_dtype=str(np.dtype(space.dtype or np.int64)),
            action_space=space_to_dict(space),
            source=source,
            fps=fps,
        )
        self.folder, self._limit = Path(folder), limit
        spec.save(self.folder)
        self._writer = ShardWriter(self.folder, spec, "play")
        self.saved = 0
        self._lock = threading.Lock()
        self._clear()

    def began(self, frame: np.ndarray, seed: int | None) -> None:
        """An episode (or a segment of one) begins with ``frame``."""
        with self._lock:
            self._commit()
            self._frames, self._seed = [frame], seed or 0

    def took(self, action: Any, outcome: Outcome, by_agent: bool) -> None:
        """``action`` led to ``outcome``."""
        with self._lock:
            if not self._frames:
                return
            self._frames.append(outcome.frame)
            self._actions.append(np.asarray(action))
            self._rewards.append(outcome.reward)
            self._ends.append((outcome.terminated, outcome.truncated))
            self._players.add("agent" if by_agent else "person")
            if outcome.terminated or outcome.truncated or len(self._actions) >= self._limit:
                last = outcome.frame
                self._commit()
                if not (outcome.terminated or outcome.truncated):
                    self._frames = [last]

    def close(self) -> None:
        """Commit the segment under way, as truncated, and let others record into the folder."""
        with self._lock:
            self._commit()
            self._writer.close()

    def _clear(self) -> None:
        self._frames: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        self._ends: list[tuple[bool, bool]] = []
        self._players: set[str] = set()
        self._seed = 0

    def _commit(self) -> None:
        if self._actions:
            ends = np.array(self._ends, bool)
            ends[-1, 1] |= not ends[-1, 0]
            self._writer.add(
                Episode(
                    np.stack(self._frames),
                    np.stack(self._actions),
                    np.array(self._rewards, np.float32),
                    ends[:, 0],
                    ends[:, 1],
                    seed=self._seed,
                    policy="+".join(sorted(self._players)),
                )
            )
            self.saved += 1
        self._clear()
