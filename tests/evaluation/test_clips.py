"""Clips beside the game's: what single frames do not show has to count."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env import config
from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation.clips import ActionReport, Clips, format_actions, judge_clips
from nfd_env.evaluation.inverse_dynamics import InverseDynamics, InverseDynamicsConfig
from nfd_env.metrics import FrechetReference
from nfd_env.recipe.records import StageRecord, read_records, write_records
from nfd_env.recipe.report import _actions

SPACE = {"type": "Discrete", "n": 3, "start": 0}
SIDE, FRAMES = 16, 32


class Episode:
    """A dot that goes straight on, and bounces off the walls."""

    def __init__(self, rng: np.random.Generator, length: int = FRAMES) -> None:
        place, speed = rng.integers(0, 2 * SIDE, 2), rng.choice([-1, 1], 2)
        way = (place + speed * np.arange(length + 1)[:, None]) % (2 * (SIDE - 2))
        corner = np.minimum(way, 2 * (SIDE - 2) - way)
        self.frames = np.full((length + 1, SIDE, SIDE, 3), 30, np.uint8)
        for frame, (y, x) in zip(self.frames, corner, strict=True):
            frame[y : y + 2, x : x + 2] = 220

    def __len__(self) -> int:
        return len(self.frames) - 1


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Of 48 episodes; what is generated is of the same kind, but elsewhere."""
    rng = np.random.default_rng(0)
    held: Any = [Episode(rng) for _ in range(96)]
    shown = [torch.from_numpy(np.stack([e.frames[:FRAMES] for e in held[i::2]])) for i in (0, 1)]
    real, made = shown
    groups = np.arange(0, 96, 2) // 4  # two neighbours may depend on one another
    return Clips(held, groups, torch.zeros(48, FRAMES, 3), made, made, real, real)


@pytest.fixture(scope="module")
def network() -> InverseDynamics:
    """Weights drawn by chance see motion too."""
    torch.manual_seed(0)
    return InverseDynamics(InverseDynamicsConfig(SPACE, [SIDE, SIDE], channels=4)).eval()


def of_frames(real: torch.Tensor, made: torch.Tensor) -> float:
    """A Fréchet distance of single frames, at half the resolution."""
    seen = [x[..., ::2, ::2, 0].flatten(0, 1).flatten(1).float() for x in (real, made)]
    reference = FrechetReference(seen[0], 16)
    return reference.distance(reference.project(seen[1]))


def test_what_moves_wrongly_is_far_though_its_frames_are_right(
    clips: Clips, network: InverseDynamics
) -> None:
    sound = judge_clips(clips, network).clips
    assert sound is not None and sound.frames == 16
    assert sound.real.paired == pytest.approx(0, abs=1e-9)
    assert sound.reencoded == sound.real  # of a perfect tokenizer
    # Another dot is near, that dot in the wrong order or at rest is far.
    near = sound.generated.frechet + 3 * sound.generated.frechet_error
    assert sound.real.frechet < near < 0.5 * sound.scrambled.frechet < 0.5 * sound.frozen.frechet

    orders = np.stack([np.random.default_rng(i).permutation(FRAMES) for i in range(48)])
    mixed = clips.real[torch.arange(48)[:, None], torch.from_numpy(orders)]
    still = clips.real[:, :1].expand_as(clips.real)
    assert of_frames(clips.real, mixed) == pytest.approx(0, abs=1e-6)  # it does not see it
    for wrong, like in ((mixed, "scrambled"), (still, "frozen")):
        found = judge_clips(replace(clips, generated=wrong), network).clips
        assert found is not None and found.real == sound.real
        made, known = found.generated, getattr(sound, like)
        assert made.frechet == pytest.approx(known.frechet, rel=0.1)
        assert made.frechet - 5 * made.frechet_error > near
        assert made.paired - 5 * made.paired_error > 0


def test_too_few_clips_have_no_distance(clips: Clips, network: InverseDynamics) -> None:
    names = ("generated", "shuffled", "real", "reencoded", "actions")
    few = replace(clips, **{name: getattr(clips, name)[:2] for name in names}, groups=np.arange(2))
    report = judge_clips(few, network)
    assert report.clips is None and "Fréchet" not in format_actions(report)


def test_a_report_is_read_back(clips: Clips, network: InverseDynamics, tmp_path: Path) -> None:
    report = judge_clips(clips, network)
    text = format_actions(report)
    for part in ("| a still picture |", "| real |", "clips of 16 frames", "not FVD"):
        assert part in text
    values = json.loads(json.dumps(asdict(report)))
    assert config.from_mapping(ActionReport, values) == report
    stages: Any = SimpleNamespace(records={"report": StageRecord("", extra=values)})
    assert "<td>a still picture<td>" in "".join(_actions(stages))
    del values["clips"]  # of a run from before there were distances
    assert config.from_mapping(ActionReport, values) == replace(report, clips=None)
    assert "still picture" not in "".join(_actions(stages))
    # What could not be measured, as the error of a single episode, is read back too.
    unknown = {**asdict(report), "relative": math.nan, "parts": [[math.nan] * 5]}
    write_records(tmp_path, {"report": StageRecord("", metrics={"f1": math.nan}, extra=unknown)})
    stages.records = read_records(tmp_path)
    assert stages.records["report"].metrics == {}
    assert "<td>a still picture<td>" in "".join(_actions(stages))


def test_clips_are_written_for_other_measures(
    tiny_world: Path, long_recordings: RecordedDataset, tmp_path: Path, short: None, capsys: Any
) -> None:
    out = tmp_path / "new" / "clips"
    command = ["eval", str(tiny_world), "--recordings", str(long_recordings.folder), "--windows"]
    command += ["2", "--long-rollouts", "0", "--device", "cpu", "--save-clips", str(out)]
    assert main(command) == 0
    found = {path.stem: np.load(path) for path in out.iterdir()}
    assert found.keys() == {"generated", "real", "reencoded"}
    assert {(x.shape, x.dtype.name) for x in found.values()} == {((2, 32, 32, 48, 3), "uint8")}
    capsys.readouterr()
    assert main([*command, "--steps", "1"]) == 1
    assert "--save-clips writes those of one way" in capsys.readouterr().err
