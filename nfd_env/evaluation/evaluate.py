"""``nfd eval``: a world against held-out recordings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import shown_transitions
from nfd_env.evaluation.endings import replay_endings
from nfd_env.evaluation.held_out import (
    EARLY,
    EVERY,
    EncodedEpisodes,
    HeldOut,
    Horizon,
    squared_error,
)
from nfd_env.evaluation.progress import progress_bar
from nfd_env.inference.speculation import advance, check_frames
from nfd_env.inference.world_model import WorldModel
from nfd_env.metrics import (
    Estimate,
    bright_share,
    events_matched,
    psnr,
    sharpness,
    ssim,
)
from nfd_env.worlds.load import World, load_world

FEW = 4  # most steps that a student is compared at
_LONG_SEEDS = 10_000  # episode numbers of the noise of long rollouts start there


def evaluate(
    world: World,
    recordings: RecordedDataset,
    sampling_steps: int | None = None,
    windows: int = 64,
    long_rollouts: int = 16,
    seed: int = 0,
    progress: bool = True,
    speculative_frames: int = 1,
) -> dict[str, Any]:
    """Compare a world with held-out episodes, conditioned on their true actions.

    Args:
        world: the world.
        recordings: a data set of the same environment with a validation split.
        sampling_steps: None for the world's default.
        windows: rollouts of 128 frames under recorded actions, >= 1.
        long_rollouts: rollouts of 2,000 frames for the drift; 0 leaves them out.
        seed: of the choice of windows and of all noise.
        progress: show a progress bar.
        speculative_frames: with more than 1, frames are drawn jointly wherever the action is kept.

    Returns:
        Nested plain values, see ``nfd_env.evaluation.reports.format_report``.

    Raises:
        RecordingError: when the recordings are of another environment or hold too little.
        ValueError: when a number is out of range.
    """
    row = _Row(world, _model(world, sampling_steps), speculative_frames)
    held = HeldOut.prepare(world, recordings, windows, long_rollouts, seed, progress)
    row.measure_windows(held, seed, progress)
    if held.long is not None:
        row.measure_drift(held, seed, progress)
    ends = _ends(world, row.model, held.encoded, np.random.default_rng(seed))
    replayed = replay_endings(world, row.model, held.encoded, seed)
    return _about(world, held) | row.report | {"ends": ends, "replayed": replayed}


def evaluate_steps(
    world: World,
    recordings: RecordedDataset,
    steps: Sequence[int],
    windows: int = 64,
    long_rollouts: int = 16,
    seed: int = 0,
    progress: bool = True,
    speculative_frames: int = 1,
    long_steps: Collection[int] | None = None,
) -> dict[str, Any]:
    """``evaluate`` for several numbers of sampling steps, on the same windows with the same noise.

    A world with a student and a teacher is judged with the teacher at all of them and the student
    at those up to 4. The reference is the teacher with most steps.

    Args:
        world: see ``evaluate``, also for the arguments that are not named here.
        recordings: see there.
        steps: numbers of steps, each >= 1.
        windows: see there.
        long_rollouts: see there.
        seed: see there.
        progress: see there.
        speculative_frames: see there.
        long_steps: those of ``steps`` that also have long rollouts, which cost most; None for all.

    Returns:
        Nested plain values, see ``nfd_env.evaluation.reports.format_rows``.

    Raises:
        ValueError: when a number is out of range.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"the numbers of steps must be at least 1, got {list(steps)}")
    if unknown := set(long_steps or ()) - set(steps):
        raise ValueError(f"long rollouts were asked for at {sorted(unknown)} steps, not in {steps}")
    worlds = [world]
    if world.spec.teacher is not None:
        model = world.model
        worlds = [
            load_world(world.folder, model.device, model.precision, which)
            for which in ("student", "teacher")
        ]
    rows = [
        _Row(judged, _model(judged, count), speculative_frames)
        for judged in worlds
        for count in steps
        if len(worlds) == 1 or judged.dynamics == "teacher" or count <= FEW
    ]
    chosen = [long_steps is None or row.model.sampling.steps in long_steps for row in rows]
    best = max(
        range(len(rows)),
        key=lambda i: (rows[i].world.dynamics != "student", rows[i].model.sampling.steps),
    )
    # Student and teacher share the tokenizer.
    held = HeldOut.prepare(world, recordings, windows, long_rollouts, seed, progress)
    return _compare(rows, chosen, best, held, seed, progress)


