"""Recorded moments drawn from cached latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from nfd_env.data.latents import LatentDataset
from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.training import starts as module
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.starts import StartsConfig, recorded_starts
from nfd_env.worlds.load import World, load_world


@pytest.fixture(scope="module")
def world(tiny_world: Path) -> World:
    return load_world(tiny_world, "cpu", "fp32")


@pytest.fixture(scope="module")
def latents(recordings: Path, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode(EncodeConfig(str(recordings), str(tiny_world / "tokenizer.safetensors"), str(folder)))
    return folder


@pytest.fixture
def plan(recordings: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> StartsConfig:
    # The tiny world's own starts are noise, not frames.
    monkeypatch.setattr(module, "_STRANGE", np.inf)
    return StartsConfig(str(recordings), str(latents), count=150, frames=5, margin=10)


def test_moments_are_stretches_of_training_episodes(
    plan: StartsConfig, world: World, recordings: Path
) -> None:
    starts = recorded_starts(plan, world)
    known: dict[bytes, tuple[EpisodeReference, int]] = {}
    for episode in RecordedDataset(recordings).split("train"):
        encoded = np.load(Path(plan.latents) / f"{episode.shard.name}.npy")
        for place in range(len(episode) + 1):
            known[encoded[episode.frame_offset + place].tobytes()] = episode, place
    found = set()
    for start in starts:
        assert start.latents.dtype == torch.float16 and start.latents.shape == (5, 4, 4, 6)
        (episode, first), *others = (known[x.numpy().tobytes()] for x in start.latents)
        assert [place for _, place in others] == list(range(first + 1, first + 5))
        into = torch.from_numpy(episode.actions[max(0, first - 1) : first + 4].copy())
        assert torch.equal(start.actions[-len(into) :].float(), one_hot(into, 3).float())
        assert start.beginning == (first == 0) == (not start.actions[0].any())
        # Frames 0 to T; the tenth behind the start's last is still there.
        assert first + 4 + 10 <= len(episode)
        found.add((episode.key, first))
    assert len(found) == 150
    assert {key for key, _ in found} == {e.key for e in RecordedDataset(recordings).split("train")}
    again = recorded_starts(plan, world)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(starts, again, strict=True))


def test_without_latents_the_world_encodes_what_is_drawn(plan: StartsConfig, world: World) -> None:
    encoded = recorded_starts(plan, world)
    for ours, theirs in zip(
        recorded_starts(replace(plan, latents=""), world), encoded, strict=True
    ):
        assert ours.latents.dtype == ours.actions.dtype == torch.float16
        torch.testing.assert_close(ours.latents, theirs.latents, atol=2e-3, rtol=2e-3)
        assert torch.equal(ours.actions, theirs.actions) and ours.beginning == theirs.beginning


def test_recordings_of_another_game(plan: StartsConfig, world: World) -> None:
    with pytest.raises(RecordingError, match="frames are .*, the world's"):
        spec = replace(world.spec, frame_size=(64, 64))
        recorded_starts(replace(plan, latents=""), replace(world, spec=spec))
    with pytest.raises(RecordingError, match="the world has Discrete.*: give recordings of its"):
        spec = replace(world.spec, action_space={"type": "Discrete", "n": 4})
        recorded_starts(plan, replace(world, spec=spec))


def test_as_many_as_there_are_and_no_more(plan: StartsConfig, world: World) -> None:
    with pytest.raises(ValueError, match="has only ([0-9]+) moments with 5 frames") as error:
        recorded_starts(replace(plan, count=10**6), world)
    most = int(str(error.value).split("only ")[1].split()[0])
    everything = recorded_starts(replace(plan, count=most), world)
    places = {(s.latents.numpy().tobytes(), s.actions.numpy().tobytes()) for s in everything}
    assert len(places) == most


def test_moments_before_ends(
    plan: StartsConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SomeTruncated(LatentDataset):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.episodes.ended[::3] = False

    monkeypatch.setattr(module, "LatentDataset", SomeTruncated)
    episodes = SomeTruncated(RecordedDataset(plan.recordings), plan.latents, "train").episodes
    ended = episodes.ended.tolist()
    assert any(ended) and not all(ended)
    known = {
        latent.tobytes(): (number, len(e.latents) - 1 - place)
        for number, e in enumerate(episodes)
        for place, latent in enumerate(e.latents)
    }
    plan = replace(plan, count=4 * sum(ended), ending_frames=14)

    def before_ends(share: float) -> set[tuple[int, int]]:
        starts = recorded_starts(replace(plan, ending_share=share), world)
        found = [known[s.latents[-1].numpy().tobytes()] for s in starts]
        assert len(set(found)) == len(found) == plan.count  # each once
        assert min(left for _, left in found) >= 10
        return {(number, left) for number, left in found if left < 14 and ended[number]}

    assert len(before_ends(1.0)) == plan.count
    some = before_ends(0.5)
    assert plan.count / 2 <= len(some) < plan.count
    assert {left for _, left in some} == {10, 11, 12, 13}
    assert len(before_ends(0.0)) < plan.count / 2
    with pytest.raises(ValueError, match="at most 14 frames before an end.*starts.ending_share"):
        recorded_starts(replace(plan, count=plan.count + 1, ending_share=1.0), world)


def test_latents_of_another_tokenizer(
    plan: StartsConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STRANGE", 2.0)
    own = recorded_starts(replace(plan, count=20), replace(world, starts=_float(plan, world)))
    assert len(own) == 20

    def foreign(*args: Any) -> Any:
        context = original(*args)
        return replace(context, latents=4 * context.latents.flip(1))

    original = module.episode_context
    mine = _float(plan, world)
    monkeypatch.setattr(module, "episode_context", foreign)
    with pytest.raises(ValueError, match="does not hold latents of the tokenizer of Tiny"):
        recorded_starts(plan, replace(world, starts=mine))


def _float(plan: StartsConfig, world: World) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRANGE", np.inf)
        return recorded_starts(replace(plan, count=8, seed=1), world)


@pytest.mark.parametrize("name", ["count", "frames", "margin"])
def test_bad_numbers(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        StartsConfig("a", "b", **{name: 0})


def test_bad_endings() -> None:
    with pytest.raises(ValueError, match="starts.ending_share must be from 0 to 1"):
        StartsConfig("a", "b", ending_share=1.5)
    with pytest.raises(ValueError, match="ending_frames must be above starts.margin = 35, got 35"):
        StartsConfig("a", "b", ending_share=0.5, ending_frames=35)
    StartsConfig("a", "b", margin=100)
