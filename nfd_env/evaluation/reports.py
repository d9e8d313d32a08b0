"""What ``nfd eval`` measured: the values, and Markdown that says what each figure is."""

from __future__ import annotations

from dataclasses import dataclass

from nfd_env.evaluation.clips import ActionReport, format_actions
from nfd_env.evaluation.endings import EARLIER, LATER, ReplayedEndings
from nfd_env.evaluation.held_out import (
    BRIGHT,
    EARLY,
    HORIZONS,
    REFERENCE,
    HorizonErrors,
)
from nfd_env.evaluation.tables import table, told

FIRST = f"1-{EARLY}"
_BRIGHT_NOTE = (
    f"Bright pixels: as many as are brighter than {BRIGHT:g} % of the pixels of real frames, "
    "relative to how many real frames have (of the same windows where there are such, else random "
    "ones), both as the tokenizer decodes them; rare bright details are lost first."
)
_HORIZONS_NOTE = (
    "A world should stay above the frozen frame, the last one that was shown, also at the pixels "
    "that moved since, which are what a game is about. Sharpness (gradient energy) and standing "
    "things (pixels that stand out from the still background, where the camera does not move) are "
    "relative to real frames: below 1 they fade, above 1 they are invented or noise, and then the "
    "correlation of generated with real gradients falls."
)
_ERROR_NOTE = (
    "±: standard errors, by the jackknife that leaves out all windows of one episode at a time"
)

_RATIOS = {
    "bright_ratio": "bright pixels",
    "sharpness_ratio": "sharpness",
    "spread_ratio": "latent spread",
}
_ENDS = {
    "deaths": "deaths recorded",
    "expected_deaths": "deaths expected (sum of the hazard)",
    "drawn_precision_within_2": "precision of drawn deaths, within 2 frames",
    "drawn_recall_within_2": "recall of drawn deaths, within 2 frames",
    "log_loss_over_constant": "log loss, relative to the constant true rate",
    "reward_absolute_error": "mean absolute reward error",
}


@dataclass(frozen=True)
class Distribution:
    """A Fréchet distance with its standard error, and ratios of generated to real frames.

    ``over_reference`` relates the distance to the reference row's. None: not measured.
    """

    frechet: float
    frechet_error: float
    bright_ratio: float | None = None
    sharpness_ratio: float | None = None
    spread_ratio: float | None = None
    over_reference: float | None = None
    over_reference_error: float | None = None


@dataclass(frozen=True)
class Floor:
    """The Fréchet distances of real frames, which a perfect world reaches.

    Of ``late`` it is the mean of random sets of real stretches, with its standard deviation.
    """

    early: Distribution
    late: Distribution | None


@dataclass(frozen=True, kw_only=True)
class HeldOutReport:
    """The world, and the held-out recordings that it was judged by."""

    world: str
    windows: int
    long_rollouts: int
    long_frames: int
    held_out_episodes: int
    held_out_frames: int
    bright_threshold: float
    floor: Floor


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """One way of drawing frames.

    Attributes:
        dynamics: "flow", "student" or "teacher".
        sampler: its name.
        sampling_steps: denoising steps a frame.
        speculative_frames: 1 for none drawn jointly.
        horizons: by the number of frames ahead.
        early: the windows' first frames, against random ones.
        paired: the same against those recorded in the same windows.
        late: the last frames of the long rollouts; None without any.
        drawn_ahead: share of the windows' frames drawn before their action was known; None without
            speculation.
    """

    dynamics: str
    sampler: str
    sampling_steps: int
    speculative_frames: int
    horizons: dict[int, HorizonErrors]
    early: Distribution
    paired: Distribution
    late: Distribution | None
    drawn_ahead: float | None


@dataclass(frozen=True)
class EndsReport:
    """How the heads fare on recorded frames; ``drawn_``: ends drawn as the env draws them."""

    deaths: float
    expected_deaths: float
    drawn_precision_within_2: float
    drawn_recall_within_2: float
    log_loss_over_constant: float
    reward_absolute_error: float


@dataclass(frozen=True, kw_only=True)
class WorldReport(RowReport, HeldOutReport):
    """What ``evaluate`` found; ``actions`` where there is a net that reads them."""

    ends: EndsReport
    replayed: ReplayedEndings
    actions: ActionReport | None = None


