"""Lossless recordings on disk: append-only shards, read back where they lie.

A data set is a folder::

    dataset.yaml              frame and action shapes, action space, source environment
    shard-w00-00000/
        frames.bin            uint8, all frames one after the other; or pts.bin, see data/videos.py
        actions.bin           one entry a transition (not a frame)
        rewards.bin           float32
        ends.bin              uint8: 1 terminated, 2 truncated (bits)
        signals.bin           float32, where the data set has signals
        episodes.jsonl        one line an episode, written last: the commit record
    skipped-w00.jsonl         one line an episode that could not be recorded

An episode exists from the moment its line stands in ``episodes.jsonl``. Whatever an interrupted
writer left beyond the last committed episode is cut off when the shard is opened for writing again,
so a crash costs the running episode at most. A writer owns its shards: no other process can write
between an episode and its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env.data.episode import SPLITS, Episode
from nfd_env.data.episodes import (
    TERMINATED,
    TRUNCATED,
    EpisodeReference,
    Episodes,
    one_after_another,
    read_columns,
)
from nfd_env.data.layout import (
    WRITER,
    DatasetSpec,
    RecordingError,
    append_line,
    check_size,
    read_lines,
    read_records,
    rewrite_lines,
    shard_folders,
    writer_of,
)
from nfd_env.data.lazy_frames import Frames
from nfd_env.data.reading import folders_of
from nfd_env.data.videos import VideoFrames
from nfd_env.data.windows import shown_lengths
from nfd_env.files import Ownership, writing

__all__ = ["DatasetSpec", "EpisodeReference", "RecordedDataset", "RecordingError", "ShardWriter"]


class ShardWriter:
    """Appends episodes to the shards of one writer, which it owns until it is closed."""

    def __init__(
        self,
        folder: str | Path,
        spec: DatasetSpec,
        writer: str,
        frames_per_shard: int = 20_000,
        wait: float = 0.0,
    ) -> None:
        """Open the newest shard of ``writer`` and drop what was not committed.

        Args:
            folder: the data set.
            spec: what it holds.
            writer: name of the writer: letters, digits, underscores.
            frames_per_shard: a shard with at least so many frames is full.
            wait: seconds to wait for a writer of this name that is about to end.

        Raises:
            FolderInUseError: when there is another writer of this name.
            FolderError: when the folder cannot be written to.
            RecordingError: when the shard is damaged.
        """
        if not re.fullmatch(WRITER, writer):
            raise ValueError(f"a writer is named by letters, digits and _, got {writer!r}")
        self.folder, self.spec, self.writer = Path(folder).expanduser(), spec, writer
        self.frames_per_shard = frames_per_shard
        self._ownership = Ownership(self.folder, writer, wait)
        try:
            mine = [shard for shard in shard_folders(self.folder) if writer_of(shard) == writer]
            self._number = int(mine[-1].name.rsplit("-", 1)[1]) if mine else 0
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardWriter:
        """Close the writer when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """See ``close``."""
        self.close()

    def close(self) -> None:
        """Let others write; adding is an error from now on."""
        self._ownership.release()
        self._is_open = False

    def _open(self) -> None:
        self._is_open = False
        self.shard = self.folder / f"shard-{self.writer}-{self._number:05d}"
        with writing(self.shard):
            self.shard.mkdir(parents=True, exist_ok=True)
            records = read_records(self.shard, repair=True)
            self._frames = sum(r["length"] + 1 for r in records)
            self._transitions = sum(r["length"] for r in records)
            for name, size in self._item_sizes().items():
                path = self.shard / name
                count = self._frames if name == self.spec.frames_file[0] else self._transitions
                path.touch()
                check_size(path, count * size)
                os.truncate(path, count * size)
        self._is_open = True

    def _item_sizes(self) -> dict[str, int]:
        action = int(np.prod(self.spec.action_shape, dtype=int))
        return {
            **dict([self.spec.frames_file]),
            "actions.bin": action * np.dtype(self.spec.action_dtype).itemsize,
            "rewards.bin": 4,
            "ends.bin": 1,
            **({"signals.bin": 4 * self.spec.signals} if self.spec.signals else {}),
        }

    def add(self, episode: Episode, number: int | None = None) -> None:
        """Append ``episode`` and commit it; if that fails, nothing of it stays.

        Args:
            episode: what to append.
            number: which episode of its writer it is, where skipped ones count too.

        Raises:
            RecordingError: when its frames or actions do not have the data set's shape.
            FolderError: when the disk is full, for instance.
        """
        arrays = self._arrays(episode)
        if self._frames >= self.frames_per_shard:
            self._number += 1
            self._open()
        record = {
            "length": len(episode),
            "return": float(np.sum(episode.rewards)),
            "seed": episode.seed,
            "policy": episode.policy,
            "split": episode.split,
            **({} if number is None else {"number": number}),
        }
        if isinstance(episode.frames, VideoFrames):
            record["video"] = str(episode.frames.video.absolute())
        self._commit(arrays, lambda: append_line(self.shard / "episodes.jsonl", record))

    def extend(self, more: Episode) -> None:
        """Lengthen the episode that was added last, and commit that; if it fails, see ``add``.

        What somebody plays is recorded in this way. An episode that is under way has no end yet: it
        reads as truncated wherever its recording stops.

        Args:
            more: begins with the last frame of that episode; the policy is that of the whole.
        """
        arrays = self._arrays(more)
        name = self.spec.frames_file[0]
        arrays[name] = arrays[name][1:]
        records = read_records(self.shard)
        if not records:
            raise RecordingError(f"{self.shard} has no episode that could be lengthened")
        records[-1]["length"] += len(more)
        records[-1]["return"] += float(np.sum(more.rewards))
        records[-1]["policy"] = more.policy
        self._commit(arrays, lambda: rewrite_lines(self.shard / "episodes.jsonl", records))

    def _arrays(self, episode: Episode) -> dict[str, np.ndarray]:
        """What is appended to each file, once it fits and the shard can be written."""
        if not self._ownership.held:
            raise RecordingError(f"the writer {self.writer} of {self.folder} is closed")
        if not self._is_open:  # after an error that left the shard unclear
            self._open()
        assert episode.signals is not None
        for name, array, shape in (
            ("frames", episode.frames, self.spec.frame_shape),
            ("actions", episode.actions, self.spec.action_shape),
            ("signals", episode.signals, (self.spec.signals,)),
        ):
            if array.shape[1:] != tuple(shape):
                raise RecordingError(f"{name} are {array.shape[1:]}, the data set has {shape}")
        ends = episode.terminated * TERMINATED + episode.truncated * TRUNCATED
        actions = episode.actions.astype(self.spec.action_dtype)
        if not np.can_cast(episode.actions.dtype, self.spec.action_dtype, "same_kind"):
            raise RecordingError(
                f"actions are {episode.actions.dtype}, the data set has {self.spec.action_dtype}"
            )
        try:
            self.spec.codec.check_values(actions, len(episode))
        except ValueError as error:
            raise RecordingError(str(error)) from None
        if isinstance(episode.frames, VideoFrames) != self.spec.in_videos:
            raise RecordingError("frames lie in videos in all of a data set, or nowhere in it")
        frames = episode.frames
        arrays = {
            self.spec.frames_file[0]: (
                frames.times() if isinstance(frames, VideoFrames) else np.asarray(frames)
            ),
            "actions.bin": actions,
            "rewards.bin": episode.rewards.astype(np.float32),
            "ends.bin": ends.astype(np.uint8),
        }
        if self.spec.signals:
            arrays["signals.bin"] = episode.signals.astype(np.float32)
        return arrays

    def _commit(self, arrays: dict[str, np.ndarray], write_record: Callable[[], None]) -> None:
        self._is_open = False
        try:
            with writing(self.shard):
                for name, array in arrays.items():
                    with open(self.shard / name, "ab") as file:
                        file.write(np.ascontiguousarray(array).tobytes())
                        file.flush()
                        os.fsync(file.fileno())
                write_record()
        except BaseException:
            self._open()
            raise
        self._frames += len(arrays[self.spec.frames_file[0]])
        self._transitions += len(arrays["rewards.bin"])
        self._is_open = True

    def skip(self, number: int, seed: int, policy: str, error: str) -> None:
        """Note that this episode could not be recorded, so that nobody tries again."""
        record = {"number": number, "seed": seed, "policy": policy, "error": error}
        self._note(f"skipped-{self.writer}.jsonl", record)

    def killed(self, number: int) -> int:
        """Note that the writer was killed in this episode; returns how many times it has been."""
        name = f"killed-{self.writer}.jsonl"
        before = read_lines(self.folder / name, {"number": int}, repair=True)
        self._note(name, {"number": number})
        return 1 + sum(record["number"] == number for record in before)

    def _note(self, name: str, record: dict[str, Any]) -> None:
        with writing(self.folder):
            append_line(self.folder / name, record)


