"""``nfd eval --against``: all ways of drawing a world's frames in one table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation import against
from nfd_env.evaluation.evaluate import evaluate
from nfd_env.evaluation.held_out import EvaluationConfig
from nfd_env.evaluation.inverse_dynamics import InverseDynamics, InverseDynamicsConfig
from nfd_env.worlds.load import load_world
from tests.evaluation.conftest import long_recordings, short
from tests.tiny_world import DISCRETE

__all__ = ["long_recordings", "short"]  # fixtures

pytestmark = pytest.mark.usefixtures("short")
FEW = EvaluationConfig(windows=2, long_rollouts=1, long_frames=75)


@pytest.fixture(scope="module")
def quick() -> Any:
    """Fewer ways, so that it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(against, "_STEPS", (1,))
        yield


def test_one_table_of_all(rival_world: Path, long_recordings: RecordedDataset, quick: None) -> None:
    world = load_world(rival_world, "cpu", "fp32")
    reader = InverseDynamics(InverseDynamicsConfig(DISCRETE, [32, 48], channels=2)).eval()
    report = against.measure_against(world, long_recordings, FEW, reader, 0.05, progress=False)
    assert [(row.name, row.passes) for row in report.rows] == [
        ("NFD, 2 steps (flow)", 2),
        ("NFD, 2 steps (flow), 2 drawn jointly", 2),
        ("NFD, 1 step (flow)", 1),
        ("NFD, 1 step (flow), 2 drawn jointly", 1),
        ("autoregressive", 6),
        ("autoregressive, parallel", 4),
    ]
    assert report.home == 0 and report.held_out.long_frames == 75
    for row in report.rows:
        assert row.pace.frames_per_second > 0 and row.quality.late is not None
        assert (row.actions is None) == ("jointly" in row.name)
    # Each row is what the other measures say of it alone.
    rival = load_world(rival_world, "cpu", "fp32", "autoregressive_parallel")
    alone = evaluate(rival, long_recordings, FEW, False)
    assert alone.horizons == report.rows[-1].quality.horizons
    assert alone.paired.frechet == report.rows[-1].quality.paired.frechet
    text = against.format_against(report)
    for part in (
        "| NFD, 2 steps (flow), 2 drawn jointly |",
        "Fréchet 6-75",
        "seed 0",
        "**autoregressive** against NFD, 2 steps (flow): ahead in",
        "- *drift*: ",
    ):
        assert part in text
    json.dumps(asdict(report))


def test_what_the_rival_is_ahead_in_is_said(
    rival_world: Path, long_recordings: RecordedDataset, quick: None
) -> None:
    world = load_world(rival_world, "cpu", "fp32")
    settings = replace(FEW, long_rollouts=0)
    report = against.measure_against(world, long_recordings, settings, None, 0.02, progress=False)
    rival, home = report.rows[-1], report.rows[report.home]
    faster = replace(rival, pace=replace(rival.pace, frames_per_second=1e9))
    worse = replace(home.quality, early=replace(home.quality.early, frechet=1e9))
    rows = [*report.rows[:-1], faster]
    rows[report.home] = replace(home, quality=worse)
    text = against.format_against(replace(report, rows=rows))
    line = next(x for x in text.splitlines() if x.startswith("**autoregressive, parallel**"))
    ahead, behind = line.split("behind in")
    assert "frames/s" in ahead and " Fréchet distance" in ahead
    assert "actions" not in line and "drift" not in text


def test_the_command(
    rival_world: Path,
    tiny_world: Path,
    long_recordings: RecordedDataset,
    tmp_path: Path,
    capsys: Any,
    quick: None,
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin eval-against -->\n<!-- end eval-against -->\n")
    arguments = ["--recordings", str(long_recordings.folder), "--windows", "2", "--seconds", "0.02"]
    arguments += ["--long-rollouts", "0", "--device", "cpu", "--precision", "fp32", "--against"]
    assert main(["eval", str(rival_world), *arguments, "--markdown-into", str(page)]) == 0
    assert "autoregressive, parallel" in page.read_text()
    assert main(["eval", str(tiny_world), *arguments]) == 1
    assert "nfd train-baseline" in capsys.readouterr().err
    assert main(["eval", str(rival_world), *arguments, "--steps", "1"]) == 1
    assert "leave out --dynamics, --steps" in capsys.readouterr().err
    assert main(["eval", str(rival_world), *arguments, "--long-frames", "7"]) == 1
    assert "long_frames must be above" in capsys.readouterr().err
