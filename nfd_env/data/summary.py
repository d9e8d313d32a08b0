"""What a data set holds, for people: a text, and a picture of frames from all over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gymnasium import spaces

from nfd_env.data.episode import SPLITS, kind_of
from nfd_env.data.shards import EpisodeReference, RecordedDataset
from nfd_env.files import writing
from nfd_env.spaces import space_from_dict
from nfd_env.video import enlarge, write_png

CONTACT_SHEET = "contact_sheet.png"
_ROWS, _COLUMNS = 6, 8  # episodes, and frames of each, in the picture
_CELL = 96  # pixels that a frame is high in it
_PARTS = 5  # equal parts of an axis's range that are counted
_SHOWN = 3  # skipped episodes that are told one by one


def summary(data: RecordedDataset) -> str:
    """Episodes, returns, lengths, ends and actions of each policy, and what was skipped."""
    hours = data.frame_count / data.spec.fps / 3600
    splits = ", ".join(f"{len(data.split(name))} {name}" for name in SPLITS)
    lines = [
        f"{data.folder}: {data.frame_count:,} frames ({hours:.2f} h) in {len(data):,} episodes "
        f"({splits})"
    ]
    by: dict[str, list[EpisodeReference]] = {}
    for episode in data:
        by.setdefault(kind_of(episode.policy), []).append(episode)
    for policy in sorted(by):
        lines += _policy(policy, by[policy], data)
    skipped = data.skipped()
    if skipped:
        lines.append(f"skipped: {len(skipped)} episodes that failed")
        for record in skipped[:_SHOWN]:
            reason = str(record.get("error", "")).strip().splitlines() or [""]
            lines.append(f"  seed {record['seed']} ({record['policy']}): {reason[-1][:160]}")
    for name in SPLITS:
        if not data.split(name):
            lines.append(f"warning: no episode for {name}: record more before training")
    return "\n".join(lines)


def _policy(name: str, episodes: Sequence[EpisodeReference], data: RecordedDataset) -> list[str]:
    terminated = sum(bool(e.terminated[-1]) for e in episodes)
    frames = sum(len(e) + 1 for e in episodes)
    return [
        f"{name}: {len(episodes)} episodes, {frames / data.frame_count:.0%} of the frames",
        f"  return {_spread([e.total_reward for e in episodes])}",
        f"  length {_spread([len(e) for e in episodes])}",
        f"  ends: {terminated} terminated, {len(episodes) - terminated} truncated",
        f"  actions: {_histogram(np.concatenate([e.actions for e in episodes]), data)}",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4g} on average, from {min(values):.4g} to {max(values):.4g}"


def _histogram(actions: np.ndarray, data: RecordedDataset) -> str:
    """Shares of the actions, or of the parts of each axis."""
    space = space_from_dict(data.spec.action_space)
    names = list(data.spec.source.get("action_names") or [])
    if isinstance(space, spaces.Discrete):
        counts = np.bincount(actions - int(space.start), minlength=int(space.n))
        if len(names) != len(counts):
            names = [str(int(space.start) + i) for i in range(len(counts))]
        return _shares(counts, names)
    axes = []
    for axis, values in enumerate(actions.reshape(len(actions), -1).T):
        if isinstance(space, spaces.Box):
            low, high = space.low.flat[axis], space.high.flat[axis]
            if not np.isfinite([low, high]).all():
                low, high = values.min(), values.max()
            counts, edges = np.histogram(values, _PARTS, (float(low), float(high)))
            labels = [f"{a:.2g}..{b:.2g}" for a, b in zip(edges, edges[1:], strict=False)]
        else:
            start = int(space.start[axis]) if isinstance(space, spaces.MultiDiscrete) else 0
            size = int(space.nvec[axis]) if isinstance(space, spaces.MultiDiscrete) else 2
            counts = np.bincount(values.astype(np.int64) - start, minlength=size)
            labels = [str(start + i) for i in range(size)]
        axes.append(f"[{axis}] {_shares(counts, labels)}")
    return "; ".join(axes)


def _shares(counts: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(
        f"{name} {count / counts.sum():.0%}" for name, count in zip(names, counts, strict=True)
    )


def contact_sheet(data: RecordedDataset) -> np.ndarray:
    """Frames spread over episodes (rows) and over their lengths (columns), uint8 (H, W, 3)."""
    chosen = np.unique(np.linspace(0, len(data) - 1, min(_ROWS, len(data))).astype(int))
    rows = []
    for number in chosen:
        episode = data.episodes[number]
        places = np.linspace(0, len(episode), _COLUMNS).astype(int)
        cells = [enlarge(np.array(episode.frames[p]), _CELL) for p in places]
        rows.append(np.concatenate(cells, 1))
    return np.concatenate(rows)


def save_contact_sheet(data: RecordedDataset) -> Path | None:
    """Write the picture into the data set's folder; nothing where there is no episode.

    Raises:
        FolderError: when it cannot be written.
    """
    if not len(data):
        return None
    with writing(data.folder):
        return write_png(data.folder / CONTACT_SHEET, contact_sheet(data))
