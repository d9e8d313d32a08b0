"""Recordings made elsewhere as a data set: videos with files of actions, and Minari data sets.

A source whose ``env_id`` begins with ``videos:`` names a folder of .mp4 files, each with its file
of actions beside it: of the video's name, .csv with a header, .jsonl or .parquet, as VPT and
LeRobot have them. Row t was done while frame t was shown; there is a row for each frame but the
last, and one for the last too leads nowhere and is left out. One whose id begins with ``minari:``
names a Minari data set with pixels.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from nfd_env.sources.spec import MINARI, VIDEOS, SourceConfig, area_resize
from nfd_env.spaces import ActionCodec, space_from_dict, space_to_dict

_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TableConfig:
    """``source.kwargs`` of videos: how their files of actions are read.

    Attributes:
        action_space: as plain values, e.g. {type: Discrete, n: 5}; empty to tell it by the
            actions: whole numbers that are Discrete or MultiDiscrete, or others from -1 to 1.
        columns: one for Discrete actions, or one that holds lists, else one for each number of an
            action. Columns "reward", "terminated" and "truncated" are read where they are there.
    """

    action_space: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=lambda: ["action"])


@dataclass(frozen=True)
class _Recording:
    """Frames that are yet to be read, and what happened between them."""

    name: str
    frames: Iterable[np.ndarray]  # T + 1, each uint8 (H, W, 3)
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


@dataclass(frozen=True)
class Foreign:
    """Recordings made elsewhere, checked and ready to be read.

    Attributes:
        action_space: of one transition.
        fps: frames a second.
        recordings: reads them, from the first one.
    """

    action_space: spaces.Space
    fps: float
    recordings: Callable[[], Iterator[_Recording]]

    def frame(self) -> np.ndarray:
        """The first frame, cropped and resized, uint8 (H, W, 3)."""
        first = next(self.recordings(), None)
        if first is None:
            raise RecordingError("there are no episodes to import")
        return _next(iter(first.frames), first)


def open_foreign(source: SourceConfig) -> Foreign:
    """Look at recordings made elsewhere; nothing is written.

    Args:
        source: ``env_id``, ``kwargs``, ``key`` (the entry of a Minari Dict observation that holds
            the frame), ``crop``, ``size`` and ``fps`` (0: what a video says of itself, else 30)
            are used.

    Raises:
        RecordingError: when frames and actions do not belong together; names the file.
        ConfigError: when ``source.kwargs`` has settings that there are not.
    """
    if source.env_id.startswith(VIDEOS):
        return _open_videos(source)
    if source.kwargs:
        raise config.ConfigError(f"source.kwargs: {MINARI} knows none, got {list(source.kwargs)}")
    return _open_minari(source)


def import_recordings(
    source: SourceConfig,
    folder: str | Path,
    longest: int = 2000,
    validation_every: int = 20,
    progress: bool = True,
) -> RecordedDataset:
    """Write recordings made elsewhere as a data set; run again to go on, or when there are more.

    Args:
        source: see ``open_foreign``.
        folder: of the data set.
        longest: transitions after which a long recording is cut, to bound memory.
        validation_every: every n-th episode is held out.
        progress: show a bar.

    Raises:
        RecordingError: see ``open_foreign``; all videos are checked before anything is written.
    """
    if longest < 1 or validation_every < 2:
        raise config.ConfigError(
            "max_episode_steps must be at least 1 and validation_every at least 2, got "
            f"{longest} and {validation_every}"
        )
    found = open_foreign(source)
    prefix, _, name = source.env_id.partition(":")
    # Where they lay is nobody's business who gets the world.
    told = replace(source, env_id=f"{prefix}:{Path(name).name if prefix == 'videos' else name}")
    return _write(found, told, make_folder(folder), longest, validation_every, progress)


def _open_videos(source: SourceConfig) -> Foreign:
    import av

    folder = Path(source.env_id.removeprefix(VIDEOS)).expanduser()
    settings = config.from_mapping(TableConfig, source.kwargs, "source.kwargs")
    if not settings.columns:
        raise config.ConfigError("source.kwargs.columns must name a column")
    found = sorted(folder.glob("*.mp4"))
    if not found:
        raise RecordingError(f"{folder} holds no .mp4 files")
    read, rates = {}, set()
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
        read[video] = beside[0], _columns(beside[0]), count
    if not source.fps and len(rates) > 1:
        raise RecordingError(f"{folder} has videos of {sorted(rates)} frames a second: set fps")
    if settings.action_space:
        try:
            space = space_from_dict(settings.action_space)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise config.ConfigError(f"source.kwargs.action_space cannot be: {error}") from None
    else:
        space = _space_of([_actions(path, c, settings, n - 1) for path, c, n in read.values()])
    codec = ActionCodec(space)
    tables = {v: _table(path, c, space, codec, settings, n) for v, (path, c, n) in read.items()}

    def recordings() -> Iterator[_Recording]:
        for video, (actions, rewards, terminated) in tables.items():
            yield _Recording(video.stem, _video_frames(video, source), actions, rewards, terminated)

    return Foreign(space, source.fps or rates.pop() or 30.0, recordings)


def _open_minari(source: SourceConfig) -> Foreign:
    try:
        import minari
    except ImportError:
        raise RecordingError(
            "Minari data sets need minari: pip install 'nfd-env[minari]'"
        ) from None
    name = source.env_id.removeprefix(MINARI)
    try:
        dataset = minari.load_dataset(name)
    except (FileNotFoundError, ValueError) as error:
        raise RecordingError(
            f"there is no Minari data set {name!r} here ({error}): minari download {name}"
        ) from None
    return foreign_minari(dataset, source)


def foreign_minari(dataset: Any, source: SourceConfig) -> Foreign:
    """A ``minari.MinariDataset`` whose observations are uint8 RGB frames; see ``open_foreign``."""

    def recordings() -> Iterator[_Recording]:
        for episode in dataset.iterate_episodes():
            name, frames = f"episode {episode.id}", episode.observations
            if source.key:
                if not isinstance(frames, dict) or source.key not in frames:
                    raise RecordingError(f"{name}: observations have no entry {source.key!r}")
                frames = frames[source.key]
            if not isinstance(frames, np.ndarray):
                raise RecordingError(f"{name}: observations are no frames: set source.key")
            actions = np.asarray(episode.actions)
            if len(frames) != len(actions) + 1:
                raise RecordingError(
                    f"{name}: {len(frames)} frames do not fit {len(actions)} actions"
                )
            fitted = (_fitted(frame, name, source) for frame in frames)
            rewards = np.asarray(episode.rewards)
            yield _Recording(name, fitted, actions, rewards, bool(episode.terminations[-1]))

    return Foreign(dataset.action_space, source.fps or 30.0, recordings)


def _write(
    found: Foreign,
    source: SourceConfig,
    folder: Path,
    longest: int,
    validation_every: int,
    progress: bool,
) -> RecordedDataset:
    space, codec = found.action_space, ActionCodec(found.action_space)
    with owned_folder(folder):
        writer: ShardWriter | None = None
        there: dict[str, int] = {}
        number = 0
        if (folder / "dataset.yaml").exists():
            for episode in RecordedDataset(folder):
                there[episode.policy] = there.get(episode.policy, 0) + 1
                number = max(number, (episode.number or 0) + 1)
        try:
            for recording in progress_bar(
                found.recordings(), "importing", progress, unit="recording"
            ):
                label, frames = f"import:{recording.name}", iter(recording.frames)
                last = _next(frames, recording)
                if writer is None:
                    spec = DatasetSpec(
                        (last.shape[0], last.shape[1], 3),
                        codec.shape,
                        str(np.dtype(space.dtype or np.int64)),
                        space_to_dict(space),
                        config.to_dict(source),
                        found.fps,
                    )
                    spec.save(folder)
                    writer = ShardWriter(folder, spec, "import")
                total = len(recording.actions)
                for segment, first in enumerate(range(0, total, longest)):
                    stop = min(total, first + longest)
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
                            split=("train" if number % validation_every else "validation"),
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


def _video_frames(video: Path, source: SourceConfig) -> Iterator[np.ndarray]:
    import av

    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield _fitted(frame.to_ndarray(format="rgb24"), str(video), source)


def _fitted(frame: np.ndarray, name: str, source: SourceConfig) -> np.ndarray:
    """The cropped and resized frame."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise RecordingError(
            f"{name}: frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}"
        )
    if source.crop:
        top, bottom, left, right = source.crop
        if not (0 <= top < bottom <= frame.shape[0] and 0 <= left < right <= frame.shape[1]):
            raise RecordingError(f"{name}: crop {source.crop} leaves the {frame.shape[:2]} frame")
        frame = frame[top:bottom, left:right]
    if source.size:
        frame = area_resize()(frame, (source.size[0], source.size[1]))
    return np.array(frame, order="C")


