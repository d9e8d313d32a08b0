"""Lossless recordings on disk: append-only shards, read back through memory maps.

A data set is a folder::

    dataset.yaml              frame and action shapes, action space, source environment
    shard-w00-00000/
        frames.bin            uint8, all frames one after the other
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env.data.episode import SPLITS, Episode
from nfd_env.data.layout import (
    WRITER,
    DatasetSpec,
    RecordingError,
    append_line,
    check_size,
    mapped,
    read_lines,
    read_records,
    rewrite_lines,
    shard_folders,
    writer_of,
)
from nfd_env.data.windows import Places, shown_transitions
from nfd_env.files import FolderError, Ownership

__all__ = ["DatasetSpec", "EpisodeReference", "RecordedDataset", "RecordingError", "ShardWriter"]

_TERMINATED, _TRUNCATED = 1, 2


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
        try:
            self.shard.mkdir(parents=True, exist_ok=True)
            records = read_records(self.shard, repair=True)
            self._frames = sum(r["length"] + 1 for r in records)
            self._transitions = sum(r["length"] for r in records)
            for name, size in self._item_sizes().items():
                path = self.shard / name
                count = self._frames if name == "frames.bin" else self._transitions
                path.touch()
                check_size(path, count * size)
                os.truncate(path, count * size)
        except OSError as error:
            raise FolderError(f"{self.shard} cannot be written to: {error.strerror}") from None
        self._is_open = True

    def _item_sizes(self) -> dict[str, int]:
        action = int(np.prod(self.spec.action_shape, dtype=int))
        return {
            "frames.bin": int(np.prod(self.spec.frame_shape)),
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
        self._commit(arrays, lambda: append_line(self.shard / "episodes.jsonl", record))

    def extend(self, more: Episode) -> None:
        """Lengthen the episode that was added last, and commit that; if it fails, see ``add``.

        What somebody plays is recorded in this way. An episode that is under way has no end yet: it
        reads as truncated wherever its recording stops.

        Args:
            more: begins with the last frame of that episode; the policy is that of the whole.
        """
        arrays = self._arrays(more)
        arrays["frames.bin"] = arrays["frames.bin"][1:]
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
        ends = episode.terminated * _TERMINATED + episode.truncated * _TRUNCATED
        actions = episode.actions.astype(self.spec.action_dtype)
        if not np.can_cast(episode.actions.dtype, self.spec.action_dtype, "same_kind"):
            raise RecordingError(
                f"actions are {episode.actions.dtype}, the data set has {self.spec.action_dtype}"
            )
        try:
            self.spec.codec.check(actions, len(episode))
        except ValueError as error:
            raise RecordingError(str(error)) from None
        arrays = {
            "frames.bin": episode.frames,
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
            for name, array in arrays.items():
                with open(self.shard / name, "ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            write_record()
        except OSError as error:
            self._open()
            raise FolderError(
                f"{self.shard} cannot be written to: {error.strerror or error}; what was recorded "
                "before is whole, and the same command goes on from there"
            ) from None
        except BaseException:
            self._open()
            raise
        self._frames += len(arrays["frames.bin"])
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
        try:
            append_line(self.folder / name, record)
        except OSError as error:
            raise FolderError(f"{self.folder} cannot be written to: {error.strerror}") from None


@dataclass(frozen=True)
class EpisodeReference:
    """Where a committed episode lies; its arrays are read on demand."""

    shard: Path
    spec: DatasetSpec
    frame_offset: int
    transition_offset: int
    length: int
    seed: int
    policy: str
    split: str
    total_reward: float
    number: int | None = None

    def __len__(self) -> int:
        """Number of transitions T."""
        return self.length

    @property
    def key(self) -> str:
        """Name of the episode, unique in its data set."""
        return f"{self.shard.name}/{self.transition_offset}"

    def _transitions(self, name: str, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        path = self.shard / name
        return np.array(mapped(path, dtype, shape, self.transition_offset, self.length))

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 (T+1, H, W, 3), memory-mapped and read-only."""
        path, shape = self.shard / "frames.bin", tuple(self.spec.frame_shape)
        return mapped(path, "uint8", shape, self.frame_offset, self.length + 1)

    @cached_property
    def actions(self) -> np.ndarray:
        """(T, ...) in the stored dtype; ``actions[t]`` leads from frame t to frame t+1.

        Raises:
            RecordingError: when the file is damaged: an action lies outside the space.
        """
        spec = self.spec
        actions = self._transitions("actions.bin", spec.action_dtype, tuple(spec.action_shape))
        try:
            spec.codec.check(actions, self.length)
        except ValueError as error:
            raise self._damaged("actions.bin", str(error)) from None
        return actions

    @cached_property
    def rewards(self) -> np.ndarray:
        """float32 (T,)."""
        return self._transitions("rewards.bin", "float32")

    @cached_property
    def signals(self) -> np.ndarray:
        """float32 (T, k)."""
        count = self.spec.signals
        if not count:
            return np.zeros((self.length, 0), np.float32)
        return self._transitions("signals.bin", "float32", (count,))

    @cached_property
    def _ends(self) -> np.ndarray:
        ends = self._transitions("ends.bin", "uint8")
        if (ends[:-1] & _TERMINATED).any() or (ends > (_TERMINATED | _TRUNCATED)).any():
            raise self._damaged("ends.bin", "an episode terminates at its last transition only")
        return ends

    def _damaged(self, name: str, reason: str) -> RecordingError:
        return RecordingError(
            f"{self.shard / name} is damaged in the episode of seed {self.seed}: {reason}"
        )

    @property
    def terminated(self) -> np.ndarray:
        """Boolean (T,)."""
        return (self._ends & _TERMINATED) > 0

    @property
    def truncated(self) -> np.ndarray:
        """Boolean (T,); an episode that neither terminated nor was cut off ends all the same."""
        truncated = (self._ends & _TRUNCATED) > 0
        truncated[-1] |= not self.terminated[-1]
        return truncated

    def load(self) -> Episode:
        """Read the whole episode into memory."""
        return Episode(
            np.array(self.frames),
            self.actions,
            self.rewards,
            self.terminated,
            self.truncated,
            self.seed,
            self.policy,
            self.split,
            self.signals,
        )


