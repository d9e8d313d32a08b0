"""``nfd eval``: a world against held-out recordings."""

from __future__ import annotations

import math
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
    EvaluationConfig,
    HeldOut,
    HorizonErrors,
    ratio,
)
from nfd_env.evaluation.reports import (
    Distribution,
    EndsReport,
    Floor,
    RowReport,
    RowsReport,
    WorldReport,
)
from nfd_env.inference.speculation import advance, check_frames
from nfd_env.inference.world_model import WorldModel
from nfd_env.metrics import Estimate, bright_share, events_matched, sharpness
from nfd_env.progress import progress_bar
from nfd_env.worlds.load import World, load_world

FEW = 4  # most steps that a student is compared at
_LONG_SEEDS = 10_000  # episode numbers of the noise of long rollouts start there


def evaluate(
    world: World, recordings: RecordedDataset, settings: EvaluationConfig, progress: bool = True
) -> WorldReport:
    """Compare a world with held-out episodes, conditioned on their true actions.

    Raises:
        RecordingError: when the recordings are of another environment or hold too little.
        ValueError: when a number is out of range.
    """
    model, seed = _model(world, settings.sampling_steps), settings.seed
    row = _Row(world, model, settings.speculative_frames)
    held = HeldOut.prepare(world, recordings, settings, progress)
    row.measure_windows(held, seed, progress)
    if held.long is not None:
        row.measure_drift(held, seed, progress)
    ends = _ends(world, model, held.encoded, np.random.default_rng(seed))
    replayed = replay_endings(world, model, held.encoded, seed)
    return WorldReport(**_about(world, held), **vars(row.report()), ends=ends, replayed=replayed)


