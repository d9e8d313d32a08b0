"""Which episodes a data set has: an index in columns, of some bytes an episode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import overload

import numpy as np

from nfd_env.data.episode import SPLITS, Episode
from nfd_env.data.layout import DatasetSpec, RecordingError, read_records
from nfd_env.data.lazy_frames import Frames, LazyFrames
from nfd_env.data.reading import stored_frames, stored_values
from nfd_env.data.videos import VideoFrames
from nfd_env.files import found_file

TERMINATED, TRUNCATED = 1, 2
_KEPT = 4096  # references, with the actions and rewards that were asked for


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
    folder: int = 0
    video: str = ""

    def __len__(self) -> int:
        """Number of transitions T."""
        return self.length

    @property
    def shard_name(self) -> str:
        """Name of its shard, unique in its data set, in whichever of the folders it lies."""
        return f"{self.folder}-{self.shard.name}" if self.folder else self.shard.name

    @property
    def key(self) -> str:
        """Name of the episode, unique in its data set."""
        return f"{self.shard_name}/{self.transition_offset}"

    def _transitions(self, name: str, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        path = self.shard / name
        return stored_values(path, dtype, shape, self.transition_offset, self.length)

    @property
    def frames(self) -> Frames:
        """uint8 (T+1, H, W, 3), read-only; read when a part of them is asked for."""
        spec, offset, count = self.spec, self.frame_offset, self.length + 1
        shape = tuple(spec.frame_shape)
        if not spec.in_videos:
            return stored_frames(self.shard / "frames.bin", shape, offset, count)
        video, path = Path(self.video), self.shard / "pts.bin"
        if not found_file(video, RecordingError):
            raise RecordingError(f"{video} is missing: the recordings refer to it, put it back")

        def times(first: int, stop: int) -> np.ndarray:
            return stored_values(path, "int64", (), offset + first, stop - first)

        source = spec.source
        crop, size = source.get("crop", ()), source.get("size", ())
        return VideoFrames(video, times, (count, *shape), crop, size)

    @cached_property
    def actions(self) -> np.ndarray:
        """(T, ...) in the stored dtype; ``actions[t]`` leads from frame t to frame t+1.

        Raises:
            RecordingError: when the file is damaged: an action lies outside the space.
        """
        spec = self.spec
        actions = self._transitions("actions.bin", spec.action_dtype, tuple(spec.action_shape))
        try:
            spec.codec.check_values(actions, self.length)
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
        if (ends[:-1] & TERMINATED).any() or (ends > (TERMINATED | TRUNCATED)).any():
            raise self._damaged("ends.bin", "an episode terminates at its last transition only")
        return ends

    def _damaged(self, name: str, reason: str) -> RecordingError:
        return RecordingError(
            f"{self.shard / name} is damaged in the episode of seed {self.seed}: {reason}"
        )

    @property
    def terminated(self) -> np.ndarray:
        """Boolean (T,)."""
        return (self._ends & TERMINATED) > 0

    @property
    def truncated(self) -> np.ndarray:
        """Boolean (T,); an episode that neither terminated nor was cut off ends all the same."""
        truncated = (self._ends & TRUNCATED) > 0
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


_INDEX = np.dtype(
    [
        ("shard", np.int32),
        ("transition", np.int64),
        ("frame", np.int64),
        ("length", np.int64),
        ("policy", np.int32),
        ("split", np.int8),
        ("total", np.float64),
        ("number", np.int64),
        ("video", np.int32),
    ]
)


@dataclass(frozen=True)
class _Columns:
    """``index``, of the type ``_INDEX``, has one entry an episode; the lists are what it names."""

    shards: list[tuple[int, Path]]
    policies: list[str]
    videos: list[str]
    seeds: list[int]
    index: np.ndarray


def read_columns(shards: Sequence[tuple[int, Path]]) -> _Columns:
    """Read the commit records of shards, each with the number of its folder.

    Raises:
        RecordingError: when a record is damaged.
    """
    policies: dict[str, int] = {}
    videos: dict[str, int] = {}
    seeds: list[int] = []
    index = [np.zeros(0, _INDEX)]
    for number, (_, shard) in enumerate(shards):
        records = read_records(shard)
        seeds += [r["seed"] for r in records]
        entries, before = [], 0
        for place, r in enumerate(records):
            policy = policies.setdefault(r["policy"], len(policies))
            video = videos.setdefault(r.get("video", ""), len(videos))
            split, total = SPLITS.index(r["split"]), r["return"]
            where = number, before, before + place, r["length"]
            entries.append((*where, policy, split, total, r.get("number", -1), video))
            before += r["length"]
        index.append(np.array(entries, _INDEX))
    return _Columns(list(shards), list(policies), list(videos), seeds, np.concatenate(index))


class Episodes(Sequence[EpisodeReference]):
    """Episodes of a data set, or some of them; a reference is made when it is asked for."""

    def __init__(self, columns: _Columns, spec: DatasetSpec) -> None:
        """All that ``columns`` tell of."""
        self._columns, self._spec = columns, spec
        self._chosen = np.arange(len(columns.index))
        self._reference: Callable[[int], EpisodeReference] = lru_cache(_KEPT)(self._made)

    def _made(self, index: int) -> EpisodeReference:
        c = self._columns
        shard, transition, frame, length, policy, split, total, number, video = c.index[
            index
        ].item()
        folder, path = c.shards[shard]
        return EpisodeReference(
            path,
            self._spec,
            frame,
            transition,
            length,
            c.seeds[index],
            c.policies[policy],
            SPLITS[split],
            total,
            None if number < 0 else number,
            folder,
            c.videos[video],
        )

    def _column(self, name: str) -> np.ndarray:
        return self._columns.index[name][self._chosen]

    def of_split(self, name: str) -> Episodes:
        """Those of the split "train" or "validation"."""
        codes = [code for code, split in enumerate(SPLITS) if split == name]
        return self._some(self._chosen[np.isin(self._column("split"), codes)])

    def _some(self, chosen: np.ndarray) -> Episodes:
        part = object.__new__(Episodes)
        part._columns, part._spec, part._reference = self._columns, self._spec, self._reference
        part._chosen = chosen
        return part

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._chosen)

    @overload
    def __getitem__(self, where: int) -> EpisodeReference: ...
    @overload
    def __getitem__(self, where: slice) -> list[EpisodeReference]: ...
    def __getitem__(self, where: int | slice) -> EpisodeReference | list[EpisodeReference]:
        """One of them, or several."""
        if isinstance(where, slice):
            return [self._reference(int(index)) for index in self._chosen[where]]
        return self._reference(int(self._chosen[where]))

    def __iter__(self) -> Iterator[EpisodeReference]:
        """One after the other."""
        return (self._reference(int(index)) for index in self._chosen)

    @property
    def lengths(self) -> np.ndarray:
        """Transitions of each, int64."""
        return self._column("length")

    @property
    def returns(self) -> np.ndarray:
        """Sum of the rewards of each, float64."""
        return self._column("total")

    def terminated(self) -> np.ndarray:
        """Whether each ended by itself, boolean; read from the shards.

        Raises:
            RecordingError: when a file is missing or too short.
        """
        result, shards = np.zeros(len(self), bool), self._column("shard")
        lasts = self._column("transition") + self._column("length") - 1
        for index in np.unique(shards):
            mine = np.flatnonzero(shards == index)
            last = lasts[mine]
            path = self._columns.shards[index][1] / "ends.bin"
            ends = stored_values(path, "uint8", (), 0, int(last.max()) + 1)
            result[mine] = (ends[last] & TERMINATED) > 0
        return result

    def by_shard(self) -> dict[str, Episodes]:
        """Those of each shard, by the shard's name."""
        shards = self._column("shard")
        parts = [self._some(self._chosen[shards == index]) for index in np.unique(shards)]
        return {part[-1].shard_name: part for part in parts}


def one_after_another(episodes: Episodes) -> Frames:
    """All frames of a shard, of which ``episodes`` are all."""
    last, spec = episodes[-1], episodes[-1].spec
    shape, count = tuple(spec.frame_shape), last.frame_offset + last.length + 1
    if not spec.in_videos:
        return stored_frames(last.shard / "frames.bin", shape, 0, count)
    ends = np.cumsum(episodes.lengths + 1)

    def read(first: int, stop: int) -> np.ndarray:
        parts = []
        while first < stop:
            number = int(np.searchsorted(ends, first, side="right"))
            begin, end = int(ends[number] - len(episodes[number]) - 1), min(stop, int(ends[number]))
            parts.append(episodes[number].frames[first - begin : end - begin])
            first = end
        return np.concatenate(parts)

    return LazyFrames((count, *shape), read)