class RecordedDataset:
    """All committed episodes of a data-set folder."""

    def __init__(self, folder: str | Path) -> None:
        """Read the commit records (not the frames).

        Raises:
            RecordingError: when the folder is no data set or a record is damaged.
        """
        self.folder = Path(folder).expanduser()
        self.spec = DatasetSpec.load(self.folder)
        self.episodes: list[EpisodeReference] = []
        for shard in shard_folders(self.folder):
            frame = transition = 0
            for record in read_records(shard):
                told = [record[k] for k in ("length", "seed", "policy", "split", "return")]
                told.append(record.get("number"))
                self.episodes.append(EpisodeReference(shard, self.spec, frame, transition, *told))
                frame += record["length"] + 1
                transition += record["length"]

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
            shown = [shown_transitions(e)[0] + 1 for e in episodes]
            if not len(Places(shown, window)):
                raise RecordingError(
                    f"no {split} episode of {self.folder} has {window} frames, the longest has "
                    f"{max(shown)}: record longer episodes, or lower the frames of a training "
                    "window"
                )
        for last in {e.shard: e for e in self}.values():  # opening them checks their sizes
            _ = last.frames, last.actions, last.rewards, last.terminated, last.signals

    def shard_frames(self) -> dict[Path, np.ndarray]:
        """All committed frames of each shard, uint8 (frames, H, W, 3), memory-mapped."""
        counts = {e.shard: e.frame_offset + e.length + 1 for e in self}
        shape = tuple(self.spec.frame_shape)
        return {
            shard: mapped(shard / "frames.bin", "uint8", shape, 0, count)
            for shard, count in counts.items()
        }

    def skipped(self) -> list[dict[str, Any]]:
        """Number, seed, policy and error of episodes that could not be recorded, with writer."""
        found = []
        for path in sorted(self.folder.glob("skipped-*.jsonl")):
            writer = path.stem.removeprefix("skipped-")
            for record in read_lines(path, {"number": int, "seed": int, "policy": str}):
                found.append({"writer": writer, **record})
        return found

    def split(self, name: str) -> list[EpisodeReference]:
        """Episodes of the split "train" or "validation"."""
        return [e for e in self.episodes if e.split == name]

    @property
    def frame_count(self) -> int:
        """Frames in all committed episodes."""
        return sum(e.length + 1 for e in self.episodes)

    def __iter__(self) -> Iterator[EpisodeReference]:
        """Iterate over the episodes."""
        return iter(self.episodes)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)