class RecordedDataset:
    """All committed episodes of a data set, in one folder or several."""

    def __init__(self, recordings: str | os.PathLike[str]) -> None:
        """Read the commit records (not the frames).

        Args:
            recordings: the folder; or several, or addresses in object stores, separated by commas.

        Raises:
            RecordingError: when one is no data set or of another game, or a record is damaged.
        """
        folders = folders_of(recordings)
        self.folder = folders[0]
        self.spec = DatasetSpec.load(self.folder)
        for other in folders[1:]:
            DatasetSpec.load(other).check_same(self.spec, other)
        self._folders = folders
        shards = [(n, shard) for n, f in enumerate(folders) for shard in shard_folders(f)]
        self.episodes = Episodes(read_columns(shards), self.spec)

    def check(self, window: int = 1, splits: Sequence[str] = SPLITS) -> None:
        """Refuse what cannot be trained on, before anything begins.

        Args:
            window: consecutive frames that at least one episode of each split must show.
            splits: that are needed.

        Raises:
            RecordingError: when episodes are missing or all too short, or a file was cut off.
        """
        for split in splits:
            episodes = self.split(split)
            if not episodes:
                raise RecordingError(
                    f"{self.folder} has no {split} episode, and {len(self)} in all: record more, "
                    "some for training and some held out for validation (validation_every says how "
                    "many)"
                )
            longest = int(shown_lengths(episodes).max()) + 1
            if longest < window:
                raise RecordingError(
                    f"no {split} episode of {self.folder} has {window} frames, the longest has "
                    f"{longest}: record longer episodes, or lower the frames of a training window"
                )
        for episodes in self.episodes.by_shard().values():  # opening them checks their sizes
            last = episodes[-1]
            _ = last.frames, last.actions, last.rewards, last.terminated, last.signals

    def shard_frames(self) -> dict[str, Frames]:
        """All committed frames of each shard by its name, uint8 (frames, H, W, 3)."""
        return {name: one_after_another(each) for name, each in self.episodes.by_shard().items()}

    def skipped(self) -> list[dict[str, Any]]:
        """Number, seed, policy and error of episodes that could not be recorded, with writer."""
        found = []
        for path in [p for f in self._folders for p in sorted(f.glob("skipped-*.jsonl"))]:
            writer = path.stem.removeprefix("skipped-")
            for record in read_lines(path, {"number": int, "seed": int, "policy": str}):
                found.append({"writer": writer, **record})
        return found

    def split(self, name: str) -> Episodes:
        """Episodes of the split "train" or "validation"."""
        return self.episodes.of_split(name)

    @property
    def frame_count(self) -> int:
        """Frames in all committed episodes."""
        return int(self.episodes.lengths.sum()) + len(self)

    def __iter__(self) -> Iterator[EpisodeReference]:
        """Iterate over the episodes."""
        return iter(self.episodes)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)
