"""Telling wrong frames from good ones: the measure by hand, the labels, and a whole report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.evaluation import ood_signals
from nfd_env.evaluation.held_out import EvaluationConfig
from nfd_env.evaluation.ood_signals import format_signals, measure_signals
from nfd_env.worlds.load import load_world

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
AUROC = ood_signals._auroc


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on rollouts being long."""
    monkeypatch.setattr(ood_signals, "FRAMES", 12)


def test_auroc_by_hand() -> None:
    wrong = np.array([[True, False], [False, True], [False, False]])
    good = np.array([[False, True], [False, False], [True, True]])
    groups = np.arange(3)
    signal = np.array([[2.0, 5.0], [9.0, 5.0], [1.0, 4.0]])
    # At number 0: 2 > 1. At number 1: 5 = 5 and 5 > 4.
    value, error = AUROC(signal, wrong, good, groups)
    assert value == pytest.approx((1 + 0.5 + 1) / 3)
    # Without each window in turn: 1 of 1, 1 of 1, and the tie.
    assert error == pytest.approx(np.sqrt(2 * np.var([1, 1, 0.5])))
    # Of any number also 2 < 5, 2 < 4 and 5 > 1.
    assert AUROC(signal, wrong, good, groups, any_number=True)[0] == pytest.approx(3.5 / 6)
    # Only the frames with the signals 5 and 4 move about as much.
    motion = np.array([[1.0, 9.0], [1.0, 2.0], [3.0, 2.4]])
    assert AUROC(signal, wrong, good, groups, motion)[0] == 1
    assert np.isnan(AUROC(signal, wrong, np.zeros_like(good), groups)[0])


def test_what_explains_a_signal_is_told_apart() -> None:
    rng = np.random.default_rng(0)
    motion = np.exp(rng.normal(size=(60, 12)))
    wrong = motion * np.exp(rng.normal(size=motion.shape)) > 1
    signal = motion * np.exp(0.1 * rng.normal(size=motion.shape))  # of nothing but the motion
    groups = np.arange(60)
    assert AUROC(signal, wrong, ~wrong, groups)[0] > 0.8
    alike, error = AUROC(signal, wrong, ~wrong, groups, motion)
    assert abs(alike - 0.5) < 0.06 and error < 0.03


def test_far_frames_are_the_worst_of_their_number() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (8, 3, 16, 16, 3), dtype=np.uint8)
    real[7, 1] = real[7, 0]  # nothing moves
    passed = (real ^ 1).astype(np.uint8)  # one grey level off
    made = passed[:, 1:].copy()
    made[2, 0] = real[2, 1] ^ 16
    error = ood_signals._added_error(real, passed, made)
    assert error.shape == (8, 2) and np.isnan(error[7, 0])
    assert error[2, 0] == pytest.approx(20 * np.log10(16), abs=0.3)
    assert error[1, 0] == pytest.approx(0, abs=1e-4)
    wrong, good = ood_signals._worst(error, 0)
    assert wrong[:, 0].tolist() == [i == 2 for i in range(8)]
    assert not (wrong & good).any() and not good[7, 0]
    with pytest.raises(RecordingError, match="nothing moves"):
        ood_signals._worst(np.full((4, 2), np.nan), 0)


def test_a_bright_thing_is_lost_or_kept() -> None:
    passed = np.zeros((4, 3, 32, 32, 3), np.uint8)
    passed[:3, :, 8:10, 8:11] = 250  # fewer pixels than are bright by definition
    passed[2, 0] = 0  # born later
    made = passed[:, 1:].copy()
    made[0, 1] = 0
    made[1] = np.roll(made[1], 4, axis=2)  # a little off
    made[1, 1] = np.roll(made[1, 1], 9, axis=1)
    lost, kept = ood_signals._lost(passed, made)
    assert lost.tolist() == [[False, True], [False, True], [False, False], [False, False]]
    assert kept.tolist() == [[True, False], [True, False], [False, False], [False, False]]


def test_report(distilled_world: Path, long_recordings: RecordedDataset) -> None:
    world = load_world(distilled_world, **CPU)
    report = measure_signals(world, long_recordings, EvaluationConfig(windows=6), progress=False)
    again = measure_signals(world, long_recordings, EvaluationConfig(windows=6), progress=False)
    assert repr(again) == repr(report)  # NaNs too
    assert (report.windows, report.frames, report.episodes) == (6, 12, 2)
    assert report.far[0] >= 12 and report.far[1] >= 36
    by_name = {row.signal: row for row in report.rows}
    for name in ("re-encoding", "spread", "shift"):
        assert {name, f"{name} / motion", f"{name}, mean of 8"} <= by_name.keys()
    assert "motion" in by_name and "motion / motion" not in by_name
    # An untrained world draws little but its noise, of which there is twice as much.
    assert by_name["spread"].control[0] > 0.9
    for row in report.rows:
        assert 0 <= row.far["same"][0] <= 1
    text = format_signals(report)
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_command(
    distilled_world: Path,
    long_recordings: RecordedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = tmp_path / "results.md"
    document.write_text("<!-- begin eval-ood-signals -->\n<!-- end eval-ood-signals -->\n")
    command = ["eval", str(distilled_world), "--recordings", str(long_recordings.folder)]
    command += ["--ood-signals", "--windows", "3", "--precision", "fp32", "--dynamics", "teacher"]
    command += ["--sampling-steps", "2"]
    assert main([*command, "--json", "--markdown-into", str(document)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sampling"].startswith("2 steps of the teacher")
    assert "| spread / motion |" in document.read_text()
    assert main(["eval", "--ood-signals", "--steps", "1"]) == 1
    assert "leave out --steps" in capsys.readouterr().err


def test_what_cannot_be_measured(
    distilled_world: Path,
    long_recordings: RecordedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = load_world(distilled_world, **CPU)
    with pytest.raises(ValueError, match="windows >= 2"):
        measure_signals(world, long_recordings, EvaluationConfig(windows=1), progress=False)
    monkeypatch.setattr(ood_signals, "FRAMES", 100)
    with pytest.raises(RecordingError, match="record longer"):
        measure_signals(world, long_recordings, EvaluationConfig(windows=2), progress=False)
