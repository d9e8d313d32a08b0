"""Recordings as a training needs them: what is missing is said at the door."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.spaces import space_from_dict
from nfd_env.worlds.load import World


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
    recordings = RecordedDataset(folder)
    recordings.check(train_frames, ("train",))
    recordings.check(validation_frames, ("validation",))
    return recordings


def check_of_world(world: World, recordings: RecordedDataset) -> None:
    """Refuse recordings that the world's game cannot have made.

    Raises:
        RecordingError: when frames are of another size, or actions of another space.
    """
    if tuple(recordings.spec.frame_shape[:2]) != tuple(world.spec.frame_size):
        raise RecordingError(
            f"the recordings' frames are {recordings.spec.frame_shape[:2]}, "
            f"the world's {tuple(world.spec.frame_size)}"
        )
    theirs = recordings.spec.action_space
    if space_from_dict(theirs) != space_from_dict(world.spec.action_space):
        raise RecordingError(
            f"{recordings.folder} was recorded with actions of {space_from_dict(theirs)}, the "
            f"world has {space_from_dict(world.spec.action_space)}: give recordings of its game"
        )


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
