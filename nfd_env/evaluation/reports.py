"""What ``nfd eval`` measured, as Markdown that says what each figure is."""

from __future__ import annotations

from typing import Any

from nfd_env.evaluation.endings import EARLIER, LATER
from nfd_env.evaluation.held_out import BRIGHT, EARLY, HORIZONS, LONG, REFERENCE
from nfd_env.evaluation.inverse_dynamics import ActionReport, format_actions
from nfd_env.evaluation.tables import table

_FIRST, _LAST = f"1-{EARLY}", f"{LONG - EARLY + 1:,}-{LONG:,}"
_BRIGHT_NOTE = (
    f"Bright pixels: as many as are brighter than {BRIGHT:g} % of the pixels of real frames, "
    "relative to how many real frames have (of the same windows where there are such, else random "
    "ones), both as the tokenizer decodes them; rare bright details are lost first."
)
_ERROR_NOTE = (
    "±: standard errors, by the jackknife that leaves out all windows of one episode at a time"
)

_RATIOS = {
    "bright_ratio": "bright pixels",
    "sharpness_ratio": "sharpness",
    "spread_ratio": "latent spread",
}


def format_report(report: dict[str, Any]) -> str:
    """The report of ``evaluate``."""
    rows = [
        [
            horizon,
            _number(row, "psnr", 2),
            f"{row['psnr_frozen']:.2f}",
            _number(row, "ssim", 3),
            f"{row['ssim_frozen']:.3f}",
            f"{row['sharpness_ratio']:.2f}",
            f"{row['bright_ratio']:.2f}",
        ]
        for horizon, row in report["horizons"].items()
    ]
    header = ["frames ahead", "PSNR", "frozen frame's PSNR", "SSIM", "frozen frame's SSIM"]
    drawn = f"{report['world']} ({report['dynamics']}), {report['sampling_steps']} sampling steps"
    lines = [
        f"{drawn}{_drafted(report)}: {_source(report)}",
        "",
        table([*header, "sharpness", "bright pixels"], rows),
        "",
        table(
            ["frames", "Fréchet distance", "the same of real frames", *_RATIOS], _frechet(report)
        ),
        "",
        _notes(report, "late" in report),
    ]
    if "ends" in report:
        labels = {
            "deaths": "deaths recorded",
            "expected_deaths": "deaths expected (sum of the hazard)",
            "drawn_precision_within_2": "precision of drawn deaths, within 2 frames",
            "drawn_recall_within_2": "recall of drawn deaths, within 2 frames",
            "log_loss_over_constant": "log loss, relative to the constant true rate",
            "reward_absolute_error": "mean absolute reward error",
        }
        ends = [[labels[name], f"{value:.3f}"] for name, value in report["ends"].items()]
        lines += ["", table(["reward and termination on held-out frames", ""], ends)]
    if "actions" in report:
        lines += ["", format_actions(ActionReport(**report["actions"]))]
    if report.get("replayed", {}).get("episodes"):
        lines += ["", *_replayed(report["replayed"])]
    return "\n".join(lines)


def _replayed(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            ahead,
            f"{row['there']:.2f}",
            f"{row['recorded_there']:.2f}",
            f"{row['before']:.2f}",
            f"{row['recorded_before']:.2f}",
        ]
        for ahead, row in report.items()
        if ahead != "episodes"
    ]
    header = ["frames before the end", "ends there", "heads on recorded frames", "ends before"]
    return [
        f"Ends of {report['episodes']} held-out episodes played again in the world, with the "
        f"actions taken: probabilities that it ends them there, from {EARLIER} frames before to "
        f"{LATER} after, or before.",
        "",
        table([*header, "heads on recorded frames"], rows),
    ]


