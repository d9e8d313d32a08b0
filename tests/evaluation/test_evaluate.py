from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.checkpoint import load_world
from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation import evaluate as module
from nfd_env.evaluation.evaluate import evaluate, evaluate_steps, format_report, format_steps
from nfd_env.evaluation.metrics import bright_share, luminance
from tests.counter_env import record_counter_episodes


@pytest.fixture(scope="module")
def long_recordings(tmp_path_factory: pytest.TempPathFactory) -> RecordedDataset:
    folder = tmp_path_factory.mktemp("long")
    record_counter_episodes(folder, episodes=4, validation_every=2, length=90)
    return RecordedDataset(folder)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on rollouts being long."""
    monkeypatch.setattr(module, "_EARLY", (1, 70))
    monkeypatch.setattr(module, "_LATE", (90, 160))
    monkeypatch.setattr(module, "HORIZONS", (1, 8, 32))


SMALL: dict[str, Any] = {"windows": 2, "long_rollouts": 1, "progress": False}


def test_bright_share() -> None:
    frames = np.zeros((2, 4, 5, 3), np.uint8)
    frames[0, 0, 0] = 255
    frames[1, 2, 3] = (0, 200, 0)
    assert luminance(frames).shape == (2, 4, 5)
    assert luminance(frames).max() == pytest.approx(255)
    assert luminance(frames)[1, 2, 3] == pytest.approx(0.587 * 200)
    assert bright_share(frames, 200) == 1 / 40
    assert bright_share(frames, 100) == 2 / 40
    assert bright_share(frames, 255) == 0


def test_steps_are_compared_on_the_same_windows(
    distilled_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(distilled_world, "cpu", "fp32")
    report = evaluate_steps(world, long_recordings, [1, 5], **SMALL)
    rows = report["rows"]
    assert [(r["dynamics"], r["sampling_steps"]) for r in rows] == [
        ("student", 1),
        ("teacher", 1),
        ("teacher", 5),
    ]
    assert report["reference"] == 2
    assert set(rows[2]["frechet_over_reference"].values()) == {1.0}
    ratio = rows[0]["frechet"]["frames_1_100"] / rows[2]["frechet"]["frames_1_100"]
    assert rows[0]["frechet_over_reference"]["frames_1_100"] == pytest.approx(ratio)
    # What does not depend on the model says that the windows are the same.
    for name in ("psnr_frozen", "ssim_frozen"):
        assert len({r["horizons"]["8"][name] for r in rows}) == 1
    assert len({r["bright_threshold"] for r in rows}) == 1
    assert len({r["horizons"]["8"]["psnr"] for r in rows}) == 3
    alone = evaluate(world, long_recordings, 1, **SMALL)
    assert alone["horizons"] == rows[0]["horizons"] and alone["frechet"] == rows[0]["frechet"]
    text = format_steps(report)
    for name in ("| 1 (student, consistency) |", "| 5 (teacher, euler) |", "(1.00×)"):
        assert name in text
    json.dumps(report)


def test_a_world_with_one_network(tiny_world: Path, long_recordings: RecordedDataset) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    small = {**SMALL, "long_rollouts": 0}
    report = evaluate_steps(world, long_recordings, [2, 1], **small)
    assert [(r["dynamics"], r["sampling_steps"]) for r in report["rows"]] == [
        ("flow", 2),
        ("flow", 1),
    ]
    assert report["reference"] == 0 and "Fréchet" not in format_steps(report)


def test_brightness_of_a_world_that_shows_what_is_real(
    tiny_world: Path, long_recordings: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that are the decoded real ones have as many bright pixels as those, by definition."""
    world = load_world(tiny_world, "cpu", "fp32")
    report = evaluate(world, long_recordings, 1, **SMALL)
    before = report["horizons"]["1"]["bright_ratio"]
    assert before >= 0 and "bright pixels" in format_report(report)
    # The first is that of all real frames, which only the long rollouts are compared with.
    shares = iter([0.03, 0.01, 0.04, 0.02, 0.04, 0.02, 0.04])
    monkeypatch.setattr(module, "bright_share", lambda frames, threshold: next(shares))
    ratios = evaluate(world, long_recordings, 1, **{**SMALL, "long_rollouts": 0})["horizons"]
    assert [r["bright_ratio"] for r in ratios.values()] == [0.25, 0.5, 0.5]


def test_speculation_is_judged_too(endless_world: Path, long_recordings: RecordedDataset) -> None:
    world = load_world(endless_world, "cpu", "fp32")
    small = {**SMALL, "long_rollouts": 0, "ends": False}
    plain, drafted = (
        evaluate(world, long_recordings, 2, speculative_frames=n, **small) for n in (1, 3)
    )
    # The first frame of a joint draw is the one that is drawn alone.
    assert drafted["horizons"]["1"] == pytest.approx(plain["horizons"]["1"], rel=1e-3)
    assert drafted["horizons"]["32"]["psnr"] != plain["horizons"]["32"]["psnr"]
    assert "ends" not in drafted
    assert "up to 3 frames drawn jointly" in format_report(drafted)


@pytest.mark.parametrize("steps", [[], [0], [2, -1]])
def test_steps_out_of_range(
    steps: list[int], tiny_world: Path, long_recordings: RecordedDataset
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_steps(load_world(tiny_world, "cpu", "fp32"), long_recordings, steps, **SMALL)


def test_the_command(
    distilled_world: Path,
    long_recordings: RecordedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = tmp_path / "README.md"
    document.write_text("# Title\n<!-- begin eval-steps -->\n<!-- end eval-steps -->\n")
    command = ["eval", str(distilled_world), "--recordings", str(long_recordings.folder)]
    command += ["--windows", "1", "--long-rollouts", "0", "--steps", "1,2", "--precision", "fp32"]
    assert main([*command, "--json", "--markdown-into", str(document)]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4
    assert "| 2 (teacher, euler) |" in document.read_text()
    with pytest.raises(SystemExit):
        main([*command, "--steps", "1,two"])
    assert "whole numbers with commas, got '1,two'" in capsys.readouterr().err
