"""``nfd eval``: a world against held-out recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nfd_env.checkpoint import World, load_world
from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.evaluation.metrics import (
    bright_share,
    events_matched,
    frechet_distance,
    luminance,
    psnr,
    sharpness,
    ssim,
)
from nfd_env.evaluation.tables import table
from nfd_env.speculation import Speculator
from nfd_env.world_model import Context, WorldModel

HORIZONS = (1, 8, 32, 128)
FEW = 4  # most steps that a student is compared at
BRIGHT = 99.5  # percentile of the luma of real frames above which a pixel is bright
_EARLY, _LATE = (1, 100), (1900, 2000)
_BRIGHT_NOTE = (
    f"Bright pixels: as many as are brighter than {BRIGHT:g} % of the pixels of real frames, "
    "relative to how many real frames have, both as the tokenizer decodes them; rare bright "
    "details are lost first."
)


@dataclass(frozen=True)
class RealFrames:
    """What generated frames are compared with.

    Attributes:
        latents: (n, C, h, w) of random held-out frames.
        halves: Fréchet distance of one half of them to the other.
        threshold: luma above which a pixel is bright.
        bright: share of bright pixels, as the tokenizer decodes the frames.
        sharpness: of the decoded frames, see ``nfd_env.evaluation.metrics``.
    """

    latents: Tensor
    halves: float
    threshold: float
    bright: float
    sharpness: float

    @classmethod
    def of(cls, model: WorldModel, episodes: list[EpisodeReference], seed: int) -> RealFrames:
        """Encode frames of ``episodes`` with the tokenizer of ``model``."""
        latents = _real_latents(model, episodes, 4096, np.random.default_rng(seed))
        one, other = latents.flatten(1).split((len(latents) // 2, -(-len(latents) // 2)))
        pictures = model.decode(latents[:256].to(model.device)).cpu().numpy()
        threshold = float(np.percentile(luminance(pictures), BRIGHT))
        share = bright_share(pictures, threshold)
        return cls(latents, frechet_distance(one, other), threshold, share, sharpness(pictures))


def evaluate(
    world: World,
    recordings: RecordedDataset,
    sampling_steps: int | None = None,
    windows: int = 64,
    long_rollouts: int = 16,
    seed: int = 0,
    progress: bool = True,
    speculative_frames: int = 1,
    ends: bool = True,
    real: RealFrames | None = None,
) -> dict[str, Any]:
    """Compare a world with held-out episodes, conditioned on their true actions.

    Args:
        world: the world.
        recordings: a data set of the same environment with a validation split.
        sampling_steps: None for the world's default.
        windows: rollouts of 128 frames.
        long_rollouts: rollouts of 2,000 frames for the drift; 0 leaves them out.
        seed: of the choice of windows and of all noise.
        progress: show a progress bar.
        speculative_frames: with more than 1, frames are drawn jointly wherever the action is kept.
        ends: also judge the heads, which do not depend on the sampling.
        real: of the same recordings, tokenizer and seed; None to encode them.

    Returns:
        Nested plain values, see ``format_report``.

    Raises:
        RecordingError: when the recordings are of another environment or hold too little.
    """
    _check_fits(world, recordings)
    model = world.model
    if sampling_steps is not None:
        model = model.with_sampling(replace(model.sampling, steps=sampling_steps))
    episodes = recordings.split("validation")
    rng = np.random.default_rng(seed)
    report: dict[str, Any] = {
        "world": world.spec.name,
        "dynamics": world.dynamics,
        "sampler": model.sampling.sampler,
        "sampling_steps": model.sampling.steps,
        "speculative_frames": speculative_frames,
        "held_out_episodes": len(episodes),
        "held_out_frames": sum(len(e) + 1 for e in episodes),
    }
    stepper: WorldModel | Speculator = model
    if speculative_frames != 1:
        stepper = Speculator(model, speculative_frames, draft_cost=1.0)
    real = real or RealFrames.of(model, episodes, seed)
    report["bright_threshold"] = real.threshold
    report["horizons"] = _short_rollouts(
        world, model, stepper, episodes, windows, real.threshold, rng, seed, progress
    )
    report["frechet"] = {"real_halves": real.halves}
    if long_rollouts:
        report["frechet"] |= _drift(
            world, model, stepper, episodes, real, long_rollouts, rng, seed, progress
        )
    if ends:
        report["ends"] = _ends(world, model, episodes, rng)
    return report


def evaluate_steps(
    world: World,
    recordings: RecordedDataset,
    steps: Sequence[int],
    windows: int = 64,
    long_rollouts: int = 16,
    seed: int = 0,
    progress: bool = True,
    speculative_frames: int = 1,
) -> dict[str, Any]:
    """``evaluate`` for several numbers of sampling steps, on the same windows with the same noise.

    A world with a student and a teacher is judged with the teacher at all of them and the student
    at those up to 4.

    Returns:
        Nested plain values, see ``format_steps``. ``rows`` are reports of ``evaluate``; in each,
        ``frechet_over_reference`` relates its Fréchet distances to those of the row ``reference``,
        the teacher's with most steps.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"the numbers of steps must be at least 1, got {list(steps)}")
    _check_fits(world, recordings)
    worlds = [world]
    if world.spec.teacher is not None:
        model = world.model
        worlds = [
            load_world(world.folder, model.device, model.precision, which)
            for which in ("student", "teacher")
        ]
    # Student and teacher share the tokenizer.
    real = RealFrames.of(world.model, recordings.split("validation"), seed)
    rows = [
        evaluate(
            judged,
            recordings,
            count,
            windows,
            long_rollouts,
            seed,
            progress,
            speculative_frames,
            ends=False,
            real=real,
        )
        for judged in worlds
        for count in steps
        if len(worlds) == 1 or judged.dynamics == "teacher" or count <= FEW
    ]
    reference = max(rows, key=lambda r: (r["dynamics"] != "student", r["sampling_steps"]))
    for row in rows:
        row["frechet_over_reference"] = {
            name: row["frechet"][name] / reference["frechet"][name]
            for name in ("frames_1_100", "frames_1900_2000")
            if name in row["frechet"]
        }
    return {
        "world": world.spec.name,
        "windows": windows,
        "long_rollouts": long_rollouts,
        "held_out_episodes": rows[0]["held_out_episodes"],
        "held_out_frames": rows[0]["held_out_frames"],
        "speculative_frames": speculative_frames,
        "reference": rows.index(reference),
        "rows": rows,
    }


