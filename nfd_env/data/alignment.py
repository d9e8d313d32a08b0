"""Do the recorded actions stand at the right frames? Off by one, a world answers a frame late.

The change from frame t to frame t + 1 tells something of the action behind it. A ridge regression
reads each of the actions t - 1, t and t + 1 from the change; the one that is read best is the one
that caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nfd_env.data.shards import EpisodeReference, RecordedDataset

SHIFTS = (-1, 0, 1)
_CELLS = 32  # frames are averaged to so many cells a side
_GRID = 4  # motion is told for so many fields a side
_FOLDS = 5
_RIDGE = 0.3  # of the features' variance, times the number of examples
_CLIPPED = 5.0  # standard deviations beyond which a feature says no more
_TRANSITIONS = 20_000  # about so many are looked at, in stretches from all over the data
_STRETCH = 50  # transitions of one stretch are kept together: neighbours resemble each other
_SURE = 4.0  # standard errors that count as sure
_LEAST = 0.02  # share of the actions' variance that must be read for them to have an effect
# Things that go on moving are read from earlier actions too; only a clear lead is a wrong shift.
_LEAD = 0.3


@dataclass(frozen=True)
class Alignment:
    """Which shift of the actions explains the changes between frames.

    Attributes:
        scores: of each shift, the share of the actions' variance that is read from the changes
            where actions change, cross-validated; below 0 is worse than their mean.
        best: 0 where the actions are aligned or nothing is clearly better, -1 where the change to a
            frame is caused by the action recorded one frame earlier than it should be, 1 one frame
            later; None where the actions have no visible effect.
        lead: score of ``best`` over that of the next best.
        transitions: that were looked at.
    """

    scores: dict[int, float]
    best: int | None
    lead: float
    transitions: int

    def __str__(self) -> str:
        """One sentence for people."""
        told = ", ".join(f"{shift:+d}: {score:.2f}" for shift, score in self.scores.items())
        if self.best is None:
            return f"the actions have no effect that is seen in the next frame ({told})"
        if self.best == 0:
            return f"actions and frames are aligned ({told})"
        late = "earlier" if self.best < 0 else "later"
        return (
            f"the change into a frame is explained by the action recorded one frame {late} ({told})"
            ": shift the actions by one, or look at how they were recorded"
        )


def measure_alignment(data: RecordedDataset) -> Alignment:
    """Read the actions at the shifts -1, 0 and 1 from the changes between recorded frames.

    Returns:
        The scores; ``best`` is None too where there are too few episodes to tell.
    """
    codec = data.spec.codec
    features, actions, groups = [], [], []
    for group, (episode, first, stop) in enumerate(_stretches(data)):
        features.append(_changes(np.asarray(episode.frames[first : stop + 1])))
        encoded = codec.encode(torch.from_numpy(episode.actions[first - 1 : stop + 1])).numpy()
        count = stop - first
        actions.append(np.stack([encoded[1 + s : 1 + s + count] for s in SHIFTS]))
        groups.append(np.full(count, group))
    if len(features) < 2 * _FOLDS:
        return Alignment(dict.fromkeys(SHIFTS, 0.0), None, 0.0, sum(map(len, features)))
    return _judged(
        np.concatenate(features).astype(np.float64),
        np.concatenate(actions, 1).astype(np.float64),
        np.concatenate(groups),
    )


def _stretches(data: RecordedDataset) -> list[tuple[EpisodeReference, int, int]]:
    """Transitions ``first`` to ``stop`` - 1 of episodes, with one before and one after them."""
    found = []
    for episode in data:
        for first in range(1, len(episode) - 2, _STRETCH):
            found.append((episode, first, min(first + _STRETCH, len(episode) - 1)))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in np.sort(order[: max(2 * _FOLDS, _TRANSITIONS // _STRETCH)])]


def _changes(frames: np.ndarray) -> np.ndarray:
    """What tells how each frame differs from the one before: (frames - 1, features)."""
    down, across = (_averages(size) for size in frames.shape[1:3])
    rows = np.tensordot(down, frames.astype(np.float32), (1, 1))  # (down, frames, width, 3)
    small = np.tensordot(across, rows, (1, 2)).transpose(2, 1, 0, 3)
    change, middle = np.diff(small, axis=0), (small[1:] + small[:-1]) / 2
    # Motion as Lucas and Kanade (1981) have it: where a picture moves, its change is along its
    # slope. Unlike the change itself, this does not depend on where the moving thing is.
    down, right = np.gradient(middle, axis=(1, 2))
    parts = [_fields(change, 8), _fields(np.abs(change), _GRID)]
    for slope in (down, right):
        product, energy = (change * slope).sum(-1), (slope * slope).sum(-1)
        for cells in (_GRID, 1):
            moved, sharp = _fields(product[..., None], cells), _fields(energy[..., None], cells)
            parts += [moved, moved / (sharp + 1)]
    return np.concatenate(parts, 1)


def _averages(size: int) -> np.ndarray:
    """Weights (_CELLS, ``size``) of pixels in the mean of each cell: how much of them lies in it.

    Not OpenCV's own: its libraries are not everywhere, and training is to go on without them.
    """
    edges = np.linspace(0, size, _CELLS + 1)[:, None]
    first, last = edges[:-1], edges[1:]
    pixels = np.arange(size)
    inside = (np.minimum(last, pixels + 1) - np.maximum(first, pixels)).clip(0)
    return (inside / (last - first)).astype(np.float32)


def _fields(pictures: np.ndarray, cells: int) -> np.ndarray:
    """Means of cells x cells fields of (n, height, width, channels), flat."""
    count, size = len(pictures), _CELLS // cells
    split = pictures.reshape(count, cells, size, cells, size, -1)
    return split.mean((2, 4)).reshape(count, -1)


def _judged(features: np.ndarray, actions: np.ndarray, groups: np.ndarray) -> Alignment:
    features = features - features.mean(0)
    deviation = features.std(0)
    features = (features[:, deviation > 0] / deviation[deviation > 0]).clip(-_CLIPPED, _CLIPPED)
    # Held actions are the same at all shifts: only where they change can the shifts be told apart.
    telling = (actions != actions[1]).any((0, 2))
    folds = groups % _FOLDS
    errors = np.zeros(actions.shape[:2])
    for fold in range(_FOLDS):
        train, test = folds != fold, folds == fold
        if not (train.any() and test.any()):
            continue
        gram = features[train].T @ features[train]
        gram[np.diag_indices_from(gram)] += _RIDGE * train.sum()
        for index, target in enumerate(actions):
            mean = target[train].mean(0)
            weights = np.linalg.solve(gram, features[train].T @ (target[train] - mean))
            errors[index, test] = np.square(target[test] - mean - features[test] @ weights).sum(1)
    spread = np.square(actions[:, telling] - actions[:, telling].mean(1, keepdims=True)).sum(2)
    total = float(spread.mean()) if telling.any() else 0.0
    if not total:
        return Alignment(dict.fromkeys(SHIFTS, 0.0), None, 0.0, len(groups))
    gains = (spread - errors[:, telling]) / total  # one a transition, whose mean is the score
    values = gains.mean(1)
    scores = {shift: float(value) for shift, value in zip(SHIFTS, values, strict=True)}
    best = int(values.argmax())
    lead = float(values[best] - np.delete(values, best).max())
    told = groups[telling]
    if values[best] < max(_LEAST, _SURE * _error(gains[best], told)):
        return Alignment(scores, None, lead, len(groups))
    ahead = float(values[best] - values[1])
    sure = ahead > max(_LEAD * float(values[best]), _SURE * _error(gains[best] - gains[1], told))
    return Alignment(scores, SHIFTS[best] if sure else 0, lead, len(groups))


def _error(values: np.ndarray, groups: Sequence[int] | np.ndarray) -> float:
    """Standard error of the mean of values that resemble each other within groups."""
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return float("inf")
    sums = np.bincount(index, values - values.mean(), count)
    return float(np.sqrt(np.square(sums).sum() * count / (count - 1)) / len(values))
