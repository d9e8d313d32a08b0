from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env.cli import main
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation import evaluate as module
from nfd_env.evaluation.evaluate import evaluate, evaluate_drafts, evaluate_steps
from nfd_env.evaluation.held_out import EvaluationConfig, HeldOut
from nfd_env.evaluation.reports import format_report, format_rows
from nfd_env.inference.state import Transition, WorldState
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import load_world
from tests.counter_env import read

SMALL: dict[str, Any] = {
    "settings": EvaluationConfig(windows=4, long_rollouts=1),
    "progress": False,
}
QUICK: dict[str, Any] = {**SMALL, "settings": EvaluationConfig(windows=4, long_rollouts=0)}

pytestmark = pytest.mark.usefixtures("short")


def test_steps_are_compared_on_the_same_windows(
    distilled_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(distilled_world, "cpu", "fp32")
    report = evaluate_steps(world, long_recordings, [1, 5], **SMALL)
    rows = report.rows
    assert [(r.dynamics, r.sampling_steps) for r in rows] == [
        ("student", 1),
        ("teacher", 1),
        ("teacher", 5),
    ]
    assert report.reference == 2
    for when in ("early", "paired", "late"):
        mine, best = getattr(rows[0], when), getattr(rows[2], when)
        ratio = mine.frechet / best.frechet
        assert mine.over_reference == pytest.approx(ratio)
        assert best.over_reference == 1
    assert (rows[0].early.over_reference_error or 0) > 0 == rows[2].early.over_reference_error
    assert rows[0].late is not None and math.isnan(
        rows[0].late.frechet_error
    )  # of a single rollout
    # What does not depend on the model says that the windows are the same.
    for name in ("psnr_frozen", "ssim_frozen", "moving_psnr_frozen"):
        assert len({getattr(r.horizons[8], name) for r in rows}) == 1
    assert len({r.horizons[8].psnr for r in rows}) == 3
    alone = evaluate(world, long_recordings, EvaluationConfig(4, 1, sampling_steps=1), False)
    assert alone.horizons == rows[0].horizons
    assert alone.late is not None and alone.late.frechet == rows[0].late.frechet
    text = format_rows(report)
    psnr = rows[0].horizons[8]
    cell = f"| {psnr.psnr:.2f} ± {psnr.psnr_error:.2f} |"
    for part in ("| 1 (student, consistency) |", "| 5 (teacher, euler) |", "(1.00×)", cell):
        assert part in text
    json.dumps(asdict(report))


def test_a_world_with_one_network(tiny_world: Path, long_recordings: RecordedDataset) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    report = evaluate_steps(world, long_recordings, [2, 1], **QUICK)
    assert [(r.dynamics, r.sampling_steps) for r in report.rows] == [
        ("flow", 2),
        ("flow", 1),
    ]
    assert report.reference == 0 and "sharpness" not in format_rows(report)


def test_long_rollouts_of_some_rows(
    tiny_world: Path, long_recordings: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    measured: list[tuple[str, int]] = []
    for name in ("measure_windows", "measure_drift"):
        method = getattr(module._Row, name)

        def noted(self: Any, *args: Any, name: str = name, method: Any = method) -> None:
            measured.append((name, self.model.sampling.steps))
            method(self, *args)

        monkeypatch.setattr(module._Row, name, noted)
    report = evaluate_steps(world, long_recordings, [1, 2, 3], long_steps=[1, 2], **SMALL)
    # What is cheap comes first.
    assert measured == [
        *[("measure_windows", n) for n in (1, 2, 3)],
        *[("measure_drift", n) for n in (1, 2)],
    ]
    assert [row.late is not None for row in report.rows] == [True, True, False]
    assert report.reference == 2  # has no long rollouts for others to be related to
    late = report.rows[0].late
    assert late is not None and late.over_reference is None
    assert "| not run |" in format_rows(report)
    with pytest.raises(ValueError, match=r"long rollouts were asked for at \[4\] steps"):
        evaluate_steps(world, long_recordings, [1, 2], long_steps=[1, 4], **SMALL)


class Replay(WorldModel):
    """Shows what was recorded: the latents of the windows' frames, one after the other."""

    frames: torch.Tensor

    def step(self, state: WorldState, actions: torch.Tensor, sampling: Any = None) -> Transition:
        frame = state.frame[0]
        state.cache.length = state.cache.length + 1
        none = torch.zeros(len(actions))
        shown = self.frames[:, frame + 1 - self.dynamics.config.window]
        return Transition(shown, none, none.bool(), none, state.memory)


def test_a_perfect_world_reaches_the_floor(
    tiny_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    held = HeldOut.prepare(world, long_recordings, EvaluationConfig(5, 0))
    parts = (world.model.tokenizer, world.model.dynamics, world.model.heads, world.model.sampling)
    replay = Replay(*parts)
    _, steps = read(held.horizons[1].frames)
    first = [
        held.encoded.number(int(e), int(s)) for e, s in zip(held.windows.groups, steps, strict=True)
    ]
    replay.frames = torch.stack([held.encoded.latents(range(n, n + 70)) for n in first])
    row = module._Row(world, replay, 1)
    row.measure_windows(held, 0, False)
    early = row.report().early
    assert early.frechet == pytest.approx(held.early_floor.value)
    assert early.frechet_error == pytest.approx(held.early_floor.error)
    assert row.report().paired.frechet == pytest.approx(0, abs=1e-6)
    assert early.bright_ratio == pytest.approx(1)
    assert all(h.bright_ratio == pytest.approx(1) for h in row.horizons.values())


def test_what_moves_and_what_stands_out(tiny_world: Path, long_recordings: RecordedDataset) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    held = HeldOut.prepare(world, long_recordings, EvaluationConfig(5, 0))
    horizon, groups = held.horizons[8], held.windows.groups
    perfect = horizon.errors(horizon.frames, groups)
    assert perfect.moving_psnr == math.inf and perfect.standing_ratio == 1
    assert perfect.gradient_correlation == pytest.approx(1)
    # What does not move is no merit: here nothing else is wrong.
    moved = horizon.moved[..., None]
    assert 0 < moved.mean() < 0.5
    off = np.where(moved, horizon.frames ^ 16, horizon.frames)
    wrong = horizon.errors(off, groups)
    assert wrong.moving_psnr == pytest.approx(20 * math.log10(255 / 16)) and wrong.psnr > 26
    # A world in which everything has faded into the background.
    faded = horizon.errors(horizon.background, groups)
    assert faded.standing_ratio == 0 and faded.moving_psnr < 20
    noisy = np.random.default_rng(0).integers(0, 256, horizon.frames.shape, np.uint8)
    noise = horizon.errors(noisy, groups)
    assert noise.sharpness_ratio > 1 and noise.standing_ratio > 1
    assert abs(noise.gradient_correlation) < 0.1


def test_jointly_drawn_frames_are_compared(
    endless_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(endless_world, "cpu", "fp32")
    report = evaluate_drafts(world, long_recordings, [1, 3], **QUICK)
    plain, drafted = report.rows
    assert [r.speculative_frames for r in report.rows] == [1, 3]
    assert plain.early.over_reference == 1
    # The first frame of a joint draw is the one that is drawn alone.
    first = asdict(drafted.horizons[1])
    assert first == pytest.approx(asdict(plain.horizons[1]), rel=1e-3)
    assert drafted.horizons[32].psnr != plain.horizons[32].psnr
    # Actions are held for 1 to 4 frames: many of the frames that may be drawn ahead are not.
    assert drafted.drawn_ahead is not None and 0.1 < drafted.drawn_ahead < 2 / 3
    assert plain.drawn_ahead is None
    text = format_rows(report)
    assert "| sampling steps | n | drawn ahead |" in text
    assert f"| 3 | {drafted.drawn_ahead:.2f} |" in text and "| 1 | 0.00 |" in text
    for wrong, message in (([], "no numbers"), ([1, 0], "speculative_frames must be")):
        with pytest.raises(ValueError, match=message):
            evaluate_drafts(world, long_recordings, wrong, **QUICK)


def test_one_report_of_jointly_drawn_frames(
    endless_world: Path, long_recordings: RecordedDataset
) -> None:
    world = load_world(endless_world, "cpu", "fp32")
    joint = EvaluationConfig(4, 0, speculative_frames=3)
    report = evaluate(world, long_recordings, replace(joint, sampling_steps=2), False)
    drafts = evaluate_drafts(
        world, long_recordings, [3], EvaluationConfig(4, 0, sampling_steps=2), False
    )
    assert report.early.frechet == drafts.rows[0].early.frechet
    text = format_report(report)
    assert "up to 3 frames drawn jointly" in text and "deaths recorded" in text
    steps = evaluate_steps(world, long_recordings, [2], joint, progress=False)
    assert steps.rows[0].early.frechet == report.early.frechet
    assert "up to 3 frames drawn jointly" in format_rows(steps)


@pytest.mark.parametrize("steps", [[], [0], [2, -1]])
def test_steps_out_of_range(
    steps: list[int], tiny_world: Path, long_recordings: RecordedDataset
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_steps(load_world(tiny_world, "cpu", "fp32"), long_recordings, steps, **SMALL)


def test_the_commands(
    distilled_world: Path,
    long_recordings: RecordedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = tmp_path / "README.md"
    names = ("eval-steps", "eval-drafts")
    document.write_text("".join(f"<!-- begin {n} -->\n<!-- end {n} -->\n" for n in names))
    command = ["eval", str(distilled_world), "--recordings", str(long_recordings.folder)]
    command += ["--windows", "2", "--long-rollouts", "1", "--precision", "fp32"]
    command += ["--markdown-into", str(document)]
    assert main([*command, "--json", "--steps", "1", "2", "--long-steps", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["late"] is not None for row in rows] == [True, False, True, False]
    assert "| 2 (teacher, euler) |" in document.read_text()
    assert main([*command, "--compare-drafts", "1", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| 1 (student, consistency) | 2 |" in printed and printed.strip() in document.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--long-steps", "1"], "--long-steps chooses among --steps"),
        (["eval", "--steps", "1", "--sampling-steps", "2"], "leave out --sampling-steps"),
        (["eval", "--save-clips", "x", "--speculative-frames", "2"], "drawn one by one"),
        (["eval", "--inverse-dynamics", "x", "--speculative-frames", "2"], "drawn one by one"),
        (["bench", "--compare", "--sampling-steps", "2"], "leave out --sampling-steps"),
        (["bench", "--compare", "--batches", "2"], "leave out --speculative-frames and --batches"),
        (["bench", "--frame-skip", "2", "--speculative-frames", "2"], "leave out --speculative"),
        (["bench", "--num-envs", "8"], "--batches says"),
        (["bench", "--obs-type", "latent"], "are of --compare and --frame-skip"),
        (
            ["eval", "--compare-drafts", "1", "2", "--speculative-frames", "2"],
            "--compare-drafts says itself",
        ),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_arguments_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--steps", "1", "two"])
    assert "two" in capsys.readouterr().err
    assert main(["eval", "--steps", "1", "--compare-drafts", "1"]) == 1
    assert "not both" in capsys.readouterr().err
