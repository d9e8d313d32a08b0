"""``nfd eval --against``: a world's own dynamics and its rivals, on one machine in one run.

The same held-out windows, actions and episode seeds for all of them; speed in turns, a short slice
each, so that whatever else the machine is doing hits all alike.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import nfd_env
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation.benchmark import make_env
from nfd_env.evaluation.clips import ActionReport, clip_number, clips_sentence, measure_actions
from nfd_env.evaluation.compare import (
    BASELINE_STEPS,
    FEW,
    Conditions,
    Figures,
    Runner,
    conditions,
    heading,
    take_turns,
)
from nfd_env.evaluation.evaluate import evaluate_worlds, with_steps
from nfd_env.evaluation.held_out import HORIZONS, EvaluationConfig
from nfd_env.evaluation.inverse_dynamics import InverseDynamics
from nfd_env.evaluation.reports import (
    FIRST,
    HeldOutReport,
    RowReport,
    distance,
    floor_of,
    last_frames,
    notes,
    number,
    source,
)
from nfd_env.evaluation.tables import table
from nfd_env.worlds.load import World, load_world
from nfd_env.worlds.rivals import RIVALS, rivals_of

_STEPS = (BASELINE_STEPS, 4, 2, 1)
_DRAFTS = 2  # jointly drawn frames; best in the paper, arXiv 2506.01380
_NEAR, _FAR = HORIZONS[1:3]  # frames ahead

_READING = {
    "frames/s": (
        "Frames that one env draws and decodes in a second, one after the other, while keys are "
        "held for 5 to 20 frames. A game is playable at its own frame rate or above."
    ),
    "PSNR and SSIM": (
        "How near a frame is, pixel by pixel, to the one recorded after the same actions; more is "
        "better. They punish a world for guessing other than what happened, so that some frames "
        "ahead a blurred picture scores best: read them beside the sharpness."
    ),
    "Fréchet distance": (
        "How far the frames as a whole are from real ones, whichever happened when; less is "
        "better, and the row of real frames is what a perfect world reaches. The paired one tells "
        "models apart best."
    ),
    "sharpness": (
        "Gradients over those of real frames; good is near 1. Below, pictures are blurred, above "
        "there is noise or there are things that are not in the game."
    ),
    "actions": (
        "How well a net that was trained on real play reads the action from the frames, and in "
        "brackets over what it reads from real frames passed through the tokenizer. 0.95 of that "
        "or more: keys do what they do in the game."
    ),
    "clips": (
        "A Fréchet distance again, but of clips of 16 frames as that net sees them, so that it "
        "tells how things move: frames that are right one by one but follow one another wrongly "
        "are far. Good is as near as re-encoded real clips; a still picture is what is far."
    ),
    "drift": (
        "The same Fréchet distance and sharpness at the end of rollouts as long as a game. A world "
        "that stays itself is as good there as in its first frames."
    ),
}


@dataclass(frozen=True)
class AgainstRow:
    """One way of drawing frames: how fast and how good it is.

    ``parameters`` are those of the dynamics alone; ``actions`` is None without a net that reads
    them, and for frames that are drawn jointly.
    """

    name: str
    passes: int
    parameters: int
    pace: Figures
    quality: RowReport
    actions: ActionReport | None


@dataclass(frozen=True)
class AgainstReport:
    """What ``measure_against`` found; ``home`` is the row drawn as the world is by default."""

    conditions: Conditions
    held_out: HeldOutReport
    rows: list[AgainstRow]
    home: int
    seed: int
    nfd_env: str
    python: str
    minutes: float


@dataclass(frozen=True)
class _Way:
    world: World
    frames: int

    @property
    def name(self) -> str:
        world = self.world
        if world.dynamics in RIVALS:
            return world.dynamics.replace("_", ", ")
        steps = world.model.sampling.steps
        drafts = f", {self.frames} drawn jointly" if self.frames > 1 else ""
        return f"NFD, {steps} step{'s' * (steps > 1)} ({world.dynamics}){drafts}"


def measure_against(
    world: World,
    recordings: RecordedDataset,
    settings: EvaluationConfig,
    reader: InverseDynamics | None = None,
    seconds: float = 5.0,
    progress: bool = True,
) -> AgainstReport:
    """Compare a world's dynamics, in many steps and few, with and without drafts, with its rivals.

    Args:
        world: the world, drawn by default.
        recordings: of its game.
        settings: how frames are judged, but for its number of steps and of joint frames.
        reader: the net that reads actions back; None to leave them out.
        seconds: that each is timed for.
        progress: show progress bars.

    Raises:
        ValueError: when there is no rival; see also ``evaluate_worlds``.
    """
    began = time.monotonic()
    ways = _ways(world)
    home = next(
        place
        for place, way in enumerate(ways)
        if (way.world.dynamics, way.world.model.sampling) == (world.dynamics, world.model.sampling)
    )
    drawn = [(way.world, way.frames) for way in ways]
    judged = evaluate_worlds(drawn, recordings, settings, home, progress)
    read: list[ActionReport | None] = [None] * len(ways)
    if reader is not None:
        rollouts = max(2, settings.windows)
        read = [
            measure_actions(
                way.world, recordings, reader, rollouts, seed=settings.seed, progress=progress
            )
            if way.frames == 1
            else None
            for way in ways
        ]
    runners = []
    for way in ways:
        rival = way.world.dynamics in RIVALS
        env = make_env(
            way.world,
            1,
            "rgb",
            sampling_steps=None if rival else way.world.model.sampling.steps,
            speculative_frames=way.frames,
        )
        runners.append(Runner(env, "held keys"))
    take_turns([runner.step for runner in runners], seconds)
    rows = [
        AgainstRow(
            way.name,
            way.world.model.sampling.steps,
            sum(p.numel() for p in way.world.model.dynamics.parameters()),
            runner.figures(),
            quality,
            actions,
        )
        for way, runner, quality, actions in zip(ways, runners, judged.rows, read, strict=True)
    ]
    about = {name: getattr(judged, name) for name in HeldOutReport.__dataclass_fields__}
    return AgainstReport(
        conditions(world, 1, seconds, "rgb"),
        HeldOutReport(**about),
        rows,
        home,
        settings.seed,
        nfd_env.__version__,
        platform.python_version(),
        (time.monotonic() - began) / 60,
    )


def _ways(world: World) -> list[_Way]:
    """The rows of the table."""
    rivals = list(rivals_of(world.folder))
    if not rivals:
        raise ValueError(
            f"{world.spec.name} has no rival to be compared with: nfd train-baseline trains one in "
            "the run that made it"
        )

    def loaded(dynamics: str) -> World:
        return load_world(world.folder, world.model.device, world.model.precision, dynamics)

    many = "teacher" if world.spec.teacher is not None else world.dynamics
    own = world.model.sampling.steps
    ways = []
    for steps in sorted({*_STEPS, own}, reverse=True):
        dynamics = world.dynamics if steps <= FEW or steps == own else many
        if dynamics == "student" and steps > FEW and steps != own:
            continue  # a student of another sampler is nothing that the paper compares
        drawn = with_steps(loaded(dynamics), steps)
        ways.append(_Way(drawn, 1))
        if steps <= FEW and drawn.model.most_frames >= _DRAFTS:
            ways.append(_Way(drawn, _DRAFTS))
    return [*ways, *(_Way(loaded(name), 1) for name in rivals)]


def format_against(report: AgainstReport) -> str:
    """The report as Markdown."""
    held, rows = report.held_out, report.rows
    long = any(row.quality.late is not None for row in rows)
    speed = [
        [
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            str(row.passes),
            f"{row.pace.frames_per_second:.1f}",
            f"{row.pace.p50_ms:.1f} / {row.pace.p95_ms:.1f}",
            f"{row.pace.frames_per_second / rows[report.home].pace.frames_per_second:.2f}×",
        ]
        for row in rows
    ]
    columns = ["drawn by", "parameters", "passes a frame", "frames/s", "p50 / p95 ms"]
    near = [["frozen frame", *_frozen(rows[0].quality)]]
    near += [[row.name, *_near(row.quality)] for row in rows]
    ahead = list(rows[0].quality.horizons)
    pixels = [f"{name} {frame}" for frame in ahead for name in ("PSNR", "SSIM")]
    last = last_frames(held) if long else ""
    read = [row.actions for row in rows if row.actions is not None]
    passed = f"{read[0].reencoded:.3f} (1)" if read else ""
    whole = ["real frames", floor_of(held, "early"), floor_of(held, "paired"), "1", passed]
    seen = read[0].clips if read else None
    whole.append("" if seen is None else clip_number(seen.real.frechet, seen.real.frechet_error))
    whole += [floor_of(held, "late"), "1"] if long else []
    named = [f"Fréchet {FIRST}", f"paired Fréchet {FIRST}", f"sharpness {_FAR}"]
    named += ["actions (over re-encoded)", "clips"]
    named += [f"Fréchet {last}", f"sharpness {last}"] if long else []
    lines = [
        f"{heading(report.conditions)}; nfd_env {report.nfd_env}, Python {report.python}, seed "
        f"{report.seed}; {report.minutes:.0f} minutes in all. {source(held)}.",
        "",
        table([*columns, f"over {rows[report.home].name}"], speed),
        "",
        table(["frames ahead", *pixels], near),
        "",
        table(["drawn by", *named], [whole, *(_whole(row, long) for row in rows)]),
        "",
        *_ahead_of(report),
        "",
        *(f"- *{name}*: {text}" for name, text in _READING.items() if long or name != "drift"),
        "",
        f"In brackets: over {rows[report.home].name}. {notes(held, long)}",
    ]
    if read:
        most = max(read, key=lambda actions: actions.shuffled)
        lines[-1] += (
            f" Actions: {read[0].metric} of {read[0].windows:,} windows of rollouts of "
            f"{read[0].horizon} frames. Of frames drawn under other actions it is at most "
            f"{most.shuffled:.3f}, by chance {most.chance:.3f}."
        )
    if seen is not None:
        far = {"re-encoded": seen.reencoded, "still": seen.frozen, "shuffled": seen.scrambled}
        told = [f"{x} {clip_number(row.frechet, row.frechet_error)}" for x, row in far.items()]
        lines[-1] += f" Clips, real ones: {', '.join(told)}. {clips_sentence(seen)}"
    return "\n".join(lines)


def _frozen(quality: RowReport) -> list[str]:
    return [
        cell
        for figures in quality.horizons.values()
        for cell in (f"{figures.psnr_frozen:.2f}", f"{figures.ssim_frozen:.3f}")
    ]


def _near(quality: RowReport) -> list[str]:
    return [
        cell
        for figures in quality.horizons.values()
        for cell in (
            number(figures.psnr, figures.psnr_error, 2),
            number(figures.ssim, figures.ssim_error, 3),
        )
    ]


def _whole(row: AgainstRow, long: bool) -> list[str]:
    quality, actions = row.quality, row.actions
    cells = [row.name, distance(quality.early), distance(quality.paired)]
    cells.append(f"{quality.horizons[_FAR].sharpness_ratio:.2f}")
    cells.append("" if actions is None else f"{actions.generated:.3f} ({actions.relative:.2f})")
    clips = None if actions is None or actions.clips is None else actions.clips.generated
    cells.append("" if clips is None else clip_number(clips.frechet, clips.frechet_error))
    if quality.late is not None:
        cells += [distance(quality.late), f"{quality.late.sharpness_ratio:.2f}"]
    return cells + [""] * (2 * (long and quality.late is None))


def _compared(rows: Sequence[AgainstRow]) -> dict[str, Callable[[AgainstRow], float]]:
    """What counts, each so that more is better."""

    def late(row: AgainstRow) -> float:
        return -row.quality.late.frechet if row.quality.late else math.nan

    figures: dict[str, Callable[[AgainstRow], float]] = {
        "frames/s": lambda row: row.pace.frames_per_second,
        **{
            f"{name} at frame {frame}": lambda row, frame=frame, name=name: getattr(
                row.quality.horizons[frame], name.lower()
            )
            for frame in (_NEAR, _FAR)
            for name in ("PSNR", "SSIM")
        },
        "Fréchet distance": lambda row: -row.quality.early.frechet,
        "paired Fréchet distance": lambda row: -row.quality.paired.frechet,
        f"sharpness at frame {_FAR}": lambda row: (
            -abs(math.log(max(1e-9, row.quality.horizons[_FAR].sharpness_ratio)))
        ),
        "actions": lambda row: row.actions.relative if row.actions else math.nan,
        "clips": lambda row: (
            -row.actions.clips.generated.frechet if row.actions and row.actions.clips else math.nan
        ),
        "Fréchet distance at the end": late,
    }
    return {
        name: figure
        for name, figure in figures.items()
        if not all(math.isnan(figure(row)) for row in rows)
    }


def _ahead_of(report: AgainstReport) -> list[str]:
    """In what each rival is ahead of the world as it is drawn by default, and in what behind."""
    mine = report.rows[report.home]
    lines = []
    for row in report.rows:
        if row.quality.dynamics not in RIVALS:
            continue
        better, worse = [], []
        for name, figure in _compared([mine, row]).items():
            (better if figure(row) > figure(mine) else worse).append(name)
        lines.append(
            f"**{row.name}** against {mine.name}: ahead in {', '.join(better) or 'nothing'}; "
            f"behind in {', '.join(worse) or 'nothing'}."
        )
    return lines
