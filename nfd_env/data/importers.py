"""Recordings made elsewhere as a data set: videos with files of actions, and Minari data sets.

A source whose ``env_id`` begins with ``videos:`` names a folder of .mp4 files, each with its file
of actions beside it: of the video's name, .csv with a header, .jsonl or .parquet, as VPT and
LeRobot have them. Row t was done while frame t was shown; there is a row for each frame but the
last, and one for the last too leads nowhere and is left out. One whose id begins with ``minari:``
names a Minari data set with pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env import config
from nfd_env.data.episode import IMPORTED, Episode
from nfd_env.data.layout import DatasetSpec, RecordingError
from nfd_env.data.shards import RecordedDataset, ShardWriter
from nfd_env.data.tables import (
    SUFFIXES,
    TableConfig,
    actions_of,
    read_columns,
    read_table,
    space_of,
)
from nfd_env.data.videos import VideoFrames, fitted, picture_size, presentation_times
from nfd_env.files import found_file, make_folder, owned_folder
from nfd_env.progress import progress_bar
from nfd_env.sources.spec import MINARI, VIDEOS, SourceConfig
from nfd_env.spaces import ActionCodec, space_from_dict, space_to_dict


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
        recordings: reads them, from the first one; not those whose names it is given.
        in_videos: whether frames are to stay where they are.
    """

    action_space: spaces.Space
    fps: float
    recordings: Callable[..., Iterator[_Recording]]
    in_videos: bool = False

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
    folder = Path(source.env_id.removeprefix(VIDEOS)).expanduser()
    settings = config.from_mapping(TableConfig, source.kwargs, "source.kwargs")
    if not settings.columns:
        raise config.ConfigError("source.kwargs.columns must name a column")
    if not folder.is_dir():
        raise RecordingError(f"{folder}: no such folder of videos")
    found = {}
    for video in sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4"):
        found_file(video, RecordingError)
        others = [video.with_suffix(suffix) for suffix in SUFFIXES]
        beside = [path for path in others if found_file(path, RecordingError)]
        if len(beside) != 1:
            raise RecordingError(
                f"{video} needs one file of actions beside it: {video.stem} with "
                f"{', '.join(SUFFIXES)}; there are {len(beside)}"
            )
        found[video] = beside[0]
    if not found:
        raise RecordingError(f"{folder} holds no .mp4 files")
    if not source.size and not source.crop:
        sizes = {picture_size(video): video for video in reversed(found)}
        if len(sizes) > 1:
            told = ", ".join(f"{v.name} has {h}x{w}" for (h, w), v in sorted(sizes.items()))
            raise RecordingError(
                f"the videos of {folder} have pictures of several sizes ({told}): set source.size, "
                "to which all are resized"
            )
    space = None
    if settings.action_space:
        try:
            space = space_from_dict(settings.action_space)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise config.ConfigError(f"source.kwargs.action_space cannot be: {error}") from None
    if settings.copy:
        return _open_all(found, source, settings, space)
    if space is None:
        raise config.ConfigError(
            "source.kwargs.action_space must be set where copy is false: nobody reads all files "
            "beforehand"
        )
    codec = ActionCodec(space)

    def recordings(known: Collection[str] = ()) -> Iterator[_Recording]:
        for video, path in found.items():
            if video.stem in known:
                continue
            times, _ = presentation_times(video)
            told = read_table(
                path, read_columns(path, settings), space, codec, settings, len(times)
            )
            frames = _frames_of(video, times, source)
            yield _Recording(video.stem, frames, *told)

    fps = source.fps or presentation_times(next(iter(found)))[1] or 30.0
    return Foreign(space, fps, recordings, in_videos=True)


def _open_all(
    found: Mapping[Path, Path],
    source: SourceConfig,
    settings: TableConfig,
    space: spaces.Space | None,
) -> Foreign:
    """Check all videos and read all files of actions, to copy the frames."""
    read, rates = {}, set()
    for video, path in found.items():
        times, rate = presentation_times(video)
        rates.add(rate)
        read[video] = path, read_columns(path, settings), len(times)
    if not source.fps and len(rates) > 1:
        folder = next(iter(found)).parent
        raise RecordingError(f"{folder} has videos of {sorted(rates)} frames a second: set fps")
    if space is None:
        space = space_of([actions_of(path, c, settings, n - 1) for path, c, n in read.values()])
    codec = ActionCodec(space)
    tables = {v: read_table(path, c, space, codec, settings, n) for v, (path, c, n) in read.items()}

    def recordings(known: Collection[str] = ()) -> Iterator[_Recording]:
        for video, told in tables.items():
            if video.stem not in known:
                yield _Recording(video.stem, _video_frames(video, source), *told)

    return Foreign(space, source.fps or rates.pop() or 30.0, recordings)


def _frames_of(video: Path, times: np.ndarray, source: SourceConfig) -> VideoFrames:
    """The frames of a video, where they are; the first one is looked at."""

    def some(first: int, stop: int) -> np.ndarray:
        return times[first:stop]

    one = VideoFrames(video, some, (1, 1, 1, 3), source.crop, source.size)[0]
    return VideoFrames(video, some, (len(times), *one.shape), source.crop, source.size)


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

    def recordings(known: Collection[str] = ()) -> Iterator[_Recording]:
        for episode in dataset.iterate_episodes():
            name, frames = f"episode {episode.id}", episode.observations
            if name in known:
                continue
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
            pictures = (fitted(frame, name, source.crop, source.size) for frame in frames)
            rewards = np.asarray(episode.rewards)
            yield _Recording(name, pictures, actions, rewards, bool(episode.terminations[-1]))

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
                there[episode.policy] = there.get(episode.policy, 0) + len(episode)
                number = max(number, (episode.number or 0) + 1)
        # All were written one after the other: only of the last one a part may be missing.
        known = [label.removeprefix(IMPORTED) for label in list(there)[:-1]]
        try:
            for recording in progress_bar(
                found.recordings(known), "importing", progress, unit="recording"
            ):
                label = f"{IMPORTED}{recording.name}"
                lying = recording.frames if isinstance(recording.frames, VideoFrames) else None
                frames = iter(()) if lying is not None else iter(recording.frames)
                last = lying[0] if lying is not None else _next(frames, recording)
                if writer is None:
                    spec = DatasetSpec(
                        (last.shape[0], last.shape[1], 3),
                        codec.shape,
                        str(np.dtype(space.dtype or np.int64)),
                        space_to_dict(space),
                        config.to_dict(source),
                        found.fps,
                        in_videos=found.in_videos,
                    )
                    spec.save(folder)
                    writer = ShardWriter(folder, spec, "import")
                total = len(recording.actions)
                have = min(total, there.get(label, 0))  # in segments of whatever length
                if lying is None:
                    for _ in range(have):
                        last = _next(frames, recording)
                for first in range(have, total, longest):
                    stop = min(total, first + longest)
                    if lying is not None:
                        shown = lying.part(first, stop + 1)
                    else:
                        read = [last, *(_next(frames, recording) for _ in range(first, stop))]
                        last, shown = read[-1], read
                    ended = np.arange(first, stop) == stop - 1
                    terminated = ended & (stop == total) & recording.terminated
                    try:
                        episode = Episode(
                            np.stack(shown) if isinstance(shown, list) else shown,
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

    with av.open(str(video.absolute())) as container:
        for frame in container.decode(video=0):
            picture = frame.to_ndarray(format="rgb24")
            yield fitted(picture, str(video), source.crop, source.size)