@dataclass(frozen=True, kw_only=True)
class RowsReport(HeldOutReport):
    """What ``evaluate_steps`` and ``evaluate_drafts`` found; ``reference`` numbers a row."""

    reference: int
    rows: list[RowReport]


def format_report(report: WorldReport) -> str:
    """The report of ``evaluate``."""
    rows = [
        [
            str(horizon),
            number(row.psnr, row.psnr_error, 2),
            f"{row.psnr_frozen:.2f}",
            f"{row.moving_psnr:.2f}",
            f"{row.moving_psnr_frozen:.2f}",
            number(row.ssim, row.ssim_error, 3),
            f"{row.ssim_frozen:.3f}",
            f"{row.sharpness_ratio:.2f}",
            f"{row.gradient_correlation:.2f}",
            f"{row.standing_ratio:.2f}",
            f"{row.bright_ratio:.2f}",
        ]
        for horizon, row in report.horizons.items()
    ]
    header = ["frames ahead", "PSNR", "frozen frame's PSNR", "moving pixels' PSNR"]
    header += ["frozen frame's at them", "SSIM", "frozen frame's SSIM", "sharpness"]
    header += ["gradient correlation", "standing things", "bright pixels"]
    drawn = f"{report.world} ({report.dynamics}), {report.sampling_steps} sampling steps"
    ends = [[label, told(getattr(report.ends, name), ".3f")] for name, label in _ENDS.items()]
    lines = [
        f"{drawn}{_drafted(report)}: {source(report)}",
        "",
        table(header, rows),
        "",
        _HORIZONS_NOTE,
        "",
        table(
            ["frames", "Fréchet distance", "the same of real frames", *_RATIOS.values()],
            _frechet(report),
        ),
        "",
        notes(report, report.late is not None),
        "",
        table(["reward and termination on held-out frames", ""], ends),
    ]
    if report.actions is not None:
        lines += ["", format_actions(report.actions)]
    if report.replayed.episodes:
        lines += ["", *_replayed(report.replayed)]
    return "\n".join(lines)


def _replayed(report: ReplayedEndings) -> list[str]:
    rows = []
    for ahead, row in report.ahead.items():
        shares = (row.there, row.recorded_there, row.before, row.recorded_before)
        rows.append([str(ahead), *(f"{share:.2f}" for share in shares)])
    header = ["frames before the end", "ends there", "heads on recorded frames", "ends before"]
    return [
        f"Ends of {report.episodes} held-out episodes played again in the world, with the "
        f"actions taken: probabilities that it ends them there, from {EARLIER} frames before to "
        f"{LATER} after, or before.",
        "",
        table([*header, "heads on recorded frames"], rows),
    ]


def _frechet(report: WorldReport) -> list[list[str]]:
    rows = []
    late = last_frames(report)
    for when, frames in (("early", FIRST), ("paired", f"{FIRST}, paired"), ("late", late)):
        row: Distribution | None = getattr(report, when)
        if row is not None:
            found = [getattr(row, name) for name in _RATIOS]
            ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in found]
            distance = number(row.frechet, row.frechet_error, 1)
            rows.append([frames, distance, floor_of(report, when), *ratios])
    return rows


def format_rows(report: RowsReport) -> str:
    """The report of ``evaluate_steps`` or ``evaluate_drafts``."""
    rows = report.rows
    near, far = HORIZONS[1:3]
    long = any(row.late is not None for row in rows)
    drafts = len({row.speculative_frames for row in rows}) > 1
    header = ["sampling steps", *(["n", "drawn ahead"] if drafts else [])]
    first = len(header)
    header += [f"{name}, frame {frame}" for frame in (near, far) for name in ("PSNR", "SSIM")]
    header += [f"{name} {FIRST}" for name in ("Fréchet", "paired Fréchet", "bright")]
    if long:
        header += [f"{name} {last_frames(report)}" for name in ("Fréchet", "bright", "sharpness")]
    real = ["real frames"] + [""] * (first + 3)
    real += [floor_of(report, "early"), floor_of(report, "paired"), "1"]
    if long:
        real += [floor_of(report, "late"), "1", "1"]
    cells = [_cells(row, drafts, long, (near, far)) for row in rows]
    best = rows[report.reference]
    steps = f"{best.sampling_steps} steps of the {best.dynamics} model"
    relative = f"n = {best.speculative_frames}" if drafts else steps
    about = "" if drafts else _drafted(rows[0])
    lines = [
        f"{report.world}{about}: {source(report)}",
        "",
        table(header, [real, *cells]),
        "",
        f"In brackets: relative to {relative}, with the error of the ratio, in which what both "
        f"share cancels. {notes(report, long)}",
    ]
    if drafts:
        lines[-1] += (
            " n: frames that are drawn jointly where the action is kept; drawn ahead: the share of "
            "the windows' frames that were, before their action was known."
        )
    return "\n".join(lines)


