"""Recorded play as a world draws it, and heads that learn on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nfd_env.data.latents import LatentDataset, LatentEpisode, encode_recordings
from nfd_env.data.shards import RecordedDataset
from nfd_env.inference.world_model import Context
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.weights import load_weights
from nfd_env.training.drawn import DrawnConfig, draw_stretches
from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig
from nfd_env.training.loop import TrainConfig, train
from nfd_env.worlds.format import CheckpointError, UnknownWorldError, load_world


@pytest.fixture(scope="module")
def latents(recordings: Path, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode_recordings(RecordedDataset(recordings), tiny_world / "tokenizer.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def episodes(recordings: Path, latents: Path) -> list[LatentEpisode]:
    return LatentDataset(RecordedDataset(recordings), latents, "train").episodes


@pytest.fixture
def plan(tiny_world: Path) -> DrawnConfig:
    return DrawnConfig(str(tiny_world), frames=6, count=70, end_share=0.5)


def test_frames_are_what_the_world_draws_under_the_recorded_actions(
    plan: DrawnConfig, episodes: list[LatentEpisode]
) -> None:
    drawn = draw_stretches(plan, episodes)
    assert len(drawn) == 70
    model = load_world(plan.world, "cpu").model
    for number in (0, 1, 30, 65, 69):
        start, stop = drawn[number].stretch.start, drawn[number].stretch.stop
        episode = episodes[drawn[number].stretch.number]
        assert drawn[number].latents.shape == (stop - start, *episode.latents.shape[1:])
        # From the whole past, of which the world takes what it can see.
        into = np.concatenate((np.zeros((1, 3), np.float32), episode.actions[:start]))
        past = torch.from_numpy(episode.latents[: start + 1].copy()).float()
        state = model.start([Context(past, torch.from_numpy(into), True)], [(0, number)])
        expected = [
            model.step(state, torch.from_numpy(action)[None]).latents[0]
            for action in episode.actions[start:stop]
        ]
        made = torch.from_numpy(drawn[number].latents).float()
        torch.testing.assert_close(made, torch.stack(expected), atol=0.05, rtol=0.05)


def test_ends_are_drawn_often_and_weighted_back(
    plan: DrawnConfig, episodes: list[LatentEpisode]
) -> None:
    drawn = draw_stretches(replace(plan, count=600), episodes)
    ends = weight = share = 0.0
    for each in drawn:
        start, stop = each.stretch.start, each.stretch.stop
        terminated = episodes[each.stretch.number].terminated[start:stop]
        ends += float((each.weight * terminated).sum())
        weight += float(each.weight.sum())
        share += float(terminated.any()) / len(drawn)
    assert share > 0.5
    rate = sum(e.terminated.sum() for e in episodes) / sum(len(e.actions) for e in episodes)
    assert ends / weight == pytest.approx(rate, rel=0.15)


def test_the_same_seed_draws_the_same(plan: DrawnConfig, episodes: list[LatentEpisode]) -> None:
    first, again = (draw_stretches(replace(plan, count=5), episodes) for _ in range(2))
    other = draw_stretches(replace(plan, count=5, seed=1), episodes)
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(first, again, strict=True))
    assert [a.stretch for a in first] != [b.stretch for b in other]


def settings(
    recordings: Path, latents: Path, world: Path, folder: Path, drawn: DrawnConfig
) -> HeadsTrainingConfig:
    loop = TrainConfig(str(folder), 4, 8, 3e-3, warmup_steps=1, precision="fp32", validate_every=4)
    return HeadsTrainingConfig(
        str(recordings),
        str(world / "tokenizer.safetensors"),
        str(latents),
        replace(loop, keep_best="mean_end_over_constant"),
        width=16,
        frames=20,
        drawn=drawn,
    )


def test_heads_learn_on_drawn_frames(
    recordings: Path, latents: Path, tiny_world: Path, plan: DrawnConfig, tmp_path: Path
) -> None:
    only = settings(recordings, latents, tiny_world, tmp_path, replace(plan, share=1.0))
    stage = HeadsStage(only)
    known = {
        e.latents[t + 1].astype(np.float32).tobytes(): e.actions[t]
        for e in stage._train.episodes
        for t in range(len(e.actions))
    }
    pictures, actions, _, terminated, _, weight = stage.batch(np.random.default_rng(0), 40)
    ends = 0
    for row in range(40):
        # Recorded frames without a weight lead to drawn frames with one.
        recorded = [x.numpy().tobytes() in known for x in pictures[row]]
        weighted = (weight[row] > 0).tolist()
        size, before = sum(weighted), weighted.index(True)
        assert 1 <= size <= 6 and all(weighted[before : before + size])
        assert recorded == [True] * before + [False] * (20 - before)
        for step in range(before):
            assert np.array_equal(actions[row, step], known[pictures[row, step].numpy().tobytes()])
        ends += int(terminated[row, before : before + size].sum())
    assert ends > 10
    both_kinds = settings(recordings, latents, tiny_world, tmp_path, plan)
    metrics = train(HeadsStage(both_kinds), both_kinds.train, progress=False)
    both = (metrics["end_over_constant"] + metrics["drawn_end_over_constant"]) / 2
    assert metrics["mean_end_over_constant"] == pytest.approx(both)
    # They can go on from what they have learned, and only from that.
    weights = tmp_path / "model.safetensors"
    further = HeadsStage(replace(both_kinds, initial=str(weights), dropout=0.1))
    learned = load_weights(weights, Heads, HeadsConfig).state_dict()
    assert all(torch.equal(v, learned[k]) for k, v in further.network.state_dict().items())
    with pytest.raises(CheckpointError, match="width=16.*ask for .*width=32"):
        HeadsStage(replace(both_kinds, initial=str(weights), width=32))


def test_bad_settings(
    recordings: Path, latents: Path, tiny_world: Path, plan: DrawnConfig, tmp_path: Path
) -> None:
    for wrong, message in (
        ({"share": 1.5}, "drawn.share must lie in"),
        ({"end_share": 1.0}, "drawn.end_share in"),
        ({"frames": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plan, **wrong)
    with pytest.raises(ValueError, match="drawn.frames must be below frames, 20"):
        settings(recordings, latents, tiny_world, tmp_path, replace(plan, frames=20))
    with pytest.raises(UnknownWorldError, match="Nowhere"):
        HeadsStage(
            settings(recordings, latents, tiny_world, tmp_path, replace(plan, world="Nowhere"))
        )


def test_a_world_of_other_latents(plan: DrawnConfig, episodes: list[LatentEpisode]) -> None:
    narrow = [replace(e, actions=e.actions[:, :2]) for e in episodes]
    with pytest.raises(ValueError, match="takes other actions"):
        draw_stretches(plan, narrow)