def _check_fits(world: World, recordings: RecordedDataset) -> None:
    if tuple(recordings.spec.frame_shape[:2]) != tuple(world.spec.frame_size):
        raise RecordingError(
            f"the recordings' frames are {recordings.spec.frame_shape[:2]}, "
            f"the world's {tuple(world.spec.frame_size)}"
        )


def _short_rollouts(
    world: World,
    model: WorldModel,
    stepper: WorldModel | Speculator,
    episodes: list[EpisodeReference],
    count: int,
    threshold: float,
    rng: np.random.Generator,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    keep, length = model.dynamics.config.window, max(HORIZONS)
    usable = [e for e in episodes if len(e) > keep + length]
    if not usable:
        raise RecordingError(f"no held-out episode has {keep + length} transitions")
    weights = np.array([len(e) - keep - length for e in usable], float)
    chosen = rng.choice(len(usable), count, p=weights / weights.sum())
    starts = [int(rng.integers(keep - 1, len(usable[i]) - length)) for i in chosen]
    contexts, actions = [], []
    for index, start in zip(chosen, starts, strict=True):
        episode = usable[index]
        contexts.append(recorded_context(world, model, episode, start, keep))
        raw = torch.from_numpy(episode.actions[start : start + length])
        actions.append(world.codec.encode(raw))
    state: Any = stepper.start(contexts, [(seed, i) for i in range(count)])
    driven = torch.stack(actions, 1)
    last = np.stack([usable[i].frames[s] for i, s in zip(chosen, starts, strict=True)])
    result: dict[str, Any] = {}
    for step in tqdm(range(length), desc="rollouts of 128", disable=not progress):
        transition = stepper.step(state, driven[step])
        if step + 1 not in HORIZONS:
            continue
        made = model.decode(transition.latents).cpu().numpy()
        real = np.stack(
            [usable[i].frames[s + step + 1] for i, s in zip(chosen, starts, strict=True)]
        )
        # As bright as the tokenizer shows them: what it loses is not the dynamics' loss.
        shown = model.decode(model.encode(torch.from_numpy(real))).cpu().numpy()
        result[str(step + 1)] = {
            "psnr": psnr(_squared(real, made)),
            "psnr_frozen": psnr(_squared(real, last)),
            "ssim": ssim(real, made),
            "ssim_frozen": ssim(real, last),
            "sharpness_ratio": sharpness(made) / sharpness(real),
            "bright_ratio": _ratio(bright_share(made, threshold), bright_share(shown, threshold)),
        }
    return result


def _drift(
    world: World,
    model: WorldModel,
    stepper: WorldModel | Speculator,
    episodes: list[EpisodeReference],
    real: RealFrames,
    count: int,
    rng: np.random.Generator,
    seed: int,
    progress: bool,
) -> dict[str, float]:
    keep = model.dynamics.config.window
    usable = [e for e in episodes if len(e) > keep]
    picked = [usable[int(i)] for i in rng.integers(0, len(usable), count)]
    contexts = [
        recorded_context(world, model, e, int(rng.integers(keep - 1, len(e))), keep) for e in picked
    ]
    # Held-out actions, one episode after the other, are as long as needed.
    streams = []
    for _ in range(count):
        order = rng.permutation(len(usable))
        joined = np.concatenate([usable[i].actions for i in order])
        joined = np.resize(joined, (_LATE[1], *joined.shape[1:]))
        streams.append(world.codec.encode(torch.from_numpy(joined)))
    driven = torch.stack(streams, 1)
    state: Any = stepper.start(contexts, [(seed, 10_000 + i) for i in range(count)])
    early, late, bright, sharp = [], [], {"early": [], "late": []}, []
    for step in tqdm(range(_LATE[1]), desc="rollouts of 2000", disable=not progress):
        latents = stepper.step(state, driven[step]).latents
        if _EARLY[0] <= step + 1 <= _EARLY[1]:
            early.append(latents)
        elif _LATE[0] <= step + 1:
            late.append(latents)
        else:
            continue
        if step % 10 == 0:
            frames = model.decode(latents).cpu().numpy()
            when = "early" if step < _EARLY[1] else "late"
            bright[when].append(bright_share(frames, real.threshold))
            if when == "late":
                sharp.append(sharpness(frames))
    features = [torch.cat(part).flatten(1).cpu() for part in (early, late)]
    flat = real.latents.flatten(1)
    return {
        "frames_1_100": frechet_distance(flat, features[0]),
        "frames_1900_2000": frechet_distance(flat, features[1]),
        "late_sharpness_ratio": float(np.mean(sharp)) / real.sharpness,
        "late_spread_ratio": float(features[1].std() / flat.std()),
        "early_bright_ratio": _ratio(float(np.mean(bright["early"])), real.bright),
        "late_bright_ratio": _ratio(float(np.mean(bright["late"])), real.bright),
    }


def _ratio(made: float, real: float) -> float:
    return made / real if real else float("nan")


def _ends(
    world: World, model: WorldModel, episodes: list[EpisodeReference], rng: np.random.Generator
) -> dict[str, float]:
    """How the heads fare on recorded frames: ends drawn as the env draws them, and rewards."""
    hidden_end = not world.spec.source.terminal_frame
    matched, errors = [], []
    expected = deaths = steps = 0.0
    log_loss = 0.0
    for episode in episodes:
        count = len(episode) - int(hidden_end and bool(episode.terminated[-1]))
        happened = episode.terminated[:count].copy()
        if hidden_end and episode.terminated[-1]:
            happened[-1] = True
        latents = _encode(model, episode.frames[1 : count + 1])[None]
        actions = world.codec.encode(torch.from_numpy(episode.actions[:count]))[None]
        with torch.inference_mode():
            logits, _ = model.heads(latents, actions.to(model.device), model.heads.initial_state(1))
        hazard = logits[0, :, 0].sigmoid().double().cpu().numpy()
        reward = model.heads.reward(logits)[0].cpu().numpy()
        errors.append(np.abs(reward - episode.rewards[:count]))
        expected, deaths, steps = expected + hazard.sum(), deaths + happened.sum(), steps + count
        log_loss -= np.log(np.where(happened, hazard, 1 - hazard).clip(1e-9)).sum()
        matched += [
            events_matched(rng.random(count) < hazard, happened, tolerance=2) for _ in range(20)
        ]
    precision, recall = np.nanmean(np.array(matched), axis=0)
    rate = deaths / steps
    constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return {
        "deaths": deaths,
        "expected_deaths": expected,
        "drawn_precision_within_2": float(precision),
        "drawn_recall_within_2": float(recall),
        "log_loss_over_constant": float(log_loss / steps / constant),
        "reward_absolute_error": float(np.concatenate(errors).mean()),
    }


def recorded_context(
    world: World, model: WorldModel, episode: EpisodeReference, last: int, frames: int
) -> Context:
    """The ``frames`` recorded frames up to and including number ``last``, as a start."""
    first = max(0, last - frames + 1)
    actions = torch.zeros(last - first + 1, world.codec.width)
    into = episode.actions[max(0, first - 1) : last]
    if len(into):
        actions[-len(into) :] = world.codec.encode(torch.from_numpy(into))
    return Context(_encode(model, episode.frames[first : last + 1]), actions)


def _encode(model: WorldModel, frames: np.ndarray) -> Tensor:
    chunks = torch.from_numpy(np.array(frames)).split(64)
    return torch.cat([model.encode(chunk) for chunk in chunks])


def _real_latents(
    model: WorldModel, episodes: list[EpisodeReference], count: int, rng: np.random.Generator
) -> Tensor:
    lengths = np.array([len(e) + 1 for e in episodes])
    ends = np.cumsum(lengths)
    indices = rng.permutation(ends[-1])[:count]
    frames = []
    for index in indices:
        episode = int(np.searchsorted(ends, index, side="right"))
        frames.append(episodes[episode].frames[index - (ends[episode] - lengths[episode])])
    return _encode(model, np.stack(frames)).cpu()


def _squared(real: np.ndarray, made: np.ndarray) -> float:
    return float(np.square(real.astype(np.float32) - made).mean())


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        f"{report['world']} ({report['dynamics']}), {report['sampling_steps']} sampling steps"
        f"{_drafted(report)}, against "
        f"{report['held_out_episodes']} held-out episodes ({report['held_out_frames']:,} frames), "
        "conditioned on their actions",
        "",
        "| frames ahead | PSNR | frozen frame's PSNR | SSIM | frozen frame's SSIM | sharpness | "
        "bright pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    for horizon, row in report["horizons"].items():
        lines.append(
            f"| {horizon} | {row['psnr']:.2f} | {row['psnr_frozen']:.2f} | {row['ssim']:.3f} | "
            f"{row['ssim_frozen']:.3f} | {row['sharpness_ratio']:.2f} | "
            f"{row['bright_ratio']:.2f} |"
        )
    lines += [
        "",
        _BRIGHT_NOTE,
        "",
        "| Fréchet distance of tokenizer latents to held-out frames | |",
        "|---|---|",
    ]
    names = {
        "real_halves": "held-out frames, half against half",
        "frames_1_100": "generated frames 1-100",
        "frames_1900_2000": "generated frames 1,900-2,000",
        "late_sharpness_ratio": "sharpness at 1,900-2,000, relative to real",
        "late_spread_ratio": "latent spread at 1,900-2,000, relative to real",
        "early_bright_ratio": "bright pixels at 1-100, relative to real",
        "late_bright_ratio": "bright pixels at 1,900-2,000, relative to real",
    }
    lines += [f"| {names[k]} | {v:.2f} |" for k, v in report["frechet"].items()]
    if "ends" not in report:
        return "\n".join(lines)
    lines += ["", "| reward and termination on held-out frames | |", "|---|---|"]
    labels = {
        "deaths": "deaths recorded",
        "expected_deaths": "deaths expected (sum of the hazard)",
        "drawn_precision_within_2": "precision of drawn deaths, within 2 frames",
        "drawn_recall_within_2": "recall of drawn deaths, within 2 frames",
        "log_loss_over_constant": "log loss, relative to the constant true rate",
        "reward_absolute_error": "mean absolute reward error",
    }
    lines += [f"| {labels[k]} | {v:.3f} |" for k, v in report["ends"].items()]
    return "\n".join(lines)


def _drafted(report: dict[str, Any]) -> str:
    frames = report["speculative_frames"]
    return f", up to {frames} frames drawn jointly" if frames > 1 else ""


def format_steps(report: dict[str, Any]) -> str:
    """The report of ``evaluate_steps`` as Markdown."""
    best = report["rows"][report["reference"]]
    near, far = (str(h) for h in HORIZONS[1:3])
    long = report["long_rollouts"] > 0
    rows = []
    for row in report["rows"]:
        cells = [f"{row['sampling_steps']} ({row['dynamics']}, {row['sampler']})"]
        for horizon in (near, far):
            figures = row["horizons"][horizon]
            cells += [f"{figures['psnr']:.2f}", f"{figures['ssim']:.3f}"]
        if long:
            frechet, ratio = row["frechet"], row["frechet_over_reference"]
            for name in ("frames_1_100", "frames_1900_2000"):
                cells.append(f"{frechet[name]:.1f} ({ratio[name]:.2f}×)")
            cells += [
                f"{frechet['early_bright_ratio']:.2f}",
                f"{frechet['late_bright_ratio']:.2f}",
                f"{frechet['late_sharpness_ratio']:.2f}",
            ]
        rows.append(cells)
    header = ["sampling steps", f"PSNR, frame {near}", f"SSIM, frame {near}"]
    header += [f"PSNR, frame {far}", f"SSIM, frame {far}"]
    notes = []
    if long:
        header += ["Fréchet 1-100", "Fréchet 1,900-2,000", "bright 1-100", "bright 1,900-2,000"]
        header += ["sharpness 1,900-2,000"]
        notes = [
            "",
            f"Fréchet distances of tokenizer latents to held-out frames, from "
            f"{report['long_rollouts']} rollouts of 2,000 frames; in brackets relative to "
            f"{best['sampling_steps']} steps of the {best['dynamics']} model. Held-out frames, "
            f"half against half: {best['frechet']['real_halves']:.1f}. {_BRIGHT_NOTE}",
        ]
    return "\n".join(
        [
            f"{report['world']}, {report['windows']} windows of "
            f"{report['held_out_episodes']} held-out episodes ({report['held_out_frames']:,} "
            f"frames), conditioned on their actions{_drafted(report)}",
            "",
            table(header, rows),
            *notes,
        ]
    )
