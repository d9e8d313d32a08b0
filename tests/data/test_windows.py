"""The one place that says which window lies where, and which action leads into which frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import Places, actions_into, encoded_into, shown_transitions
from nfd_env.spaces import ActionCodec
from tests.counter_env import move, read, record_counter_episodes


def test_places_of_windows_are_all_different_and_lie_within_their_episodes() -> None:
    frames = [5, 2, 3, 1, 7]
    places = Places(frames, 3)
    found = [places.find(place) for place in range(len(places))]
    assert found == [(e, f) for e, n in enumerate(frames) for f in range(max(0, n - 2))]
    assert [places.number(*place) for place in found] == list(range(len(places)))
    for wrong in (-1, len(places)):
        with pytest.raises(IndexError):
            places.find(wrong)


def test_nothing_is_long_enough() -> None:
    assert len(Places([3, 2], 4)) == len(Places([])) == 0


def test_actions_into_frames() -> None:
    actions = np.arange(1, 6)[:, None]
    assert actions_into(actions, 0, 3)[:, 0].tolist() == [0, 1, 2]
    assert actions_into(actions, 1, 3)[:, 0].tolist() == [1, 2, 3]
    assert actions_into(actions, 4, 2)[:, 0].tolist() == [4, 5]
    assert actions_into(actions, 0, 1)[:, 0].tolist() == [0]
    assert actions[:, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_encoded_actions_lead_into_recorded_frames(tmp_path: Path, first: int) -> None:
    record_counter_episodes(tmp_path, 1, length=12)
    episode = RecordedDataset(tmp_path).episodes[0]
    into = encoded_into(episode, ActionCodec(spaces.Discrete(3)), first, 4)
    assert into.shape == (4, 3) and into.dtype == torch.float32
    counters, _ = read(np.asarray(episode.frames))
    known = into[1:] if first == 0 else into
    moves = np.diff(counters)[max(0, first - 1) : first + 3]
    assert move(known.argmax(-1).numpy()).tolist() == moves.tolist()
    assert bool(into[0].any()) == (first > 0)


@pytest.mark.parametrize(
    ("hidden", "length", "count"), [(False, 9, 9), (True, 9, 8), (True, 1, 0), (True, 2000, 1000)]
)
def test_transitions_whose_frame_was_shown(
    tmp_path: Path, hidden: bool, length: int, count: int
) -> None:
    record_counter_episodes(
        tmp_path, 1, terminal_frame=not hidden, length=length, hide_terminal=hidden
    )
    episode = RecordedDataset(tmp_path).episodes[0]
    shown, terminated = shown_transitions(episode)
    assert shown == count and terminated.shape == (count,)
    if count:
        assert terminated[-1] == (length < 1000) and not terminated[:-1].any()
    assert episode.terminated[-1] == (length < 1000)  # what was recorded is as it was
