"""Recordings whose actions are off by one are found, and others are left in peace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.data.alignment import measure_alignment
from nfd_env.data.episode import Episode
from nfd_env.data.shards import DatasetSpec, RecordedDataset, ShardWriter
from nfd_env.spaces import space_to_dict

SIZE, LENGTH = 32, 60


def step_of(space: spaces.Space, action: Any) -> np.ndarray:
    """By how many pixels an action moves the thing, (down, right)."""
    if isinstance(space, spaces.Discrete):
        return np.array([(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)][int(action)], float)
    return 2.0 * np.asarray(action)[:2]


def record(
    folder: Path, space: spaces.Space, late: int = 0, inertia: float = 0.0, seen: bool = True
) -> RecordedDataset:
    """A square on grass moves ``late`` frames after its action and slides on by ``inertia``."""
    spec = DatasetSpec(
        (SIZE, SIZE, 3), space.shape or (), str(space.dtype), space_to_dict(space), {}, 15.0
    )
    spec.save(folder)
    rng = np.random.default_rng(0)
    space.seed(0)
    grass = rng.integers(60, 90, (SIZE, SIZE, 3), np.uint8)
    with ShardWriter(folder, spec, "w00") as writer:
        for number in range(40):
            held = np.repeat([space.sample() for _ in range(LENGTH)], rng.integers(1, 6, LENGTH), 0)
            actions = held[:LENGTH]
            place, speed = rng.uniform(4, 24, 2), np.zeros(2)
            other = rng.uniform(4, 24, 2)  # something that moves whatever one does
            frames = []
            for t in range(-late, LENGTH + 1 - late):
                frame = grass.copy()
                for where, colour in ((place, (220, 60, 40)), (other, (40, 60, 220))):
                    y, x = where.astype(int)
                    frame[y : y + 5, x : x + 5] = colour
                frames.append(frame)
                speed = inertia * speed
                if seen and 0 <= t < LENGTH:
                    speed = speed + step_of(space, actions[t])
                place = (place + speed).clip(0, SIZE - 5)
                other = (other + rng.integers(-2, 3, 2)).clip(0, SIZE - 5)
            ended = np.arange(LENGTH) == LENGTH - 1
            writer.add(
                Episode(np.stack(frames), actions, np.zeros(LENGTH), ended & False, ended), number
            )
    return RecordedDataset(folder)


DISCRETE = spaces.Discrete(5)
BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize("space", [DISCRETE, BOX], ids=str)
@pytest.mark.parametrize("late", [0, 1])
def test_actions_that_work_a_frame_late(tmp_path: Path, space: spaces.Space, late: int) -> None:
    found = measure_alignment(record(tmp_path, space, late))
    assert found.best == -late
    assert found.scores[-late] > 0.2 and found.lead > 0.1
    assert found.transitions > 1500
    told = "are aligned" if not late else "recorded one frame earlier"
    assert told in str(found)
    assert found == measure_alignment(RecordedDataset(tmp_path))


def test_actions_that_were_recorded_a_frame_late(tmp_path: Path) -> None:
    data = record(tmp_path, DISCRETE)
    for episode in data:
        actions = np.roll(np.array(episode.actions), 1, 0)
        path = episode.shard / "actions.bin"
        with open(path, "r+b") as file:
            file.seek(episode.transition_offset * 8)
            file.write(actions.tobytes())
    assert measure_alignment(RecordedDataset(tmp_path)).best == 1


def test_things_that_slide_on_are_no_false_alarm(tmp_path: Path) -> None:
    assert measure_alignment(record(tmp_path, BOX, inertia=0.5)).best == 0


def test_actions_that_nothing_shows(tmp_path: Path) -> None:
    found = measure_alignment(record(tmp_path, DISCRETE, seen=False))
    assert found.best is None and "no effect" in str(found)


def test_too_little_to_tell(tmp_path: Path) -> None:
    data = record(tmp_path, DISCRETE)
    data.episodes = data.episodes[:2]
    assert measure_alignment(data).best is None
    data.episodes = []
    assert measure_alignment(data).best is None
