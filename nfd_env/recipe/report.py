"""``report.html``: what a run has made, in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nfd_env import config
from nfd_env.data.shards import RecordedDataset
from nfd_env.evaluation.clips import (
    ActionReport,
    action_rows,
    actions_sentence,
    clip_rows,
    clips_sentence,
)
from nfd_env.evaluation.held_out import BRIGHT, Horizon, HorizonErrors
from nfd_env.evaluation.tables import told
from nfd_env.files import found_file, save_text
from nfd_env.metrics import bright_share, luminance, standing_out
from nfd_env.models.weights import CheckpointError
from nfd_env.recipe.records import StageRecord, write_yaml
from nfd_env.recipe.replay import moments, replay
from nfd_env.recipe.rounds import Played, split
from nfd_env.worlds.load import World, load_world

if TYPE_CHECKING:
    from nfd_env.recipe.run import Recipe

_SHOWN = 8  # frames that the world is shown first
_FRAMES = 96  # that it then draws
_HORIZONS = (1, 8, 32, 64, 96)
_WINDOWS = 6
_NEAR = 4  # frames that things are counted in
_WHO = {
    "agent": "the agent, in the game",
    "mistakes": "the agent with mistakes",
    "random": "random play",
}
COLUMNS = {
    "psnr": "PSNR, dB",
    "psnr_frozen": "frozen picture's",
    "moving_psnr": "of what moved",
    "moving_psnr_frozen": "frozen picture's",
    "sharpness_ratio": "sharpness",
    "gradient_correlation": "gradients",
    "standing_ratio": "things that stand out",
}


def write_report(recipe: Recipe) -> Path:
    """Play held-out moments in the finished world, and write ``report.html`` into the run folder.

    Raises:
        CheckpointError: when the world cannot be loaded.
    """
    game = recipe.game
    recordings = recipe.round.recordings
    real, made = play_held_out(load_world(game.world_folder, recipe.device), recordings)
    rows = compare(real, made)
    parts = [
        f"<h1>{html.escape(game.name)}</h1>",
        f"<p>From <code>{html.escape(game.source.env_id)}</code>. "
        f"Left: the game. Right: the world, same keys.</p>",
        f"<p><strong>{verdict(_made(recipe))}</strong></p>",
        _film(real, made, recordings.spec.fps),
        "<h2>How good</h2>",
        _table(
            ("frames ahead", *COLUMNS.values()),
            [(h, *(told(getattr(row, name)) for name in COLUMNS)) for h, row in rows.items()],
        ),
        "<p>PSNR: the higher the nearer to the recording; a world has to guess what it cannot "
        "know, so it falls with time, but should stay above the frozen picture's. Sharpness: 1 is "
        "as sharp as the game. Gradients: 1 is with edges where the game has them. Things that "
        "stand out: 1 is as many as in the game; less, they fade; more, they are invented.</p>",
        *_actions(recipe),
        *_rounds(recipe),
        *_gates(recipe),
        f"<h2>Real above generated, after {', '.join(map(str, rows))} frames</h2>",
        *_strips(real, made),
        "<h2>Time</h2>",
        _times(recipe),
        "<h2>Curves</h2>",
        *_curves(recipe),
        "<h2>Use it</h2>",
        f"<pre>nfd play {html.escape(str(game.world_folder))}</pre>",
        "<pre>import gymnasium, nfd_env\n"
        f'env = gymnasium.make("NFD/World-v0", world="{html.escape(str(game.world_folder))}")'
        "</pre>",
        "<h2>Settings</h2>",
        f"<details><summary>plan.yaml</summary><pre>{_plan(recipe.round.plan)}</pre></details>",
    ]
    path = recipe.folder / "report.html"
    save_text(path, _PAGE.format(title=html.escape(game.name), body="\n".join(parts)))
    numbers = [{"horizon": horizon, **asdict(row)} for horizon, row in rows.items()]
    write_yaml(recipe.folder / "report.yaml", {"comparisons": numbers})
    return path


def play_held_out(world: World, recordings: RecordedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Recorded and generated frames from the same moments under the same actions.

    Returns:
        Two uint8 arrays (windows, F, H, W, 3); F is 97, or as many as the longest held-out
        episode has. Frame 0 is the last one that the world was shown.
    """
    held_out = recordings.split("validation")
    # As far as a quarter of the episodes go: the longest alone would be the same moment each time.
    lengths = sorted((len(e) for e in held_out), reverse=True)
    shown = max(1, min(_SHOWN, lengths[0] // 2))
    frames = max(1, min(_FRAMES, lengths[len(lengths) // 4] - shown))
    where = moments(held_out, shown, frames, _WINDOWS)
    real = np.stack([m.episode.frames[m.now : m.now + frames + 1] for m in where])
    made = [real[:, 0]]
    for drawn in replay(world, where, frames, seed=0):
        made.append(world.model.decode(drawn.latents).cpu().numpy())
    return real, np.stack(made, 1)


def compare(real: np.ndarray, made: np.ndarray) -> dict[int, HorizonErrors]:
    """What ``nfd eval`` measures, after every number of frames that there are.

    Args:
        real: uint8 (windows, F, H, W, 3), as ``play_held_out`` gives them.
        made: likewise.
    """
    background = np.median(real, axis=1).astype(np.uint8)
    bright = float(np.percentile(luminance(real), BRIGHT))
    rows = {}
    for horizon in (h for h in _HORIZONS if h < real.shape[1]):
        then = real[:, horizon]
        known = Horizon.of(real[:, 0], then, background, bright, bright_share(then, bright))
        errors = known.errors(made[:, horizon], np.arange(len(real)))
        near = slice(max(1, horizon - _NEAR + 1), horizon + 1)
        stood, stands = (standing_out(x[:, near], background[:, None]).sum() for x in (real, made))
        rows[horizon] = replace(errors, standing_ratio=float(stands / max(1, stood)))
    return rows


def _embedded(data: bytes, kind: str, width: int) -> str:
    text = base64.b64encode(data).decode()
    return f'<img style="width:{width}px" src="data:image/{kind};base64,{text}">'


def _film(real: np.ndarray, made: np.ndarray, fps: float) -> str:
    """Three moments, the game left of the world, as one moving picture."""
    rows = [np.concatenate((real[i], made[i]), 2) for i in range(min(3, len(real)))]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, 1)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=max(1, round(1000 / fps)),
        loop=0,
        quality=85,
    )
    return _embedded(buffer.getvalue(), "webp", 4 * real.shape[3])


def _strips(real: np.ndarray, made: np.ndarray) -> list[str]:
    shown = [h for h in _HORIZONS if h < real.shape[1]]
    strips = []
    for i in range(len(real)):
        rows = [np.concatenate(list(part[i, shown]), 1) for part in (real, made)]
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate(rows)).save(buffer, "PNG")
        strips.append(_embedded(buffer.getvalue(), "png", 2 * real.shape[3] * len(shown)))
    return strips


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(str(title))}" for title in header)
    lines = ("".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows)
    return f"<table><tr>{head}<tr>{'<tr>'.join(lines)}</table>"


def _actions(recipe: Recipe) -> list[str]:
    """What the world does with actions, where it was measured."""
    found = recipe.records["report"].extra
    if not found:
        return []
    report = config.from_mapping(ActionReport, found, "run.yaml: report", measured=True)
    parts = ["<h2>Do keys do what they say?</h2>", _table(*action_rows(report))]
    parts.append(f"<p>{actions_sentence(report)}</p>")
    if report.clips is not None:
        parts += ["<h2>Does it move as the game does?</h2>", _table(*clip_rows(report.clips))]
        parts.append(f"<p>{clips_sentence(report.clips)}</p>")
    return parts


def _rounds(recipe: Recipe) -> list[str]:
    """What each later round's agent scored, and what training on its play has changed."""
    parts = []
    for number in range(2, recipe.game.rounds + 1):
        returns = (recipe.records[f"record_{number}"].extra or {})["returns"]
        parts += [
            f"<h2>Round {number}</h2>",
            "<p>An agent was trained in the world of the round before, and played the game while "
            "it was recorded; the world was trained on, on all recordings.</p>",
            _table(
                ("who", "return of an episode"),
                [(_WHO[name], Played(**scored)) for name, scored in returns.items()],
            ),
        ]
        for stage in ("flow", "heads"):
            extra = recipe.records[f"{stage}_{number}"].extra or {}
            if extra.get("before"):
                lines = [
                    (name, told(value), told(extra["after"].get(name, np.nan)))
                    for name, value in extra["before"].items()
                ]
                header = (f"{stage}, on all held-out episodes", "before", "after")
                parts.append(_table(header, lines))
    return parts


def _made(recipe: Recipe) -> dict[str, StageRecord]:
    """Of the stages of this many rounds; others may have been made before."""
    return {name: recipe.records[name] for name in recipe.stages if name in recipe.records}


def verdict(records: Mapping[str, StageRecord]) -> str:
    """How many gates did not pass, in one sentence."""
    lines = [line for record in records.values() for line in record.gates or []]
    counts = {word: sum(line.startswith(word) for line in lines) for word in ("FAILED", "warning")}
    if counts["FAILED"]:
        return f"Not good enough: {counts['FAILED']} of {len(lines)} gates failed."
    if counts["warning"]:
        return f"{counts['warning']} of {len(lines)} gates warn."
    return f"All {len(lines)} gates passed."


def _gates(recipe: Recipe) -> list[str]:
    parts = ["<h2>Gates</h2>"]
    for name, record in _made(recipe).items():
        if record.gates:
            lines = "\n".join(html.escape(line) for line in record.gates)
            parts.append(f"<h3>{name}</h3><pre>{lines}</pre>")
    return parts


def _times(recipe: Recipe) -> str:
    return _table(
        ("stage", "time", "steps"),
        [
            (name, f"{record.seconds / 60:.1f} min", record.steps or "")
            for name, record in _made(recipe).items()
        ],
    )


def _plan(path: Path) -> str:
    there = found_file(path, CheckpointError)
    return html.escape(path.read_text(encoding="utf-8")) if there else ""


def _curves(recipe: Recipe) -> list[str]:
    """Training loss and validation metrics of every stage, drawn from its TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts = []
    for name in recipe.stages:
        stage, number = split(name)
        logs = recipe.round.at(number).weights(stage).with_name("tensorboard")
        if not logs.is_dir():
            continue
        events = EventAccumulator(str(logs), size_guidance={"scalars": 500})
        events.Reload()
        parts.append(f"<h3>{name}</h3>")
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("train/loss", "train/surrogate", "rollout/", "validation/")):
                points = [(e.step, e.value) for e in events.Scalars(tag)]
                parts.append(_curve(tag, points))
    return parts


def _curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A small line drawing."""
    known = [(x, y) for x, y in points if np.isfinite(y)]
    if len(known) < 2:
        return ""
    steps, values = (np.array(column, float) for column in zip(*known, strict=True))
    low, high = values.min(), values.max()
    x = 5 + 230 * (steps - steps[0]) / max(1.0, steps[-1] - steps[0])
    y = 75 - 65 * (values - low) / max(1e-12, high - low)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<figure><svg width="240" height="80"><polyline fill="none" stroke="#2a6" '
        f'points="{line}"/></svg><figcaption>{html.escape(title)}: {values[-1]:.4g} '
        f"({low:.3g} to {high:.3g})</figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em }}
img {{ image-rendering: pixelated; max-width: 100%; margin: 4px 0 }}
td, th {{ padding: 2px 14px 2px 0; text-align: left }}
pre {{ background: #f4f4f4; padding: 8px; white-space: pre-wrap }}
figure {{ display: inline-block; margin: 4px 12px 4px 0; font-size: 12px; max-width: 240px }}
</style>
{body}
</html>
"""
