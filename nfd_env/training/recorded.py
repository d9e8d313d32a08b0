"""Recordings as a training needs them: what is missing is said at the door."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nfd_env.data.shards import RecordedDataset, RecordingError


def open_recordings(
    folder: str | Path, train_frames: int = 2, validation_frames: int = 2
) -> RecordedDataset:
    """Open a data set of which some episode in each split is long enough.

    Args:
        folder: the data-set folder.
        train_frames: frames in a row that training asks for.
        validation_frames: frames in a row that validation asks for.

    Raises:
        RecordingError: when it is no data set, has no episode to train on or to validate with, or
            none that is long enough.
    """
    recordings = RecordedDataset(Path(folder).expanduser())
    # Where no frame is shown at the end, the last one is a copy, and is left out.
    copies = 0 if recordings.spec.source.get("terminal_frame", True) else 1
    for split, frames in (("train", train_frames), ("validation", validation_frames)):
        episodes = recordings.split(split)
        if not episodes:
            raise RecordingError(
                f"{folder} has no {split} episode, and {len(recordings)} in all: record more, some "
                "for training and some held out for validation (validation_every says how many)"
            )
        longest = max(len(e) for e in episodes) + 1 - copies
        if longest < frames:
            raise RecordingError(
                f"no {split} episode of {folder} has {frames} frames, the longest has {longest}: "
                "record longer episodes, or lower the frames of a training window"
            )
    return recordings


def check_rewards(recordings: RecordedDataset) -> None:
    """Refuse rewards that are no numbers.

    Raises:
        RecordingError: naming the episode and the step.
    """
    for episode in recordings:
        wrong = np.flatnonzero(~np.isfinite(episode.rewards))
        if len(wrong):
            raise RecordingError(
                f"{episode.shard}: the episode with seed {episode.seed} has the reward "
                f"{episode.rewards[wrong[0]]} at step {wrong[0]}: mend the environment's rewards "
                "and record again"
            )
