"""Files of actions beside videos: .csv with a header, .jsonl or .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.config import config_class
from nfd_env.data.layout import RecordingError
from nfd_env.spaces import ActionCodec

SUFFIXES = (".csv", ".jsonl", ".parquet")


@config_class
class TableConfig:
    """``source.kwargs`` of videos: how their files of actions are read.

    Attributes:
        action_space: as plain values, e.g. {type: Discrete, n: 5}; empty to tell it by the
            actions: whole numbers that are Discrete or MultiDiscrete, or others from -1 to 1.
        columns: one for Discrete actions, or one that holds lists, else one for each number of an
            action. Columns "reward", "terminated" and "truncated" are read where they are there; a
            video is one episode, so that only its last action, or its last frame, can end it.
            In .jsonl, "mouse.dx" is the entry dx of mouse, and "keyboard.keys:key.w" is 1 where the
            list keys of keyboard holds "key.w", else 0; so are VPT's files read.
        clip: numbers beyond the bounds of a Box become the bounds, instead of an error.
        copy: False leaves the frames in the videos, to be decoded whenever they are asked for: no
            second copy on disk, but slower, and the videos must stay where they are.
    """

    action_space: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=lambda: ["action"])
    clip: bool = False
    copy: bool = True


def actions_of(
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


def read_table(
    path: Path,
    columns: dict[str, list[Any]],
    space: spaces.Space,
    codec: ActionCodec,
    settings: TableConfig,
    frames: int,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Actions (T, ...), rewards (T,), and whether the last transition terminated.

    Raises:
        RecordingError: when they do not fit ``space`` or the number of ``frames``.
    """
    count = frames - 1
    actions = actions_of(path, columns, settings, count)
    try:
        if len(settings.columns) == 1 and codec.shape == (1,) and actions.ndim == 1:
            actions = actions[:, None]
        if np.dtype(space.dtype).kind in "iu" and np.array_equal(actions, np.rint(actions)):
            actions = actions.astype(np.int64)  # a table may have written 1.0
        if settings.clip and isinstance(space, spaces.Box):
            actions = np.clip(actions, space.low, space.high)
        codec.check_values(actions, count)
        rewards = _numbers(columns.get("reward", [0.0] * count)[:count])
        if not np.isfinite(rewards).all():
            raise ValueError("rewards must be finite numbers")
        terminated = _ends(columns, "terminated", count)
        _ends(columns, "truncated", count)  # where a video just stops it is truncated anyway
    except (TypeError, ValueError) as error:
        raise RecordingError(f"{path}: {error}") from None
    return actions.astype(space.dtype), rewards, terminated


def _ends(columns: dict[str, list[Any]], name: str, count: int) -> bool:
    """Whether an episode of ``count`` transitions ends so, by a column that may not be there."""
    said = _numbers(columns.get(name, [0] * count))
    if not np.isfinite(said).all():
        raise ValueError(f"{name} must be 0 or 1 in each row")
    early = np.flatnonzero(said[: count - 1])
    if early.size:
        raise ValueError(
            f"row {early[0] + 1} says {name}, but its video goes on: cut the video there, or leave "
            "the column out"
        )
    return bool(said[count - 1 :].any())


def space_of(tables: Sequence[np.ndarray]) -> spaces.Space:
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


def _flat(row: Any, columns: Sequence[str]) -> Any:
    """``row`` with the entries of ``columns`` that lie within others, see ``TableConfig``."""
    nested = [
        c for c in columns if isinstance(row, dict) and c not in row and ("." in c or ":" in c)
    ]
    if not nested:
        return row
    told = ("reward", "terminated", "truncated", *columns)
    values = {name: row[name] for name in told if name in row}
    for column in nested:
        place, _, held = column.partition(":")
        value: Any = row
        for name in place.split("."):
            if not isinstance(value, dict) or name not in value:
                raise RecordingError(f"a row has no entry {place!r}")
            value = value[name]
        values[column] = held in [str(each) for each in value] if held else value
    return values


def _numbers(values: Sequence[Any]) -> np.ndarray:
    words = {"true": 1.0, "false": 0.0}
    return np.array([words.get(v.lower(), v) if isinstance(v, str) else v for v in values], float)


def read_columns(path: Path, settings: TableConfig) -> dict[str, list[Any]]:
    """The columns of a file of actions, each with an entry a row.

    Raises:
        RecordingError: when it cannot be read, or its rows differ.
    """
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError:
                raise RecordingError(
                    f"{path} needs pyarrow: pip install 'nfd-env[parquet]'"
                ) from None
            return parquet.read_table(path).to_pydict()
        # Spreadsheets begin their files with a mark that is no part of the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file, strict=True, skipinitialspace=True))
                rows = [{k and k.strip(): v for k, v in row.items()} for row in rows]
            else:
                rows = (_flat(json.loads(line), settings.columns) for line in file if line.strip())
                rows = list(rows)
        if not rows or not all(isinstance(r, dict) and r.keys() == rows[0].keys() for r in rows):
            raise RecordingError(f"{path} must have rows of the same columns")
        return {name: [row[name] for row in rows] for name in rows[0] if name is not None}
    except RecordingError as error:
        raise RecordingError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from None
    except Exception as error:  # of three libraries
        raise RecordingError(f"{path} cannot be read: {error}") from None