def _cells(row: RowReport, drafts: bool, long: bool, horizons: tuple[int, int]) -> list[str]:
    cells = [f"{row.sampling_steps} ({row.dynamics}, {row.sampler})"]
    if drafts:
        cells += [str(row.speculative_frames), f"{row.drawn_ahead or 0:.2f}"]
    for horizon in horizons:
        figures = row.horizons[horizon]
        cells.append(number(figures.psnr, figures.psnr_error, 2))
        cells.append(number(figures.ssim, figures.ssim_error, 3))
    cells += [distance(row.early), distance(row.paired), f"{row.early.bright_ratio:.2f}"]
    if row.late is not None:
        late = row.late
        cells += [distance(late), f"{late.bright_ratio:.2f}", f"{late.sharpness_ratio:.2f}"]
    elif long:
        cells += ["not run", "", ""]
    return cells


def distance(row: Distribution) -> str:
    """A Fréchet distance with its error, and relative to the reference row's."""
    cell = number(row.frechet, row.frechet_error, 1)
    if row.over_reference is not None:
        cell += f" ({number(row.over_reference, row.over_reference_error, 2)}×)"
    return cell


def floor_of(report: HeldOutReport, when: str) -> str:
    """That of real frames: "early", "paired" or "late"."""
    floor = None if when == "paired" else getattr(report.floor, when)
    return number(floor.frechet, floor.frechet_error, 1) if floor else "0"


def number(value: float, error: float | None, digits: int) -> str:
    """A figure and its error, where there is one: none of one group, or of what is 1 for sure."""
    text = f"{value:.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if error is not None and error > 0 else text


def last_frames(report: HeldOutReport) -> str:
    """Numbers of the frames that long rollouts are judged by."""
    return f"{report.long_frames - EARLY + 1:,}-{report.long_frames:,}"


def source(report: HeldOutReport) -> str:
    """What it was judged by."""
    return (
        f"{report.windows} windows of {max(*HORIZONS, EARLY)} frames, conditioned on their "
        f"actions, from {report.held_out_episodes} held-out episodes "
        f"({report.held_out_frames:,} frames)"
    )


def notes(report: HeldOutReport, long: bool) -> str:
    """What Fréchet distances, errors and bright pixels are; ``long``: of long rollouts too."""
    frames = min(REFERENCE, report.held_out_frames)
    note = (
        f"Fréchet distances of tokenizer latents to {frames:,} random held-out frames. Frames "
        f"{FIRST} are the windows'; the distance of real frames is that of the very frames that "
        "were recorded in these windows, encoded, and so what this many windows leave to a perfect "
        "world. Paired: to these recorded frames instead, as FVD in the literature relates "
        "generated clips to real ones; where the players stood cancels, so that it tells models "
        f"apart best, but no world that has to guess comes to 0. {_ERROR_NOTE}"
    )
    if long:
        note += (
            f", or one of the {report.long_rollouts} rollouts of {report.long_frames:,} frames "
            f"behind {last_frames(report)}. Real frames there: random sets of "
            f"{report.long_rollouts} stretches of {EARLY} consecutive recorded frames, from "
            "anywhere in their episodes, for few episodes are that long: mean and standard "
            "deviation of such sets"
        )
    return f"{note}. {_BRIGHT_NOTE}"


def _drafted(report: RowReport) -> str:
    frames = report.speculative_frames
    return f", up to {frames} frames drawn jointly" if frames > 1 else ""
