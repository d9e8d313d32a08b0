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

An episode exists from the moment its line stands in ``episodes.jsonl``. Whatever an interrupted
writer left beyond the last committed episode is cut off when the shard is opened for writing again,
so a crash costs the running episode at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nfd_env.data.episode import Episode
from nfd_env.models.weights import fingerprint_values
from nfd_env.sources.source import PRESENTATION

_TERMINATED, _TRUNCATED = 1, 2


class RecordingError(ValueError):
    """A data set on disk (or an episode to be added to it) cannot be used."""


@dataclass(frozen=True)
class DatasetSpec:
    """What every shard of a data set shares.

    Attributes:
        frame_shape: (H, W, 3).
        action_shape: shape of one action, () for Discrete.
        action_dtype: numpy name of the stored dtype.
        action_space: the space as plain values, see ``nfd_env.spaces``.
        source: the source section of the collect config, as plain values.
        fps: frames a second of the recorded environment.
        signals: numbers that were recorded beside the frames after each transition.
    """

    frame_shape: tuple[int, int, int]
    action_shape: tuple[int, ...]
    action_dtype: str
    action_space: dict[str, Any]
    source: dict[str, Any]
    fps: float
    signals: int = 0

    @property
    def fingerprint(self) -> str:
        """The identity of what networks are trained on: the form of frames, and the actions."""
        return fingerprint_values(
            {"frame_shape": list(self.frame_shape), "action_space": self.action_space}
        )

    def save(self, folder: Path) -> None:
        """Write ``dataset.yaml``, or check that the one there says the same.

        Raises:
            RecordingError: when the folder holds recordings of something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "dataset.yaml"
        values = {
            "frame_shape": list(self.frame_shape),
            "action_shape": list(self.action_shape),
            "action_dtype": self.action_dtype,
            "action_space": self.action_space,
            "source": self.source,
            "fps": self.fps,
            **({"signals": self.signals} if self.signals else {}),
        }
        if path.exists():
            there = yaml.safe_load(path.read_text())
            different = [k for k in values | there if _content(there, k) != _content(values, k)]
            if different:
                raise RecordingError(
                    f"{folder} holds recordings with another {', '.join(different)}; "
                    "collect into an empty folder"
                )
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(values, sort_keys=False))
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: Path) -> DatasetSpec:
        """Read ``dataset.yaml``."""
        path = folder / "dataset.yaml"
        if not path.is_file():
            raise RecordingError(f"{folder} is not a data set: it has no dataset.yaml")
        values = yaml.safe_load(path.read_text())
        return cls(
            frame_shape=tuple(values["frame_shape"]),
            action_shape=tuple(values["action_shape"]),
            action_dtype=values["action_dtype"],
            action_space=values["action_space"],
            source=values["source"],
            fps=values["fps"],
            signals=values.get("signals", 0),
        )


def _content(values: dict[str, Any], key: str) -> Any:
    """What a data set says under ``key``, without what is presentation only."""
    value = values.get(key)
    if key == "source" and isinstance(value, dict):
        # What is not said is the default, as in data sets that are older than a setting.
        return {k: v for k, v in value.items() if k not in PRESENTATION and v not in ([], {}, "")}
    return None if key == "fps" else value


class ShardWriter:
    """Appends episodes to one writer's shards; use one writer (name) a process."""

    def __init__(
        self, folder: str | Path, spec: DatasetSpec, writer: str, frames_per_shard: int = 20_000
    ) -> None:
        """Open the newest shard of ``writer`` and drop what was not committed."""
        self.folder, self.spec, self.writer = Path(folder), spec, writer
        self.frames_per_shard = frames_per_shard
        existing = sorted(self.folder.glob(f"shard-{writer}-*"))
        self._number = int(existing[-1].name.rsplit("-", 1)[1]) if existing else 0
        self._open()

    def _open(self) -> None:
        self.shard = self.folder / f"shard-{self.writer}-{self._number:05d}"
        self.shard.mkdir(parents=True, exist_ok=True)
        records = _read_records(self.shard, repair=True)
        self._frames = sum(r["length"] + 1 for r in records)
        self._transitions = sum(r["length"] for r in records)
        sizes = self._item_sizes()
        for name, size in sizes.items():
            path = self.shard / name
            count = self._frames if name == "frames.bin" else self._transitions
            path.touch()
            if path.stat().st_size < count * size:
                raise RecordingError(f"{path} is shorter than its committed episodes")
            os.truncate(path, count * size)

    def _item_sizes(self) -> dict[str, int]:
        action = int(np.prod(self.spec.action_shape, dtype=int))
        return {
            "frames.bin": int(np.prod(self.spec.frame_shape)),
            "actions.bin": action * np.dtype(self.spec.action_dtype).itemsize,
            "rewards.bin": 4,
            "ends.bin": 1,
            **({"signals.bin": 4 * self.spec.signals} if self.spec.signals else {}),
        }

    def add(self, episode: Episode) -> None:
        """Append ``episode`` and commit it; if that fails (disk full), nothing of it stays.

        Raises:
            RecordingError: when its frames or actions do not have the data set's shape.
        """
        if episode.frames.shape[1:] != tuple(self.spec.frame_shape):
            raise RecordingError(
                f"frames are {episode.frames.shape[1:]}, the data set has {self.spec.frame_shape}"
            )
        if episode.actions.shape[1:] != tuple(self.spec.action_shape):
            raise RecordingError(
                f"actions are {episode.actions.shape[1:]}, the data set has "
                f"{self.spec.action_shape}"
            )
        assert episode.signals is not None
        if episode.signals.shape[1:] != (self.spec.signals,):
            raise RecordingError(
                f"there are {episode.signals.shape[1:]} signals a transition, the data set has "
                f"{self.spec.signals}"
            )
        if self._frames >= self.frames_per_shard:
            self._number += 1
            self._open()
        ends = episode.terminated * _TERMINATED + episode.truncated * _TRUNCATED
        arrays = {
            "frames.bin": episode.frames,
            "actions.bin": episode.actions.astype(self.spec.action_dtype),
            "rewards.bin": episode.rewards.astype(np.float32),
            "ends.bin": ends.astype(np.uint8),
        }
        if self.spec.signals:
            arrays["signals.bin"] = episode.signals.astype(np.float32)
        try:
            self._append(arrays, episode)
        except BaseException:
            self._open()
            raise
        self._frames += len(episode) + 1
        self._transitions += len(episode)

    def _append(self, arrays: dict[str, np.ndarray], episode: Episode) -> None:
        for name, array in arrays.items():
            with open(self.shard / name, "ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())
                file.flush()
                os.fsync(file.fileno())
        record = {
            "length": len(episode),
            "return": float(np.sum(episode.rewards)),
            "seed": episode.seed,
            "policy": episode.policy,
            "split": episode.split,
        }
        with open(self.shard / "episodes.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


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

    def __len__(self) -> int:
        """Number of transitions T."""
        return self.length

    @property
    def key(self) -> str:
        """Name of the episode, unique in its data set."""
        return f"{self.shard.name}/{self.transition_offset}"

    def _map(
        self, name: str, dtype: str, shape: tuple[int, ...], offset: int, n: int
    ) -> np.ndarray:
        size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        path = self.shard / name
        if path.stat().st_size < (offset + n) * size:
            raise RecordingError(f"{path} is shorter than its committed episodes: it was cut off")
        return np.memmap(path, dtype=dtype, mode="r", offset=offset * size, shape=(n, *shape))

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 (T+1, H, W, 3), memory-mapped and read-only."""
        return self._map(
            "frames.bin", "uint8", tuple(self.spec.frame_shape), self.frame_offset, self.length + 1
        )

    @cached_property
    def actions(self) -> np.ndarray:
        """(T, ...) in the stored dtype; ``actions[t]`` leads from frame t to frame t+1."""
        return np.array(
            self._map(
                "actions.bin",
                self.spec.action_dtype,
                tuple(self.spec.action_shape),
                self.transition_offset,
                self.length,
            )
        )

    @cached_property
    def rewards(self) -> np.ndarray:
        """float32 (T,)."""
        return np.array(
            self._map("rewards.bin", "float32", (), self.transition_offset, self.length)
        )

    @cached_property
    def signals(self) -> np.ndarray:
        """float32 (T, k)."""
        count = self.spec.signals
        if not count:
            return np.zeros((self.length, 0), np.float32)
        return np.array(
            self._map("signals.bin", "float32", (count,), self.transition_offset, self.length)
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.array(self._map("ends.bin", "uint8", (), self.transition_offset, self.length))

    @property
    def terminated(self) -> np.ndarray:
        """Boolean (T,)."""
        return (self._ends & _TERMINATED) > 0

    @property
    def truncated(self) -> np.ndarray:
        """Boolean (T,)."""
        return (self._ends & _TRUNCATED) > 0

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
        self.folder = Path(folder)
        self.spec = DatasetSpec.load(self.folder)
        self.episodes: list[EpisodeReference] = []
        for shard in sorted(self.folder.glob("shard-*")):
            frame = transition = 0
            for record in _read_records(shard):
                self.episodes.append(
                    EpisodeReference(
                        shard,
                        self.spec,
                        frame,
                        transition,
                        record["length"],
                        record["seed"],
                        record["policy"],
                        record["split"],
                        record["return"],
                    )
                )
                frame += record["length"] + 1
                transition += record["length"]

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


def _read_records(shard: Path, repair: bool = False) -> list[dict[str, Any]]:
    path = shard / "episodes.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if repair and complete != text:  # a line cut short by a crash was never committed
        os.truncate(path, len(complete.encode()))
    try:
        return [json.loads(line) for line in complete.splitlines()]
    except json.JSONDecodeError as error:
        raise RecordingError(f"{path}: damaged commit record: {error}") from None
