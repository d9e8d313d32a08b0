"""Frames that stay in the videos they came in, and are decoded when they are asked for.

A shard of such recordings has no frames but, for each frame, when its video presents it
(``pts.bin``, int64); its commit records name the videos. Few decoders are open at a time, each with
the frames that it decoded last: what goes on where the last reading ended is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env.data.layout import RecordingError
from nfd_env.data.lazy_frames import LazyFrames
from nfd_env.sources.spec import area_resize

_DECODERS = 16  # that are open at a time; each has a file handle and some frames
_KEPT = 64  # frames that each keeps: a quarter of a gigabyte in all, of 384 x 224 pixels
_AHEAD = 2.0  # seconds that are rather decoded than jumped over: key frames lie that far apart


class VideoFrames(LazyFrames):
    """Consecutive frames of a video, cropped and resized."""

    def __init__(
        self,
        video: Path,
        times: Callable[[int, int], np.ndarray],
        shape: tuple[int, ...],
        crop: Sequence[int] = (),
        size: Sequence[int] = (),
    ) -> None:
        """Frames of ``shape`` (n, H, W, 3); ``times(a, b)`` tells when a to b - 1 are presented."""
        self.video, self._times = video, times
        self._crop, self._size = tuple(crop), tuple(size)
        super().__init__(shape, self._decoded)

    def part(self, first: int, stop: int) -> VideoFrames:
        """Frames ``first`` to ``stop`` - 1, none of which is decoded for that."""

        def times(a: int, b: int) -> np.ndarray:
            return self._times(first + a, first + b)

        shape = (stop - first, *self.shape[1:])
        return VideoFrames(self.video, times, shape, self._crop, self._size)

    def times(self) -> np.ndarray:
        """When each frame is presented, int64, in the video's units."""
        return self._times(0, len(self))

    def _decoded(self, first: int, stop: int) -> np.ndarray:
        decoder = _decoder(self.video, self._crop, self._size)
        return np.stack(decoder.read(self._times(first, stop).tolist()))


def presentation_times(video: Path) -> tuple[np.ndarray, float]:
    """When a video presents each of its frames, int64 in its units, and its frames a second.

    Nothing is decoded, but all of the file is read.

    Raises:
        RecordingError: when it cannot be read or holds no video.
    """
    with _stream(video) as stream:
        packets = (p for p in stream.container.demux(stream) if p.size > 0)
        times = np.sort(np.array([p.pts for p in packets], np.int64))
        rate = float(stream.average_rate or 0)
    if (np.diff(times) <= 0).any():
        raise RecordingError(f"{video} cannot be used: two frames have the same time")
    if len(times) < 2:
        raise RecordingError(
            f"{video} has {len(times)} frames; an action lies between two: take it away"
        )
    return times, rate


def picture_size(video: Path) -> tuple[int, int]:
    """Height and width of a video's pictures.

    Raises:
        RecordingError: when it cannot be read or holds no video.
    """
    with _stream(video) as stream:
        return int(stream.height), int(stream.width)


@contextmanager
def _stream(video: Path) -> Iterator[Any]:
    """The pictures of an open video; what goes wrong with it within the block is told by name."""
    import av

    try:
        # A relative path may look like a protocol's address.
        with av.open(str(video.absolute())) as container:
            yield container.streams.video[0]
    except (av.FFmpegError, OSError, IndexError, TypeError) as error:
        raise RecordingError(f"{video} cannot be read: {error}") from None


def fitted(
    frame: np.ndarray, name: str, crop: Sequence[int] = (), size: Sequence[int] = ()
) -> np.ndarray:
    """A frame of ``name`` cropped and resized, uint8 (H, W, 3); see ``SourceConfig``.

    Raises:
        RecordingError: when it is no picture, or smaller than what is cut out of it.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise RecordingError(
            f"{name}: frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}"
        )
    if crop:
        top, bottom, left, right = crop
        if not (0 <= top < bottom <= frame.shape[0] and 0 <= left < right <= frame.shape[1]):
            raise RecordingError(f"{name}: crop {list(crop)} leaves the {frame.shape[:2]} frame")
        frame = frame[top:bottom, left:right]
    if size:
        frame = area_resize()(frame, (size[0], size[1]))
    return np.array(frame, order="C")


@lru_cache(_DECODERS)
def _decoder(video: Path, crop: tuple[int, ...], size: tuple[int, ...]) -> _Decoder:
    return _Decoder(video, crop, size)


class _Decoder:
    """An open video, somewhere in the middle."""

    def __init__(self, video: Path, crop: tuple[int, ...], size: tuple[int, ...]) -> None:
        import av

        self._video, self._fit = video, (crop, size)
        try:
            self._container = av.open(str(video.absolute()))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError, IndexError) as error:
            raise RecordingError(
                f"{video} cannot be read ({error}): the recordings refer to it, put it back"
            ) from None
        self._stream.thread_type = "AUTO"
        self._time_base = float(self._stream.time_base or 1)  # seconds
        self._frames: Iterator[Any] = iter(())
        self._at: int | None = None  # time of the frame that was decoded last
        self._kept: dict[int, np.ndarray] = {}

    def read(self, times: list[int]) -> list[np.ndarray]:
        """The frames presented at ``times``, which rise."""
        found = {t: self._kept[t] for t in times if t in self._kept}
        missing = [t for t in times if t not in found]
        if missing:
            far = self._at is None or not 0 < (missing[0] - self._at)
            if far or (missing[0] - (self._at or 0)) * self._time_base > _AHEAD:
                self._jump(missing[0])
            found |= self._decode(missing)
        self._kept |= found
        for old in list(self._kept)[: max(0, len(self._kept) - _KEPT)]:
            del self._kept[old]
        return [found[t] for t in times]

    def _jump(self, time: int) -> None:
        self._container.seek(time, stream=self._stream)
        self._frames, self._at = self._container.decode(self._stream), None

    def _decode(self, times: list[int], again: bool = True) -> dict[int, np.ndarray]:
        import av

        wanted, found = set(times), dict[int, np.ndarray]()
        try:
            for frame in self._frames:
                begun, self._at = self._at is not None, frame.pts
                if not begun and frame.pts > times[0] and again:
                    break  # the jump went too far: some files say wrongly where key frames are
                if frame.pts in wanted:
                    picture = frame.to_ndarray(format="rgb24")
                    found[frame.pts] = fitted(picture, str(self._video), *self._fit)
                if frame.pts >= times[-1]:
                    break
        except av.FFmpegError as error:
            self._at = None
            raise RecordingError(f"{self._video} cannot be decoded: {error}") from None
        if len(found) < len(times) and again:
            self._jump(0)
            return self._decode(times, again=False)
        if len(found) < len(times):
            self._at = None
            raise RecordingError(
                f"{self._video} has changed since it was imported: it lacks "
                f"{len(times) - len(found)} of {len(times)} frames; put the old file back, or "
                "import into a new folder"
            )
        return found