def evaluate_drafts(
    world: World,
    recordings: RecordedDataset,
    speculative_frames: Sequence[int],
    sampling_steps: int | None = None,
    windows: int = 64,
    long_rollouts: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """``evaluate`` for several numbers of jointly drawn frames, on the same windows and noise.

    The reference is the first of ``speculative_frames``. For the other arguments, what is returned
    and what is raised, see ``evaluate_steps``.
    """
    if not speculative_frames:
        raise ValueError("there are no numbers of jointly drawn frames to compare")
    model = _model(world, sampling_steps)
    rows = [_Row(world, model, count) for count in speculative_frames]
    held = HeldOut.prepare(world, recordings, windows, long_rollouts, seed, progress)
    return _compare(rows, [True] * len(rows), 0, held, seed, progress)


def _model(world: World, steps: int | None) -> WorldModel:
    if steps is None:
        return world.model
    return world.model.with_sampling(replace(world.model.sampling, steps=steps))


def _about(world: World, held: HeldOut) -> dict[str, Any]:
    floor: dict[str, Any] = {"early": _figures(held.early_floor)}
    if held.late_floor is not None:
        floor["late"] = dict(zip(("frechet", "deviation"), held.late_floor, strict=True))
    return {
        "world": world.spec.name,
        "windows": len(held.windows.contexts),
        "long_rollouts": len(held.long.contexts) if held.long else 0,
        "held_out_episodes": len(held.encoded.episodes),
        "held_out_frames": held.encoded.frames,
        "bright_threshold": held.threshold,
        "floor": floor,
    }


def _figures(estimate: Estimate, name: str = "frechet") -> dict[str, float]:
    return {name: estimate.value, f"{name}_error": estimate.error}


def _compare(
    rows: list[_Row],
    long: list[bool],
    reference: int,
    held: HeldOut,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    for row in rows:
        row.measure_windows(held, seed, progress)
    for row, chosen in zip(rows, long, strict=True):
        if held.long is not None and chosen:
            row.measure_drift(held, seed, progress)
    for row in rows:
        for when, distance in row.frechet.items():
            if when in rows[reference].frechet:
                ratio = distance.over(rows[reference].frechet[when])
                row.report[when] |= _figures(ratio, "over_reference")
    return _about(rows[0].world, held) | {
        "reference": reference,
        "rows": [row.report for row in rows],
    }


@dataclass
class _Row:
    """One way of drawing frames, and what was measured of it.

    Attributes:
        world: whose actions and frames they are.
        model: with the sampling to judge.
        speculative_frames: 1 for none drawn jointly.
        report: plain values.
        frechet: distances of "early" and "late" frames to random ones, and "paired" ones of early
            frames to those recorded in the same windows, as they are measured.
    """

    world: World
    model: WorldModel
    speculative_frames: int
    report: dict[str, Any] = field(default_factory=dict)
    frechet: dict[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_frames(self.speculative_frames, self.model.dynamics.config.window)
        self.report |= {
            "dynamics": self.world.dynamics,
            "sampler": self.model.sampling.sampler,
            "sampling_steps": self.model.sampling.steps,
            "speculative_frames": self.speculative_frames,
        }

    def measure_windows(self, held: HeldOut, seed: int, progress: bool) -> None:
        """Roll the windows out: errors at the horizons, and the distribution of early frames."""
        rollouts, model = held.windows, self.model
        seeds = [(seed, i) for i in range(len(rollouts.contexts))]
        state = model.start(rollouts.contexts, seeds, self.speculative_frames)
        early, shares = [], []
        self.report["horizons"] = horizons = {}
        steps = range(len(rollouts.actions))
        for step in progress_bar(steps, f"windows, {self._name()}", progress):
            latents, frame = advance(model, state, rollouts.actions[step]).latents, step + 1
            sampled = frame <= EARLY and frame % EVERY == 0
            if frame <= EARLY:
                early.append(latents.cpu())
            if not sampled and frame not in held.horizons:
                continue
            made = self.model.decode(latents).cpu().numpy()
            if frame in held.horizons:
                horizon = held.horizons[frame]
                horizons[str(frame)] = _errors(horizon, made, held.threshold, rollouts.groups)
            if sampled:
                shares.append(bright_share(made, held.threshold))
        features = torch.stack(early, 1).flatten(2)
        self._relate("early", held, features, rollouts.groups, None)
        self._relate("paired", held, features, rollouts.groups, held.early)
        self.report["early"]["bright_ratio"] = _ratio(float(np.mean(shares)), held.early_bright)
        if self.speculative_frames > 1:
            drafted = state.report()["accepted"].sum() / (len(seeds) * len(steps))
            self.report["drawn_ahead"] = float(drafted)

    def measure_drift(self, held: HeldOut, seed: int, progress: bool) -> None:
        """Roll out for long: the distribution of the last frames."""
        rollouts, model = held.long, self.model
        assert rollouts is not None
        seeds = [(seed, _LONG_SEEDS + i) for i in range(len(rollouts.contexts))]
        state = model.start(rollouts.contexts, seeds, self.speculative_frames)
        late, shares, sharp = [], [], []
        for step in progress_bar(
            range(len(rollouts.actions)), f"long rollouts, {self._name()}", progress
        ):
            latents, frame = advance(model, state, rollouts.actions[step]).latents, step + 1
            if frame <= len(rollouts.actions) - EARLY:
                continue
            late.append(latents.cpu())
            if frame % EVERY == 0:
                made = self.model.decode(latents).cpu().numpy()
                shares.append(bright_share(made, held.threshold))
                sharp.append(sharpness(made))
        features = torch.stack(late, 1).flatten(2)
        self._relate("late", held, features, rollouts.groups, None)
        self.report["late"] |= {
            "bright_ratio": _ratio(float(np.mean(shares)), held.bright),
            "sharpness_ratio": float(np.mean(sharp)) / held.sharpness,
            "spread_ratio": float(features.std()) / held.spread,
        }

    def _relate(
        self, name: str, held: HeldOut, features: Tensor, groups: np.ndarray, real: Tensor | None
    ) -> None:
        projected = held.reference.project(features)
        self.frechet[name] = held.reference.estimate(projected, groups, real)
        self.report[name] = _figures(self.frechet[name])

    def _name(self) -> str:
        steps = f"{self.model.sampling.steps} steps of the {self.world.dynamics}"
        return steps + (f", n = {self.speculative_frames}" if self.speculative_frames > 1 else "")


def _errors(
    horizon: Horizon, made: np.ndarray, threshold: float, groups: np.ndarray
) -> dict[str, float]:
    """How far the windows' frames ``made`` are from what happened."""
    squared, similar = squared_error(horizon.frames, made), ssim(horizon.frames, made)

    def pooled(used: np.ndarray) -> float:
        return psnr(float(squared[used].mean()))

    def mean(used: np.ndarray) -> float:
        return float(similar[used].mean())

    return {
        **_figures(Estimate.jackknife(pooled, groups), "psnr"),
        **_figures(Estimate.jackknife(mean, groups), "ssim"),
        "psnr_frozen": horizon.psnr_frozen,
        "ssim_frozen": horizon.ssim_frozen,
        "sharpness_ratio": sharpness(made) / horizon.sharpness,
        "bright_ratio": _ratio(bright_share(made, threshold), horizon.bright),
    }


def _ratio(made: float, real: float) -> float:
    return made / real if real else float("nan")


def _ends(
    world: World, model: WorldModel, encoded: EncodedEpisodes, rng: np.random.Generator
) -> dict[str, float]:
    """How the heads fare on recorded frames: ends drawn as the env draws them, and rewards."""
    matched, errors = [], []
    expected = deaths = steps = 0.0
    log_loss = 0.0
    for index, episode in enumerate(encoded.episodes):
        count, happened = shown_transitions(episode)
        first = encoded.number(index, 1)
        latents = encoded.latents(np.arange(first, first + count))[None].to(model.device)
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
