"""What lies in the folder that ``nfd_env.data.shards`` describes: spec, shards, records."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nfd_env import config
from nfd_env.data.episode import SPLITS
from nfd_env.files import found_file, make_folder, save_text
from nfd_env.sources.spec import check_fps, recorded_part
from nfd_env.spaces import ActionCodec, space_from_dict

WRITER = r"\w+"
_LONGEST = 2**40  # transitions; no disk holds so many frames
_RECORD = {"length": int, "seed": int, "policy": str, "split": str, "return": (int, float)}


class RecordingError(ValueError):
    """A data set on disk (or an episode to be added to it) cannot be used."""


@config.config_class
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
        in_videos: whether the frames stayed in the videos that they were imported from, see
            ``nfd_env.data.videos``.
    """

    frame_shape: tuple[int, int, int]
    action_shape: tuple[int, ...]
    action_dtype: str
    action_space: dict[str, Any]
    source: dict[str, Any]
    fps: float
    signals: int = 0
    in_videos: bool = False

    def __post_init__(self) -> None:
        """Check that the values belong together."""
        for name in ("frame_shape", "action_shape"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.frame_shape) != 3 or min(self.frame_shape) < 1 or self.frame_shape[2] != 3:
            raise ValueError(f"frame_shape must be (H, W, 3), got {self.frame_shape}")
        check_fps("fps", self.fps)
        if self.signals < 0:
            raise ValueError(f"signals must not be negative, got {self.signals}")
        try:
            shape, kind = space_from_dict(self.action_space).shape, np.dtype(self.action_dtype).kind
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"action_space or action_dtype cannot be used: {error}") from None
        if tuple(shape or ()) != self.action_shape or kind not in "buif":
            raise ValueError(
                f"action_space asks for actions of shape {shape}, got {self.action_dtype} "
                f"{self.action_shape}"
            )

    @property
    def fingerprint(self) -> str:
        """The identity of what networks are trained on: the form of frames, and the actions."""
        return config.fingerprint(
            {"frame_shape": list(self.frame_shape), "action_space": self.action_space}
        )

    @property
    def frames_file(self) -> tuple[str, int]:
        """The file of a shard that has one entry a frame, and an entry's bytes."""
        return ("pts.bin", 8) if self.in_videos else ("frames.bin", int(np.prod(self.frame_shape)))

    @property
    def codec(self) -> ActionCodec:
        """Checks and encodes the actions."""
        return ActionCodec(space_from_dict(self.action_space))

    def save(self, folder: Path) -> None:
        """Write ``dataset.yaml``, or check that the one there says the same.

        Raises:
            RecordingError: when the folder holds recordings of something else.
            FolderError: when it cannot be written to.
        """
        path = make_folder(folder) / "dataset.yaml"
        values = {
            **asdict(self),
            "frame_shape": list(self.frame_shape),
            "action_shape": list(self.action_shape),
        }
        for name in ("signals", "in_videos"):  # which older versions do not know
            if not values[name]:
                del values[name]
        if found_file(path, RecordingError):
            _check_same(_read_spec(path), values, folder, "collect into an empty folder")
            return
        save_text(path, yaml.safe_dump(values, sort_keys=False))

    def check_same(self, other: DatasetSpec, folder: Path) -> None:
        """Refuse to read ``folder``, whose spec this is, together with that of ``other``.

        Raises:
            RecordingError: when they are not of the same game.
        """
        told = "only recordings of the same game can be read together"
        _check_same(asdict(self), asdict(other), folder, told)

    @classmethod
    def load(cls, folder: Path) -> DatasetSpec:
        """Read ``dataset.yaml``.

        Raises:
            RecordingError: when there is none, or it is damaged.
        """
        path = folder / "dataset.yaml"
        if not found_file(path, RecordingError):
            raise RecordingError(f"{folder} is not a data set: it has no dataset.yaml")
        try:
            return config.from_mapping(cls, _read_spec(path), str(path), foreign=True)
        except config.ConfigError as error:
            raise RecordingError(str(error)) from None


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        return config.read(path)
    except config.ConfigError as error:
        raise RecordingError(str(error)) from None


def _check_same(there: dict[str, Any], here: dict[str, Any], folder: Path, advice: str) -> None:
    different = [k for k in here | there if _content(there, k) != _content(here, k)]
    if different:
        raise RecordingError(
            f"{folder} holds recordings with another {', '.join(different)}; {advice}"
        )


def _content(values: dict[str, Any], key: str) -> Any:
    """What a data set says under ``key``, without what is presentation only."""
    value = values.get(key)
    if key == "source" and isinstance(value, dict):
        # What is not said is the default, as in data sets that are older than a setting.
        return {k: v for k, v in recorded_part(value).items() if v not in ([], {}, "")}
    return None if key == "fps" else value


def writer_of(shard: Path) -> str:
    """Name of the writer of a shard."""
    return shard.name.split("-")[1]


def shard_folders(folder: Path) -> list[Path]:
    """The shards of a data set, in the order of writers and numbers; a foreign one is an error."""
    shards = sorted(folder.glob("shard-*"))
    for path in shards:
        if not (re.fullmatch(rf"shard-{WRITER}-\d{{5}}", path.name) and path.is_dir()):
            raise RecordingError(f"{path} is no shard: move it out of the data set")
    return shards


def check_size(path: Path, size: int, there: int | None = None) -> None:
    """Refuse a file that is missing or has fewer bytes; ``there``: those that it has elsewhere."""
    if there is None and not found_file(path, RecordingError):
        raise RecordingError(f"{path} is missing")
    if (path.stat().st_size if there is None else there) < size:
        raise RecordingError(f"{path} is shorter than its committed episodes: it was cut off")


def read_records(shard: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The commit records of a shard."""
    records = read_lines(shard / "episodes.jsonl", _RECORD, repair)
    for number, record in enumerate(records, 1):
        fits = 1 <= record["length"] <= _LONGEST and record["split"] in SPLITS
        kinds = isinstance(record.get("number", 0), int) and isinstance(
            record.get("video", ""), str
        )
        if not fits or not kinds:
            raise RecordingError(
                f"{shard / 'episodes.jsonl'}: damaged commit record, line {number}: {record}"
            )
    return records


def read_lines(path: Path, kinds: dict[str, Any], repair: bool = False) -> list[dict[str, Any]]:
    """The whole lines of a file of records; one cut short by a crash was never committed."""
    if not found_file(path, RecordingError):
        return []
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if repair and complete != data:
        os.truncate(path, len(complete))
    records = []
    for number, line in enumerate(complete.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            wrong = [
                k
                for k, kind in kinds.items()
                if not isinstance(record[k], kind) or isinstance(record[k], bool)
            ]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RecordingError(
                f"{path}: damaged commit record, line {number}: {type(error).__name__}: {error}"
            ) from None
        if wrong:
            raise RecordingError(f"{path}: damaged commit record, line {number}: {wrong[0]}")
        records.append(record)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of them; when this returns, it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace a file of records, whole or not at all."""
    save_text(path, "".join(json.dumps(record) + "\n" for record in records))
