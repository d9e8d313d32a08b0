"""``nfd eval --against``: all ways of drawing a world's frames in one table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation import against, held_out, reports
from nfd_env.evaluation import evaluate as evaluating
from nfd_env.evaluation.clips import ClipDistance, ClipReport
from nfd_env.evaluation.held_out import EvaluationConfig
from nfd_env.evaluation.inverse_dynamics import InverseDynamics, InverseDynamicsConfig
from nfd_env.worlds.load import load_world
from tests.evaluation.conftest import long_recordings
from tests.tiny_world import DISCRETE

__all__ = ["long_recordings"]  # a fixture

# One window and one long rollout, as short as the distances of distributions allow.
FEW = EvaluationConfig(windows=1, long_rollouts=1, long_frames=67)


@pytest.fixture(scope="module")
def report(rival_world: Path, long_recordings: RecordedDataset) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(against, "_STEPS", (1,))
        for module in (held_out, evaluating, reports):
            for name, value in (("EARLY", 66), ("HORIZONS", (1, 8, 32))):
                patch.setattr(module, name, value, raising=False)
        world = load_world(rival_world, "cpu", "fp32")
        reader = InverseDynamics(InverseDynamicsConfig(DISCRETE, [32, 48], channels=2)).eval()
        yield against.measure_against(world, long_recordings, FEW, reader, 0.05, progress=False)


def test_one_table_of_all(
    report: against.AgainstReport, rival_world: Path, long_recordings: RecordedDataset
) -> None:
    assert [(row.name, row.passes) for row in report.rows] == [
        ("NFD, 2 steps (flow)", 2),
        ("NFD, 2 steps (flow), 2 drawn jointly", 2),
        ("NFD, 1 step (flow)", 1),
        ("NFD, 1 step (flow), 2 drawn jointly", 1),
        ("autoregressive", 6),
        ("autoregressive, parallel", 4),
    ]
    assert report.home == 0 and report.held_out.long_frames == 67
    for row in report.rows:
        assert row.pace.frames_per_second > 0 and row.quality.late is not None
        assert (row.actions is None) == ("jointly" in row.name)
    # A row is what the other measures say of it alone.
    rival = load_world(rival_world, "cpu", "fp32", "autoregressive_parallel")
    alone = evaluating.evaluate(rival, long_recordings, FEW, False)
    assert repr(alone.horizons) == repr(report.rows[-1].quality.horizons)  # with NaN
    assert alone.paired.frechet == report.rows[-1].quality.paired.frechet
    text = against.format_against(report)
    for part in (
        "| NFD, 2 steps (flow), 2 drawn jointly |",
        "Fréchet 2-67",
        "seed 0",
        "**autoregressive** against NFD, 2 steps (flow): ahead in",
        "- *drift*: ",
    ):
        assert part in text
    json.dumps(asdict(report))


def test_clips_have_a_column(report: against.AgainstReport) -> None:
    near, far = ClipDistance(0.125, 0.01, 0.1, 0.01), ClipDistance(2.5, 0.1, 2.4, 0.1)
    clips = ClipReport(16, near, near, near, far, far)
    rows = [
        replace(row, actions=row.actions and replace(row.actions, clips=clips))
        for row in report.rows
    ]
    text = against.format_against(replace(report, rows=rows))
    read = sum(row.actions is not None for row in rows)
    assert read == 4 and text.count("| 0.125 ± 0.010 |") == 1 + read
    assert "still 2.500 ± 0.100" in text and "not FVD" in text
    table = next(part for part in text.split("\n\n") if "| real frames |" in part)
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_what_a_rival_is_ahead_in_is_said(report: against.AgainstReport) -> None:
    rows = [
        replace(row, actions=None, quality=replace(row.quality, late=None)) for row in report.rows
    ]
    rival, home = rows[-1], rows[0]
    rows[-1] = replace(rival, pace=replace(rival.pace, frames_per_second=1e9))
    worse = replace(home.quality, early=replace(home.quality.early, frechet=1e9))
    rows[0] = replace(home, quality=worse)
    text = against.format_against(replace(report, rows=rows))
    line = next(x for x in text.splitlines() if x.startswith("**autoregressive, parallel**"))
    ahead, _, behind = line.partition("behind in")
    assert "frames/s" in ahead and " Fréchet distance" in ahead and "frames/s" not in behind
    assert "actions" not in line and "drift" not in text


def test_the_command(
    report: against.AgainstReport,
    rival_world: Path,
    tiny_world: Path,
    long_recordings: RecordedDataset,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin eval-against -->\n<!-- end eval-against -->\n")
    arguments = ["--recordings", str(long_recordings.folder), "--device", "cpu", "--against"]
    assert main(["eval", str(tiny_world), *arguments]) == 1
    assert "nfd train-baseline" in capsys.readouterr().err
    for wrong, reason in (
        (["--steps", "1"], "leave out --dynamics, --steps"),
        (["--dynamics", "flow"], "leave out --dynamics, --steps"),
        (["--long-frames", "7"], "long_frames must be above"),
        (["--seconds", "0"], "--seconds must be above 0"),
    ):
        assert main(["eval", str(rival_world), *arguments, *wrong]) == 1
        assert reason in capsys.readouterr().err
    monkeypatch.setattr(against, "measure_against", lambda *given: report)
    assert main(["eval", str(rival_world), *arguments, "--markdown-into", str(page)]) == 0
    assert "autoregressive, parallel" in page.read_text()