def _frechet(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for when, frames in (("early", _FIRST), ("paired", f"{_FIRST}, paired"), ("late", _LAST)):
        if when in report:
            row = report[when]
            ratios = [f"{row[name]:.2f}" if name in row else "" for name in _RATIOS]
            floor = _floor(report, when)
            rows.append([frames, _number(row, "frechet", 1), floor, *ratios])
    return rows


def format_rows(report: dict[str, Any]) -> str:
    """The report of ``evaluate_steps`` or ``evaluate_drafts``."""
    rows = report["rows"]
    near, far = (str(h) for h in HORIZONS[1:3])
    long = any("late" in row for row in rows)
    drafts = len({row["speculative_frames"] for row in rows}) > 1
    header = ["sampling steps", *(["n", "drawn ahead"] if drafts else [])]
    first = len(header)
    header += [f"{name}, frame {frame}" for frame in (near, far) for name in ("PSNR", "SSIM")]
    header += [f"{name} {_FIRST}" for name in ("Fréchet", "paired Fréchet", "bright")]
    if long:
        header += [f"{name} {_LAST}" for name in ("Fréchet", "bright", "sharpness")]
    real = ["real frames"] + [""] * (first + 3)
    real += [_floor(report, "early"), _floor(report, "paired"), "1"]
    if long:
        real += [_floor(report, "late"), "1", "1"]
    cells = [_cells(row, drafts, long, (near, far)) for row in rows]
    best = rows[report["reference"]]
    steps = f"{best['sampling_steps']} steps of the {best['dynamics']} model"
    relative = f"n = {best['speculative_frames']}" if drafts else steps
    about = "" if drafts else _drafted(rows[0])
    lines = [
        f"{report['world']}{about}: {_source(report)}",
        "",
        table(header, [real, *cells]),
        "",
        f"In brackets: relative to {relative}, with the error of the ratio, in which what both "
        f"share cancels. {_notes(report, long)}",
    ]
    if drafts:
        lines[-1] += (
            " n: frames that are drawn jointly where the action is kept; drawn ahead: the share of "
            "the windows' frames that were, before their action was known."
        )
    return "\n".join(lines)


def _cells(row: dict[str, Any], drafts: bool, long: bool, horizons: tuple[str, str]) -> list[str]:
    cells = [f"{row['sampling_steps']} ({row['dynamics']}, {row['sampler']})"]
    if drafts:
        cells += [str(row["speculative_frames"]), f"{row.get('drawn_ahead', 0.0):.2f}"]
    for horizon in horizons:
        figures = row["horizons"][horizon]
        cells += [_number(figures, "psnr", 2), _number(figures, "ssim", 3)]
    cells += [_distance(row["early"]), _distance(row["paired"])]
    cells.append(f"{row['early']['bright_ratio']:.2f}")
    if long and "late" in row:
        late = row["late"]
        cells += [_distance(late), f"{late['bright_ratio']:.2f}", f"{late['sharpness_ratio']:.2f}"]
    elif long:
        cells += ["not run", "", ""]
    return cells


def _distance(figures: dict[str, float]) -> str:
    cell = _number(figures, "frechet", 1)
    if "over_reference" in figures:
        cell += f" ({_number(figures, 'over_reference', 2)}×)"
    return cell


def _floor(report: dict[str, Any], when: str) -> str:
    if when == "paired":
        return "0"
    floor = report["floor"][when]
    return _number(floor, "frechet", 1, "frechet_error" if when == "early" else "deviation")


def _number(figures: dict[str, float], name: str, digits: int, error: str = "") -> str:
    """A figure and its error, where there is one: none of one group, or of what is 1 for sure."""
    value, off = figures[name], figures[error or f"{name}_error"]
    text = f"{value:.{digits}f}"
    return f"{text} ± {off:.{digits}f}" if off > 0 else text


def _source(report: dict[str, Any]) -> str:
    return (
        f"{report['windows']} windows of {max(*HORIZONS, EARLY)} frames, conditioned on their "
        f"actions, from {report['held_out_episodes']} held-out episodes "
        f"({report['held_out_frames']:,} frames)"
    )


def _notes(report: dict[str, Any], long: bool) -> str:
    frames = min(REFERENCE, report["held_out_frames"])
    note = (
        f"Fréchet distances of tokenizer latents to {frames:,} random held-out frames. Frames "
        f"{_FIRST} are the windows'; the distance of real frames is that of the very frames that "
        "were recorded in these windows, encoded, and so what this many windows leave to a perfect "
        "world. Paired: to these recorded frames instead, as FVD in the literature relates "
        "generated clips to real ones; where the players stood cancels, so that it tells models "
        f"apart best, but no world that has to guess comes to 0. {_ERROR_NOTE}"
    )
    if long:
        note += (
            f", or one of the {report['long_rollouts']} rollouts of {LONG:,} frames behind "
            f"{_LAST}. Real frames there: random sets of {report['long_rollouts']} stretches of "
            f"{EARLY} consecutive recorded frames, from anywhere in their episodes, for few "
            "episodes are that long: mean and standard deviation of such sets"
        )
    return f"{note}. {_BRIGHT_NOTE}"


def _drafted(report: dict[str, Any]) -> str:
    frames = report["speculative_frames"]
    return f", up to {frames} frames drawn jointly" if frames > 1 else ""
