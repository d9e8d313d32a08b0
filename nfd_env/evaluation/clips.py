"""Clips of a world beside the game's, as the net sees them that reads actions from real play.

*Do keys do what they say?* The net reads the actions back (MineWorld, arXiv 2504.08388). What it
reads from the real frames of the same moments is the most that can be expected, and what it reads
from these frames passed through the tokenizer the most that the dynamics can be blamed for. From
frames that were drawn under other actions it must read nothing: else it knows what players do
there, and not what the keys did.

*Does it move as the game does?* The Fréchet distance of clips is that of FVD (arXiv 1812.01717), in
the features of this net instead of one that has seen people do sports. Every window of its few
frames is seen in turn; mean and deviation over a clip say what is usual in it and whether it goes
on so. A still picture and real frames in random order show what is far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.data.windows import Places
from nfd_env.evaluation.held_out import EncodedEpisodes, recorded_context
from nfd_env.evaluation.inverse_dynamics import SHOWN, InverseDynamics, score, scores
from nfd_env.evaluation.tables import table
from nfd_env.files import atomic_write
from nfd_env.metrics import FrechetReference
from nfd_env.progress import progress_bar
from nfd_env.worlds.load import World

CLIP = 16  # frames, as many as FVD's
_REFERENCE = 512  # random real clips that others are compared with
_DIMENSIONS = 32  # of clips; they hold 97 % of the variance in BigFish
_HORIZON = 32  # frames of a clip, where a net that reads actions needs no more
_CHUNK = 256  # frames that are decoded together
KINDS = {
    "generated": "the world's",
    "reencoded": "real, re-encoded",
    "real": "real",
    "frozen": "a still picture",
    "scrambled": "real frames in random order",
}


@dataclass(frozen=True)
class ClipDistance:
    """How far clips are from real ones, over the variance of these; ``_error``: standard error.

    Attributes:
        frechet: Fréchet distance to random held-out clips.
        frechet_error: by the jackknife over episodes; NaN of a single one.
        paired: to the real clips of the same moments.
        paired_error: likewise.
    """

    frechet: float
    frechet_error: float
    paired: float
    paired_error: float


@dataclass(frozen=True)
class ClipReport:
    """Fréchet distances of clips.

    Attributes:
        frames: of a clip.
        generated: of the world's.
        reencoded: of the real ones of the same moments, passed through the world's tokenizer.
        real: of these real ones: what a perfect world reaches.
        frozen: of their first frames, repeated.
        scrambled: of their frames in random order.
    """

    frames: int
    generated: ClipDistance
    reencoded: ClipDistance
    real: ClipDistance
    frozen: ClipDistance
    scrambled: ClipDistance


@dataclass(frozen=True)
class ActionReport:
    """How well actions can be read from a world's frames, and how far its clips are from real ones.

    Attributes:
        metric: "F1" or "R²", see ``nfd_env.evaluation.inverse_dynamics.score``.
        generated: of frames that the world drew.
        real: of the frames recorded at the same moments.
        reencoded: of these, passed through the world's tokenizer.
        shuffled: of frames drawn from the same moments under another moment's actions.
        chance: of the generated frames against the actions of other windows.
        relative: ``generated`` over ``reencoded``, the figure to look at; NaN where nothing can be
            read from the latter.
        windows: that were read.
        horizon: frames that each rollout went on for.
        parts: the first five of each part of the action, where it has several.
        clips: None where there are too few, or from before they were measured.
    """

    metric: str
    generated: float
    real: float
    reencoded: float
    shuffled: float
    chance: float
    relative: float
    windows: int
    horizon: int
    parts: list[list[float]]
    clips: ClipReport | None = None


CLIP_FILES = ("generated.npy", "real.npy", "reencoded.npy")  # of ``Clips.write``


@dataclass(frozen=True)
class Clips:
    """Held-out moments, and what a world makes of them.

    Attributes:
        held: the held-out episodes.
        groups: (n,), the episode of each moment.
        actions: encoded (n, F, action_width); the first leads into frame 0.
        generated: uint8 (n, F, H, W, 3); so are the others. Drawn under these actions.
        shuffled: under another moment's, with the same noise.
        real: as recorded.
        reencoded: the same through the tokenizer.
    """

    held: Sequence[EpisodeReference]
    groups: np.ndarray
    actions: Tensor
    generated: Tensor
    shuffled: Tensor
    real: Tensor
    reencoded: Tensor

    def write(self, folder: Path) -> None:
        """Write generated.npy, real.npy and reencoded.npy, uint8 (n, F, H, W, 3) each."""
        for name in CLIP_FILES:
            with atomic_write(folder / name) as path, path.open("wb") as file:
                np.save(file, getattr(self, Path(name).stem).numpy())


def draw_clips(
    world: World,
    recordings: RecordedDataset,
    least: int,
    rollouts: int = 64,
    horizon: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Clips:
    """Let a world go on from held-out moments under the recorded actions.

    Args:
        world: the world.
        recordings: of its game, with a validation split.
        least: frames that each rollout must have.
        rollouts: how many begin, at random held-out moments; at least 2.
        horizon: frames that each goes on for; fewer where few held-out episodes are so long; 0:
            32, or ``least`` where that is more.
        seed: of the moments and of the noise.
        progress: show a progress bar.

    Raises:
        RecordingError: when no held-out episode is long enough.
        ValueError: when a number is out of range.
    """
    horizon = horizon or max(_HORIZON, least)
    if rollouts < 2 or horizon < least:
        raise ValueError(f"rollouts must be at least 2, horizon at least the window of {least}")
    model = world.model
    held: Sequence[EpisodeReference] = recordings.split("validation")
    # As far as a quarter of the episodes go: the longest alone would be the same moment each time.
    lengths = sorted((len(episode) for episode in held), reverse=True)
    length = max(lengths[len(lengths) // 4], min(lengths[0], SHOWN + least)) if held else 0
    keep = model.dynamics.config.window
    horizon = min(horizon, length - min(keep, SHOWN))
    if horizon < least:
        raise RecordingError(
            f"{recordings.folder}: too few held-out episodes have {SHOWN + least + 1} frames: "
            "record longer ones, or more of them"
        )
    keep = min(keep, length - horizon)
    places = Places((len(episode) for episode in held), keep + horizon)
    encoded = EncodedEpisodes(model, held)
    rng = np.random.default_rng(seed)
    found = [places.find(int(place)) for place in rng.integers(0, len(places), rollouts)]
    moments = [(episode, first + keep - 1) for episode, first in found]
    taken = np.stack([held[e].actions[last : last + horizon] for e, last in moments])
    actions = world.codec.encode(torch.from_numpy(taken))  # the first leads into frame last + 1
    # Each moment twice, with the same noise: under its own actions and under another one's.
    contexts = [recorded_context(world, encoded, *moment) for moment in moments]
    state: Any = model.start(2 * contexts, 2 * [(seed, i) for i in range(rollouts)])
    driven = torch.cat((actions, actions.roll(1, 0))).to(model.device)
    drawn = []
    for step in progress_bar(range(horizon), "frames to read actions from", progress):
        drawn.append(model.decode(model.step(state, driven[:, step]).latents).cpu())
    generated, shuffled = torch.stack(drawn, 1).split(rollouts)
    numbers = np.array([encoded.number(*moment) for moment in moments])[:, None]
    numbers = (numbers + np.arange(1, horizon + 1)).ravel()
    real = torch.from_numpy(encoded.pictures(numbers))
    passed = [
        model.decode(encoded.latents(part).to(model.device)).cpu()
        for part in np.array_split(numbers, -(-len(numbers) // _CHUNK))
    ]
    shape = (rollouts, horizon, *real.shape[1:])
    groups = np.array([episode for episode, _ in moments])
    reencoded = torch.cat(passed).view(shape)
    return Clips(held, groups, actions, generated, shuffled, real.view(shape), reencoded)


def measure_actions(
    world: World,
    recordings: RecordedDataset,
    network: InverseDynamics,
    rollouts: int = 64,
    horizon: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> ActionReport:
    """``draw_clips``, and ``judge_clips``."""
    window = network.config.window
    drawn = draw_clips(world, recordings, window, rollouts, horizon, seed, progress)
    return judge_clips(drawn, network, seed)


def judge_clips(clips: Clips, network: InverseDynamics, seed: int = 0) -> ActionReport:
    """Read the actions of clips, and compare them with real ones.

    Args:
        clips: of at least the net's window.
        network: see ``nfd_env.evaluation.inverse_dynamics.load_inverse_dynamics``.
        seed: of what is compared by chance, and of the clips that others are compared with.
    """
    window, asked = network.config.window, network.config.asked
    horizon = clips.real.shape[1]
    firsts = range(horizon - window + 1)
    # Frame number f of a clip is led into by action f, so at frame f action f + 1 is taken.
    labels = network.labels(torch.cat([clips.actions[:, first + asked + 1] for first in firsts]))
    names = ("generated", "reencoded", "real", "shuffled")
    read = {
        name: torch.cat([network.read(getattr(clips, name)[:, f : f + window]) for f in firsts])
        for name in names
    }
    rng = np.random.default_rng((seed, 1))
    others = labels[torch.from_numpy(rng.permutation(len(labels)))]
    pairs = {name: (labels, made) for name, made in read.items()}
    pairs["chance"] = others, read["generated"]
    figures = {name: score(network.space, *pair) for name, pair in pairs.items()}
    parts = zip(*(scores(network.space, *pair) for pair in pairs.values()), strict=True)
    best = figures["reencoded"]
    return ActionReport(
        "R²" if isinstance(network.space, spaces.Box) else "F1",
        **figures,
        relative=figures["generated"] / best if best > 0 else math.nan,
        windows=len(labels),
        horizon=horizon,
        parts=[list(part) for part in parts] if labels.shape[1] > 1 else [],
        clips=_distances(clips, network, rng),
    )


def _distances(
    clips: Clips, network: InverseDynamics, rng: np.random.Generator
) -> ClipReport | None:
    """Fréchet distances of the clips, None where there are too few for them."""
    count, horizon = clips.real.shape[:2]
    length = min(CLIP, horizon)
    fewest = count - int(np.unique(clips.groups, return_counts=True)[1].max())  # without a group
    if (fewest or count) * (horizon - length + 1) <= _DIMENSIONS:
        return None
    held, places = clips.held, Places((len(episode) for episode in clips.held), length)
    # Where little was recorded, most are drawn more than once.
    drawn, each = np.unique(rng.integers(0, len(places), _REFERENCE), return_inverse=True)
    where = [places.find(int(place)) for place in drawn]
    pictures = np.stack([held[e].frames[first : first + length] for e, first in where])
    features = _features(network, torch.from_numpy(pictures), length)
    known = features[torch.from_numpy(each)].flatten(0, 1)
    reference = FrechetReference(known, _DIMENSIONS)
    scale = float(reference.project(known).var(0).sum())
    if not scale:
        return None
    orders = torch.from_numpy(np.stack([rng.permutation(horizon) for _ in range(count)]))
    shown = {
        "generated": clips.generated,
        "reencoded": clips.reencoded,
        "real": clips.real,
        "frozen": clips.real[:, :1].expand_as(clips.real),
        "scrambled": clips.real[torch.arange(count)[:, None], orders],
    }
    seen = {
        name: reference.project(_features(network, frames, length))
        for name, frames in shown.items()
    }
    distances = {}
    for name, made in seen.items():
        whole = reference.estimate(made, clips.groups)
        paired = reference.estimate(made, clips.groups, seen["real"])
        figures = (whole.value, whole.error, paired.value, paired.error)
        distances[name] = ClipDistance(*(figure / scale for figure in figures))
    return ClipReport(length, **distances)


def _features(network: InverseDynamics, frames: Tensor, length: int) -> Tensor:
    """Of all clips of ``length`` in (n, F, H, W, 3): (n, F - length + 1, d)."""
    windows = network.see(frames).unfold(1, length - network.config.window + 1, 1)
    return torch.cat((windows.mean(-1), windows.std(-1, correction=0)), -1)


# ------------------------------------------------------------------------------------------- text


def action_rows(report: ActionReport) -> tuple[list[str], list[list[str]]]:
    """What was read, as the header and the rows of a table."""
    header = [f"{report.metric} of actions read from", "generated frames", "real, re-encoded"]
    header += ["real", "drawn under other actions", "chance"]
    whole = [report.generated, report.reencoded, report.real, report.shuffled, report.chance]
    rows = {"all" if report.parts else "": whole}
    rows |= {f"part {number}": part for number, part in enumerate(report.parts)}
    return header, [[name, *(f"{x:.3f}" for x in row)] for name, row in rows.items()]


def clip_rows(report: ClipReport) -> tuple[list[str], list[list[str]]]:
    """The distances, likewise."""
    rows = []
    for name, text in KINDS.items():
        row: ClipDistance = getattr(report, name)
        cells = [clip_number(row.frechet, row.frechet_error)]
        cells.append("0" if name == "real" else clip_number(row.paired, row.paired_error))
        rows.append([text, *cells])
    return [f"clips of {report.frames} frames", "Fréchet distance", "paired"], rows


def clip_number(value: float, error: float) -> str:
    """A distance of clips and its error, where there is one."""
    return f"{value:.3f}" + (f" ± {error:.3f}" if error > 0 else "")


def format_actions(report: ActionReport) -> str:
    """The report as Markdown."""
    lines = [actions_sentence(report), "", table(*action_rows(report))]
    if report.clips is not None:
        lines += ["", table(*clip_rows(report.clips)), "", clips_sentence(report.clips)]
    return "\n".join(lines)


def actions_sentence(report: ActionReport) -> str:
    """What was done, and what good looks like."""
    return (
        f"Actions read back from {report.windows:,} windows of rollouts of {report.horizon} "
        f"frames: {report.relative:.2f} of what can be read from re-encoded real frames (0.95 or "
        "more: keys do what they do in the game). Frames drawn under other actions must be at "
        "chance."
    )


def clips_sentence(report: ClipReport) -> str:
    """What the distances are, and what good looks like."""
    return (
        f"Fréchet distance of clips of {report.frames} frames to {_REFERENCE} random held-out "
        "ones, over these ones' variance, in what the net that reads actions sees: how far things "
        "look and move from how they do in the game, whichever happened when. Good is as near as "
        "re-encoded real clips of the same moments; a still picture, and real frames in random "
        "order, are what is far. Paired: to the real clips of the same moments. These figures "
        "compare worlds of one game by one net; they are not FVD."
    )
