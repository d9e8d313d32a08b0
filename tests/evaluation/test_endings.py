"""The ends of recorded episodes, played again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation import endings
from nfd_env.evaluation.endings import AHEAD, EARLIER, LATER, ReplayedEndings, replay_endings
from nfd_env.evaluation.held_out import EncodedEpisodes
from nfd_env.worlds.load import load_world

HAZARD = 0.02


def test_a_constant_hazard_in_closed_form(
    tiny_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    output = world.model.heads.output
    output.weight.zero_()
    output.bias[0] = torch.logit(torch.tensor(HAZARD))
    episodes = long_recordings.split("validation")
    encoded = EncodedEpisodes(world.model, episodes)
    report = replay_endings(world, world.model, encoded, seed=0)
    assert report.episodes == sum(e.terminated[-1] for e in episodes) > 0
    for ahead in AHEAD:
        reached, end = (1 - HAZARD) ** (ahead - 1 - EARLIER), (1 - HAZARD) ** ahead
        row = report.ahead[ahead]
        assert row.before == pytest.approx(1 - reached, abs=1e-5)
        assert row.recorded_before == pytest.approx(1 - reached, abs=1e-5)
        assert row.there == pytest.approx(reached - end * (1 - HAZARD) ** LATER, abs=1e-5)
        assert row.recorded_there == pytest.approx(reached - end, abs=1e-5)


@pytest.mark.parametrize(("steps_before", "there"), [(0, 1.0), (3, 1.0), (4, 0.0), (11, 0.0)])
def test_how_much_earlier_counts_as_there(steps_before: int, there: float) -> None:
    hazard = torch.zeros(1, 12 + LATER)
    hazard[0, 11 - steps_before] = 1.0
    assert endings._split(hazard, 12) == pytest.approx((1 - there, there))


def test_what_is_played_again(
    tiny_world: Path, long_recordings: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames before the end start it, and the actions that were taken drive it."""
    world = load_world(tiny_world, "cpu", "fp32")
    monkeypatch.setattr(endings, "AHEAD", (12,))
    episode = long_recordings.split("validation")[0]
    encoded = EncodedEpisodes(world.model, [episode])
    model, seen = world.model, []
    start, step = model.start, model.step
    monkeypatch.setattr(
        model, "start", lambda contexts, seeds: seen.append(contexts) or start(contexts, seeds)
    )
    monkeypatch.setattr(model, "step", lambda state, a: seen.append(a) or step(state, a))
    assert replay_endings(world, model, encoded, seed=0).episodes == 1
    end = len(episode) - int(not world.spec.source.terminal_frame)
    (context,), *actions = seen
    assert torch.equal(context.latents[-1], encoded.latents([end - 12])[0])
    taken = world.codec.encode(torch.from_numpy(episode.actions[end - 12 : end]))
    assert torch.equal(torch.cat(actions[:12]), taken)
    assert len(actions) == 12 + LATER
    assert torch.equal(torch.cat(actions[12:]), taken[-1:].expand(LATER, -1))


def test_episodes_that_are_too_short(
    tiny_world: Path, long_recordings: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    monkeypatch.setattr(endings, "AHEAD", (12, 90))
    encoded = EncodedEpisodes(world.model, long_recordings.split("validation"))
    assert replay_endings(world, world.model, encoded, seed=0) == ReplayedEndings(0, {})
