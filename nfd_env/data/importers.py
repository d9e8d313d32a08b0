"""Recordings made elsewhere as a data set: videos with files of actions, and Minari data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env import config
from nfd_env.data.episode import Episode
from nfd_env.data.layout import DatasetSpec, RecordingError
from nfd_env.data.shards import RecordedDataset, ShardWriter
from nfd_env.files import make_folder, owned_folder
from nfd_env.progress import progress_bar
from nfd_env.sources.spec import SourceConfig
from nfd_env.spaces import ActionCodec, space_to_dict

_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class ImportConfig:
    """How foreign recordings become a data set.

    Attributes:
        folder: where the data set is written.
        name: what the game is called.
        columns: of a file of actions: one for Discrete actions, or one that holds lists, else one
            for each number of an action. Columns "reward", "terminated" and "truncated" are read
            where they are there.
        key: entry of a Minari Dict observation that holds the frame; "" for a plain one.
        crop: [top, bottom, left, right] in pixels; empty for the whole frame.
        size: [height, width] after an area-averaging resize; empty for no resize.
        fps: frames a second; 0 for what a video says of itself, else 30.
        segment: transitions after which a long recording is cut, to bound memory.
        validation_every: every n-th segment is held out.
    """

    folder: str
    name: str
    columns: list[str] = field(default_factory=lambda: ["action"])
    key: str = ""
    crop: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    fps: float = 0.0
    segment: int = 2000
    validation_every: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.segment < 1 or self.validation_every < 2 or not self.columns:
            raise config.ConfigError(
                "segment must be at least 1, validation_every at least 2, and columns must be named"
            )
        if self.fps < 0 or (self.size and (len(self.size) != 2 or min(self.size) < 1)):
            raise config.ConfigError(f"fps or size cannot be: {self.fps}, {self.size}")


@dataclass(frozen=True)
class _Recording:
    """Frames that are yet to be read, and what happened between them."""

    name: str
    frames: Iterable[np.ndarray]  # T + 1, each uint8 (H, W, 3)
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def import_videos(
    videos: str | Path, action_space: spaces.Space, settings: ImportConfig
) -> RecordedDataset:
    """Write the videos of a folder, each with its file of actions beside it, as a data set.

    The file has the video's name and is .csv with a header, .jsonl or .parquet. Its row t was done
    while frame t was shown.
    There is a row for each frame but the last; one for the last too leads nowhere and is left out.
    Run again to go on, or to add videos.

    Raises:
        RecordingError: when frames and actions do not belong together; names the file. All files
            are checked before anything is written.
    """
    import av

    found = sorted(p for p in Path(videos).expanduser().glob("*.mp4"))
    if not found:
        raise RecordingError(f"{videos} holds no .mp4 files")
    codec = ActionCodec(action_space)
    tables, rates = {}, set()
    for video in found:
        beside = [video.with_suffix(s) for s in _SUFFIXES if video.with_suffix(s).is_file()]
        if len(beside) != 1:
            raise RecordingError(
                f"{video} needs one file of actions beside it: {video.stem} with "
                f"{', '.join(_SUFFIXES)}; there are {len(beside)}"
            )
        try:
            with av.open(str(video)) as container:
                stream = container.streams.video[0]
                count = sum(packet.size > 0 for packet in container.demux(stream))
                rates.add(float(stream.average_rate or 0))
        except (av.FFmpegError, IndexError) as error:
            raise RecordingError(f"{video} cannot be read: {error}") from None
        tables[video] = _table(beside[0], action_space, codec, settings, count)
    if not settings.fps and len(rates) > 1:
        raise RecordingError(f"{videos} has videos of {sorted(rates)} frames a second: set fps")

    def recordings() -> Iterator[_Recording]:
        for video, (actions, rewards, terminated) in tables.items():
            yield _Recording(
                video.stem, _video_frames(video, settings), actions, rewards, terminated
            )

    return _write(recordings(), action_space, settings, settings.fps or rates.pop() or 30.0)


def import_minari(dataset: Any, settings: ImportConfig) -> RecordedDataset:
    """Write a Minari data set whose observations are uint8 RGB frames as a data set.

    Args:
        dataset: a ``minari.MinariDataset``, or the id of one that is there.
        settings: how.

    Raises:
        RecordingError: when it shows no frames.
    """
    if isinstance(dataset, str):
        try:
            import minari
        except ImportError:
            raise RecordingError(
                "Minari data sets need minari: pip install 'nfd-env[minari]'"
            ) from None
        dataset = minari.load_dataset(dataset)

    def recordings() -> Iterator[_Recording]:
        for episode in dataset.iterate_episodes():
            frames = episode.observations
            if settings.key:
                if not isinstance(frames, dict) or settings.key not in frames:
                    raise RecordingError(f"observations have no entry {settings.key!r}")
                frames = frames[settings.key]
            name = f"episode {episode.id}"
            if not isinstance(frames, np.ndarray):
                raise RecordingError(f"{name}: observations are no frames: set key")
            actions = np.asarray(episode.actions)
            if len(frames) != len(actions) + 1:
                raise RecordingError(
                    f"{name}: {len(frames)} frames do not fit {len(actions)} actions"
                )
            fitted = (_fitted(frame, name, settings) for frame in frames)
            rewards = np.asarray(episode.rewards)
            yield _Recording(name, fitted, actions, rewards, bool(episode.terminations[-1]))

    return _write(recordings(), dataset.action_space, settings, settings.fps or 30.0)


def _write(
    recordings: Iterator[_Recording], space: spaces.Space, settings: ImportConfig, fps: float
) -> RecordedDataset:
    codec = ActionCodec(space)
    folder = make_folder(settings.folder)
    with owned_folder(folder):
        writer: ShardWriter | None = None
        there: dict[str, int] = {}
        number = 0
        if (folder / "dataset.yaml").exists():
            for episode in RecordedDataset(folder):
                there[episode.policy] = there.get(episode.policy, 0) + 1
                number = max(number, (episode.number or 0) + 1)
        try:
            for recording in progress_bar(recordings, "importing", True, unit="recording"):
                label, frames = f"import:{recording.name}", iter(recording.frames)
                last = _next(frames, recording)
                if writer is None:
                    spec = DatasetSpec(
                        (last.shape[0], last.shape[1], 3),
                        codec.shape,
                        str(np.dtype(space.dtype or np.int64)),
                        space_to_dict(space),
                        config.to_dict(SourceConfig(f"imported/{settings.name}")),
                        fps,
                    )
                    spec.save(folder)
                    writer = ShardWriter(folder, spec, "import")
                total = len(recording.actions)
                for segment, first in enumerate(range(0, total, settings.segment)):
                    stop = min(total, first + settings.segment)
                    shown = [last, *(_next(frames, recording) for _ in range(first, stop))]
                    last = shown[-1]
                    if segment < there.get(label, 0):
                        continue
                    ended = np.arange(first, stop) == stop - 1
                    terminated = ended & (stop == total) & recording.terminated
                    try:
                        episode = Episode(
                            np.stack(shown),
                            recording.actions[first:stop],
                            recording.rewards[first:stop],
                            terminated,
                            ended & ~terminated,
                            seed=number,
                            policy=label,
                            split=("train" if number % settings.validation_every else "validation"),
                        )
                    except ValueError as error:
                        raise RecordingError(f"{recording.name}: {error}") from None
                    writer.add(episode, number)
                    number += 1
        finally:
            if writer is not None:
                writer.close()
    return RecordedDataset(folder)


def _next(frames: Iterator[np.ndarray], recording: _Recording) -> np.ndarray:
    frame = next(frames, None)
    if frame is None:
        raise RecordingError(
            f"{recording.name} ends before its {len(recording.actions)} actions do"
        )
    return frame


def _video_frames(video: Path, settings: ImportConfig) -> Iterator[np.ndarray]:
    import av

    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield _fitted(frame.to_ndarray(format="rgb24"), str(video), settings)


def _fitted(frame: np.ndarray, name: str, settings: ImportConfig) -> np.ndarray:
    """The cropped and resized frame."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise RecordingError(
            f"{name}: frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}"
        )
    if settings.crop:
        top, bottom, left, right = settings.crop
        if not (0 <= top < bottom <= frame.shape[0] and 0 <= left < right <= frame.shape[1]):
            raise RecordingError(f"{name}: crop {settings.crop} leaves the {frame.shape[:2]} frame")
        frame = frame[top:bottom, left:right]
    if settings.size:
        import cv2

        height, width = settings.size
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    return np.array(frame, order="C")