def _actions(
    path: Path, columns: dict[str, list[Any]], settings: TableConfig, count: int
) -> np.ndarray:
    """Numbers (count,) or (count, n), as they stand in a table.

    Raises:
        RecordingError: when the table has no such columns, or not one row for each transition.
    """
    missing = [c for c in settings.columns if c not in columns]
    if missing:
        raise RecordingError(f"{path} has no column {missing[0]!r}, but {', '.join(columns)}")
    rows = len(columns[settings.columns[0]])
    if rows not in (count, count + 1):
        raise RecordingError(
            f"{path} has {rows} actions, but its video has {count + 1} frames: there must be "
            f"{count}, one between any two frames"
        )
    try:
        parts = [_numbers(columns[c][:count]) for c in settings.columns]
        return parts[0] if len(parts) == 1 else np.stack(parts, 1)
    except (TypeError, ValueError) as error:
        raise RecordingError(f"{path}: {error}") from None


def _table(
    path: Path,
    columns: dict[str, list[Any]],
    space: spaces.Space,
    codec: ActionCodec,
    settings: TableConfig,
    frames: int,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Actions (T, ...), rewards (T,), and whether the last transition terminated."""
    count = frames - 1
    actions = _actions(path, columns, settings, count)
    try:
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


def _space_of(tables: Sequence[np.ndarray]) -> spaces.Space:
    """The space that actions (T,) or (T, n) of several tables seem to be from.

    Raises:
        RecordingError: when that cannot be told.
    """
    shapes = {table.shape[1:] for table in tables}
    actions = np.concatenate([t.reshape(len(t), -1) for t in tables]) if len(shapes) == 1 else None
    if actions is None or not actions.size or not np.isfinite(actions).all():
        raise RecordingError(
            "the files of actions do not tell the action space: set source.kwargs.action_space, "
            "e.g. {type: Discrete, n: 5}"
        )
    if np.array_equal(actions, np.rint(actions)) and actions.min() >= 0:
        counts = actions.max(0).astype(int) + 1
        return (
            spaces.Discrete(max(2, counts[0]))
            if not shapes.pop()
            else spaces.MultiDiscrete(np.maximum(2, counts))
        )
    if np.abs(actions).max() > 1:
        raise RecordingError(
            f"actions go from {actions.min():g} to {actions.max():g}, and nobody says how far they "
            "could: set source.kwargs.action_space, e.g. {type: Box, low: [-2.0], high: [2.0], "
            "dtype: float32}"
        )
    shape = shapes.pop() or (1,)
    return spaces.Box(-1.0, 1.0, shape, np.float32)


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