def evaluate_steps(
    world: World,
    recordings: RecordedDataset,
    steps: Sequence[int],
    settings: EvaluationConfig,
    long_steps: Collection[int] | None = None,
    progress: bool = True,
) -> RowsReport:
    """``evaluate`` for several numbers of sampling steps, on the same windows with the same noise.

    A world with a student and a teacher is judged with the teacher at all of them and the student
    at those up to 4. The reference is the teacher with most steps.

    Args:
        world: the world.
        recordings: of the same game.
        steps: each >= 1, in place of ``settings.sampling_steps``.
        settings: how it is judged.
        long_steps: those of ``steps`` that also have long rollouts, which cost most; None for all.
        progress: show progress bars.

    Raises:
        ValueError: when a number is out of range; see also ``evaluate``.
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
        _Row(judged, _model(judged, count), settings.speculative_frames)
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
    held = HeldOut.prepare(world, recordings, settings, progress)
    return _compare(rows, chosen, best, held, settings.seed, progress)


def evaluate_drafts(
    world: World,
    recordings: RecordedDataset,
    speculative_frames: Sequence[int],
    settings: EvaluationConfig,
    progress: bool = True,
) -> RowsReport:
    """``evaluate`` for several numbers of jointly drawn frames, on the same windows and noise.

    The reference is the first of them. For what is raised, see ``evaluate_steps``.
    """
    if not speculative_frames:
        raise ValueError("there are no numbers of jointly drawn frames to compare")
    model = _model(world, settings.sampling_steps)
    rows = [_Row(world, model, count) for count in speculative_frames]
    held = HeldOut.prepare(world, recordings, settings, progress)
    return _compare(rows, [True] * len(rows), 0, held, settings.seed, progress)


def evaluate_worlds(
    drawn: Sequence[tuple[World, int]],
    recordings: RecordedDataset,
    settings: EvaluationConfig,
    reference: int = 0,
    progress: bool = True,
) -> RowsReport:
    """``evaluate`` for several worlds of one tokenizer, on the same windows with the same noise.

    Args:
        drawn: worlds, drawn as their models say, and how many frames each draws jointly.
        recordings: of their game.
        settings: how they are judged, but for its number of steps and of joint frames.
        reference: number of the one that distances are related to.
        progress: show progress bars.

    For what is raised, see ``evaluate_steps``.
    """
    rows = [_Row(world, world.model, count) for world, count in drawn]
    held = HeldOut.prepare(drawn[0][0], recordings, settings, progress)
    return _compare(rows, [True] * len(rows), reference, held, settings.seed, progress)


def with_steps(world: World, steps: int) -> World:
    """``world``, drawn in another number of steps."""
    return replace(world, model=_model(world, steps))


def _model(world: World, steps: int | None) -> WorldModel:
    if steps is None:
        return world.model
    return world.model.with_sampling(replace(world.model.sampling, steps=steps))


def _about(world: World, held: HeldOut) -> dict[str, Any]:
    """What a ``HeldOutReport`` has."""
    late = None if held.late_floor is None else Distribution(*held.late_floor)
    return {
        "world": world.spec.name,
        "windows": len(held.windows.contexts),
        "long_rollouts": len(held.long.contexts) if held.long else 0,
        "long_frames": len(held.long.actions) if held.long else 0,
        "held_out_episodes": len(held.encoded.episodes),
        "held_out_frames": held.encoded.frames,
        "bright_threshold": held.threshold,
        "floor": Floor(Distribution(held.early_floor.value, held.early_floor.error), late),
    }


def _compare(
    rows: list[_Row],
    long: list[bool],
    reference: int,
    held: HeldOut,
    seed: int,
    progress: bool,
) -> RowsReport:
    for row in rows:
        row.measure_windows(held, seed, progress)
    for row, chosen in zip(rows, long, strict=True):
        if held.long is not None and chosen:
            row.measure_drift(held, seed, progress)
    reports = [row.report(rows[reference]) for row in rows]
    return RowsReport(**_about(rows[0].world, held), reference=reference, rows=reports)


@dataclass
class _Row:
    """One way of drawing frames, and what was measured of it.

    Attributes:
        world: whose actions and frames they are.
        model: with the sampling to judge.
        speculative_frames: 1 for none drawn jointly.
        horizons: by the number of frames ahead.
        frechet: distances of "early" and "late" frames to random ones, and "paired" ones of early
            frames to those recorded in the same windows, as they are measured.
        distributions: the same, and more, to report.
        drawn_ahead: see ``RowReport``.
    """

    world: World
    model: WorldModel
    speculative_frames: int
    horizons: dict[int, HorizonErrors] = field(default_factory=dict)
    frechet: dict[str, Estimate] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(default_factory=dict)
    drawn_ahead: float | None = None

    def __post_init__(self) -> None:
        check_frames(self.speculative_frames, self.model)

    def report(self, reference: _Row | None = None) -> RowReport:
        """What was measured, the distances also relative to those of ``reference``."""
        found, others = dict(self.distributions), reference.frechet if reference else {}
        for when in found.keys() & others.keys():
            ratio = self.frechet[when].over(others[when])
            found[when] = replace(
                found[when], over_reference=ratio.value, over_reference_error=ratio.error
            )
        return RowReport(
            dynamics=self.world.dynamics,
            sampler=self.model.sampling.sampler,
            sampling_steps=self.model.sampling.steps,
            speculative_frames=self.speculative_frames,
            horizons=self.horizons,
            early=found["early"],
            paired=found["paired"],
            late=found.get("late"),
            drawn_ahead=self.drawn_ahead,
        )

    def measure_windows(self, held: HeldOut, seed: int, progress: bool) -> None:
        """Roll the windows out: errors at the horizons, and the distribution of early frames."""
        rollouts, model = held.windows, self.model
        seeds = [(seed, i) for i in range(len(rollouts.contexts))]
        state = model.start(rollouts.contexts, seeds, self.speculative_frames)
        early, shares = [], []
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
                self.horizons[frame] = held.horizons[frame].errors(made, rollouts.groups)
            if sampled:
                shares.append(bright_share(made, held.threshold))
        features = torch.stack(early, 1).flatten(2)
        bright = ratio(float(np.mean(shares)), held.early_bright)
        self._relate("early", held, features, rollouts.groups, None, bright)
        self._relate("paired", held, features, rollouts.groups, held.early)
        if self.speculative_frames > 1:
            drafted = state.report()["accepted"].sum() / (len(seeds) * len(steps))
            self.drawn_ahead = float(drafted)

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
        self._relate(
            "late",
            held,
            features,
            rollouts.groups,
            None,
            ratio(float(np.mean(shares)), held.bright),
            float(np.mean(sharp)) / held.sharpness,
            float(features.std()) / held.spread,
        )

    def _relate(
        self,
        name: str,
        held: HeldOut,
        features: Tensor,
        groups: np.ndarray,
        real: Tensor | None,
        *ratios: float,
    ) -> None:
        distance = held.reference.estimate(held.reference.project(features), groups, real)
        self.frechet[name] = distance
        self.distributions[name] = Distribution(distance.value, distance.error, *ratios)

    def _name(self) -> str:
        steps = f"{self.model.sampling.steps} steps of the {self.world.dynamics}"
        return steps + (f", n = {self.speculative_frames}" if self.speculative_frames > 1 else "")


def _ends(
    world: World, model: WorldModel, encoded: EncodedEpisodes, rng: np.random.Generator
) -> EndsReport:
    """How the heads fare on recorded frames: ends drawn as the env draws them, and rewards."""
    matched, errors = [], []
    expected = deaths = steps = 0.0
    log_loss = 0.0
    for index, episode in enumerate(encoded.episodes):
        count, happened = shown_transitions(episode)
        if not count:  # of its only transition there is no frame
            continue
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
    found = np.array(matched)  # NaN where there was no end, or none was drawn
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = np.nansum(found, 0) / (~np.isnan(found)).sum(0)
    rate = deaths / steps
    unsure = 0 < rate < 1  # else the constant tells all ends
    constant = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if unsure else math.nan
    return EndsReport(
        float(deaths),
        float(expected),
        float(precision),
        float(recall),
        float(log_loss / steps / constant),
        float(np.concatenate(errors).mean()),
    )
