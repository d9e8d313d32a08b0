from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.evaluation.held_out import EncodedEpisodes, EvaluationConfig, HeldOut, recorded_context
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import World, load_world
from tests.counter_env import read

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture
def world(tiny_world: Path) -> World:
    return load_world(tiny_world, "cpu", "fp32")


def prepare(world: World, recordings: RecordedDataset, windows: int, long: int) -> HeldOut:
    return HeldOut.prepare(world, recordings, EvaluationConfig(windows, long, seed=5))


def test_a_frame_is_encoded_once(
    world: World, long_recordings: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_frames: list[int] = []
    encode = WorldModel.encode

    def counted(self: WorldModel, frames: torch.Tensor) -> torch.Tensor:
        encoded_frames.append(len(frames))
        return encode(self, frames)

    monkeypatch.setattr(WorldModel, "encode", counted)
    episodes = long_recordings.split("validation")
    encoded = EncodedEpisodes(world.model, episodes)
    assert encoded.frames == sum(len(e) + 1 for e in episodes)
    wanted = [encoded.number(1, 3), encoded.number(0, 90), encoded.number(1, 3)]
    latents = encoded.latents(wanted)
    assert encoded_frames == [2]
    pictures = encoded.pictures(wanted)
    assert np.array_equal(pictures[0], episodes[1].frames[3])
    assert np.array_equal(pictures[1], episodes[0].frames[90])
    assert torch.equal(latents[0], latents[2])
    expected = encode(world.model, torch.from_numpy(pictures))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    encoded.latents(range(encoded.frames))
    encoded.latents(range(encoded.frames))
    assert sum(encoded_frames) == encoded.frames


def test_contexts_end_where_the_window_begins(
    world: World, long_recordings: RecordedDataset
) -> None:
    encoded = EncodedEpisodes(world.model, long_recordings.split("validation"))
    context = recorded_context(world, encoded, 1, 20)
    first = 21 - world.model.dynamics.config.window
    numbers = [encoded.number(1, t) for t in range(first, 21)]
    assert torch.equal(context.latents, encoded.latents(numbers))
    actions = encoded.episodes[1].actions[first - 1 : 20]
    assert torch.equal(context.actions, torch.eye(3)[torch.from_numpy(actions)])
    young = recorded_context(world, encoded, 1, 1)
    assert len(young.latents) == 2 and not young.actions[0].any()


def test_windows_and_long_rollouts_are_chosen_independently(
    world: World, long_recordings: RecordedDataset
) -> None:
    few, many = (prepare(world, long_recordings, 3, n) for n in (0, 2))
    more = prepare(world, long_recordings, 4, 2)
    assert few.long is None and few.late_floor is None and many.long is not None
    assert len(few.windows.contexts) == len(many.windows.contexts) == 3
    assert len(more.windows.contexts) == 4 and len(many.long.contexts) == 2
    for other in (many, more):
        assert torch.equal(few.windows.actions, other.windows.actions[:, :3])
        assert np.array_equal(few.windows.groups, other.windows.groups[:3])
    assert few.early_floor.value == pytest.approx(many.early_floor.value, rel=1e-4)
    assert more.long is not None and torch.equal(more.long.actions, many.long.actions)


def test_actions_and_horizons_belong_to_the_same_moments(
    world: World, long_recordings: RecordedDataset
) -> None:
    """The counter's moves, read off the frames, are what the actions say."""
    held = prepare(world, long_recordings, 3, 0)
    moves = held.windows.actions.argmax(-1) - 1
    counters, steps = zip(*(read(held.horizons[h].frames) for h in (1, 8, 32)), strict=True)
    assert np.array_equal(steps[1] - steps[0], np.full(3, 7))
    assert np.array_equal(counters[1] - counters[0], moves[1:8].sum(0))
    assert np.array_equal(counters[2] - counters[1], moves[8:32].sum(0))


def test_the_floor_is_that_of_the_windows_own_frames(
    world: World, long_recordings: RecordedDataset
) -> None:
    held = prepare(world, long_recordings, 2, 0)
    _, steps = read(held.horizons[1].frames)
    stretches = []
    for episode, step in zip(held.windows.groups, steps, strict=True):
        first = held.encoded.number(int(episode), int(step))
        stretches.append(held.encoded.latents(np.arange(first, first + 70)))
    projected = held.reference.project(torch.cat(stretches).flatten(1))
    assert held.early_floor.value == pytest.approx(held.reference.distance(projected))


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_numbers_out_of_range(
    world: World, long_recordings: RecordedDataset, numbers: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="windows >= 1 and long_rollouts >= 0"):
        prepare(world, long_recordings, *numbers)


def test_recordings_that_do_not_do(world: World, recordings: Path, monkeypatch: Any) -> None:
    dataset = RecordedDataset(recordings)
    with pytest.raises(RecordingError, match="no held-out episode has 77 frames"):
        prepare(world, dataset, 1, 0)
    monkeypatch.setattr(dataset, "episodes", dataset.split("train"))
    with pytest.raises(RecordingError, match="no validation episodes"):
        prepare(world, dataset, 1, 0)