def _table(
    path: Path, space: spaces.Space, codec: ActionCodec, settings: ImportConfig, frames: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Actions (T, ...), rewards (T,), and whether the last transition terminated."""
    columns = _columns(path)
    missing = [c for c in settings.columns if c not in columns]
    if missing:
        raise RecordingError(f"{path} has no column {missing[0]!r}, but {', '.join(columns)}")
    rows = len(columns[settings.columns[0]])
    if rows not in (frames, frames - 1):
        raise RecordingError(
            f"{path} has {rows} actions, but its video has {frames} frames: there must be "
            f"{frames - 1}, one between any two frames"
        )
    count = frames - 1
    try:
        parts = [_numbers(columns[c][:count]) for c in settings.columns]
        actions = parts[0] if len(parts) == 1 else np.stack(parts, 1)
        if len(settings.columns) == 1 and codec.shape == (1,) and actions.ndim == 1:
            actions = actions[:, None]
        if np.dtype(space.dtype).kind in "iu" and np.array_equal(actions, np.rint(actions)):
            actions = actions.astype(np.int64)  # a table may have written 1.0
        codec.check(actions, count)
        rewards = _numbers(columns.get("reward", [0.0] * count)[:count])
        terminated = bool(_numbers(columns.get("terminated", [0])[: count or 1])[-1])
    except (TypeError, ValueError) as error:
        raise RecordingError(f"{path}: {error}") from None
    return actions.astype(space.dtype), rewards, terminated


def _numbers(values: Sequence[Any]) -> np.ndarray:
    words = {"true": 1.0, "false": 0.0}
    return np.array([words.get(v.lower(), v) if isinstance(v, str) else v for v in values], float)


def _columns(path: Path) -> dict[str, list[Any]]:
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError:
                raise RecordingError(
                    f"{path} needs pyarrow: pip install 'nfd-env[parquet]'"
                ) from None
            return parquet.read_table(path).to_pydict()
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file, strict=True))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        if not rows or not all(isinstance(r, dict) and r.keys() == rows[0].keys() for r in rows):
            raise RecordingError(f"{path} must have rows of the same columns")
        return {name: [row[name] for row in rows] for name in rows[0] if name is not None}
    except RecordingError:
        raise
    except Exception as error:  # of three libraries
        raise RecordingError(f"{path} cannot be read: {error}") from None
