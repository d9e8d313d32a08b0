"""Is a stage's result good enough to go on from? One measurement, one bound, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nfd_env.evaluation.inverse_dynamics import ActionReport
from nfd_env.recipe.measure import GameMeasures

# What a student is compared with its teacher by, and how much of it is too little to matter.
_COMPARED = {
    "texture": ("texture distance", 0.002),
    "frechet": ("distance of rollouts", 0.5),
    "error_8": ("error after 8 frames", 0.01),
}
_NEAR = 1.5  # times the teacher's


class GateError(RuntimeError):
    """A stage's result is not good enough to go on from; says what to change."""


@dataclass(frozen=True)
class Gate:
    """A bound on one measurement.

    Attributes:
        name: what was measured.
        value: the measurement.
        good: a word on what good looks like.
        advice: what to change where it does not pass.
        low: least value that passes.
        high: greatest value that passes.
        stops: whether the recipe stops where it does not pass; else it is a warning.
    """

    name: str
    value: float
    good: str
    advice: str
    low: float = 0.0
    high: float = math.inf
    stops: bool = False

    @property
    def passed(self) -> bool:
        """Whether the measurement lies within the bounds; NaN does not."""
        return self.low <= self.value <= self.high

    def line(self) -> str:
        """One line of text."""
        word = "ok" if self.passed else "FAILED" if self.stops else "warning"
        text = f"{word:7} {self.name}: {self.value:.3g} ({self.bounds()}; {self.good})"
        return text if self.passed else f"{text}: {self.advice}"

    def bounds(self) -> str:
        """The bounds in words."""
        if math.isinf(self.high):
            return f"at least {self.low:.3g}"
        if math.isinf(self.low):
            return f"at most {self.high:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


def recording_gates(
    measures: GameMeasures, shift: int | None, failed: float = 0.0, imported: bool = False
) -> list[Gate]:
    """Of recordings: do actions stand where they belong, and are there ends to learn from.

    Args:
        measures: of the recordings.
        shift: of the actions, that explains the frames best; None where that cannot be told.
        failed: share of the episodes that the game failed in.
        imported: whether they were recorded elsewhere. Our own recorder puts every action before
            the frame that it leads into: where frames show it one later, the game does.
    """
    ends = "the world will never end an episode; record more, if the game has ends"
    skipped = "see the skipped-*.jsonl in the recordings: what leads there, the world will not show"
    late = "actions stand one frame too early (-1) or too late (+1): keys will lag"
    left_out = "share of episodes in which the game failed, and that were left out"
    gates = [
        Gate(left_out, failed, "0", skipped, high=0.05),
        Gate("held-out episodes that ended", measures.ends, "tens of them", ends, 1),
    ]
    if shift is not None:
        best = "shift of the actions that explains the frames best"
        good = "0: an action leads into the next frame"
        if not imported:
            good += "; -1: the game shows it a frame later"
        gates.append(Gate(best, shift, good, late, 0 if imported else -1, 0))
    return gates


def reading_gates(metrics: Mapping[str, float]) -> list[Gate]:
    """Of the net that reads actions back: does what keys do show in the game's own frames."""
    (name, value), *_ = metrics.items()
    text = f"{'R²' if name == 'r2' else 'F1'} of actions read from real held-out frames"
    advice = "actions hardly show, or are not the frames' own: worlds are not judged well by them"
    return [Gate(text, value, "above 0.8", advice, 0.5)]


def tokenizer_gates(metrics: Mapping[str, float], measures: GameMeasures) -> list[Gate]:
    """Of the tokenizer: are the things that move still there."""
    gain = metrics["moving_psnr"] - measures.frozen_moving_psnr
    lost = (
        "small things are lost: give more minutes, lower `small`, or set "
        "tokenizer.model.encoder_channels to fewer levels"
    )
    blurred = "frames are blurred: give more minutes or smaller frames (source.size)"
    moving = "dB that moving pixels are better than in a frozen picture"
    return [
        Gate(moving, gain, "above 6", lost, 3.0, stops=True),
        Gate("PSNR of held-out frames, dB", metrics["psnr"], "above 28", blurred, 20, stops=True),
    ]


def latent_gates(mean: float, deviation: float) -> list[Gate]:
    """Of encoded recordings: are they normalised, as everything later takes for granted."""
    advice = "the tokenizer's statistics are wrong: delete its folder and train it again"
    return [
        Gate("largest mean of a latent channel", mean, "0", advice, 0.0, 0.15, True),
        Gate("deviation of the latents", deviation, "1", advice, 0.85, 1.15, True),
    ]


def flow_gates(metrics: Mapping[str, float]) -> list[Gate]:
    """Of the flow model: is it better than a frozen picture, and do things stay."""
    more = "the dynamics have not been learned: give more minutes"
    gates = [
        Gate(
            f"error over the frozen frame's after {horizon} frames",
            metrics[f"error_over_frozen_{horizon}"],
            "below 0.8",
            more,
            high=1.0,
            stops=horizon == 1,  # far ahead a world has to guess, and guesses cost
        )
        for horizon in (1, 8, 32)
        if f"error_over_frozen_{horizon}" in metrics  # episodes may be too short for all
    ]
    standing = metrics.get("standing_32", math.nan)
    if not math.isnan(standing):
        name = "things that stand out after 32 frames, generated over real"
        good = "1; less: they fade, more: they are invented"
        advice = "give more minutes, or train the flow stage on more of what happens"
        gates.append(Gate(name, standing, good, advice, 0.8, 1.25))
    return gates


def heads_gates(metrics: Mapping[str, float], measures: GameMeasures) -> list[Gate]:
    """Of the heads: are they better than a constant."""
    gates = []
    if measures.ends:
        name, advice = "log loss of ends over that of their mean rate", "ends are not foreseen"
        over = metrics["end_over_constant"]
        gates.append(Gate(name, over, "below 0.6", f"{advice}: record more of them", high=1.0))
    if "reward_over_constant" in metrics:
        name = "squared error of rewards over that of their mean"
        over = metrics["reward_over_constant"]
        advice = "rewards are not seen: record more of them, or give more minutes"
        gates.append(Gate(name, over, "below 0.6", advice, high=1.0))
    return gates


def student_steps(metrics: Mapping[str, float]) -> int:
    """The fewest steps with which the student is near its teacher; 0 where none are.

    Near: frames that follow real ones have at most 1.5 times the teacher's distance in texture, and
    rollouts at most 1.5 times its distance and error, up to what is too little to matter.
    """
    for steps in (1, 2, 4):
        if all(_over_teacher(metrics, steps, name) <= _NEAR for name in _COMPARED):
            return steps
    return 0


def _over_teacher(metrics: Mapping[str, float], steps: int, name: str) -> float:
    _, tiny = _COMPARED[name]
    more = max(0.0, metrics[f"steps{steps}_{name}"] - tiny)
    return more / max(metrics[f"teacher_{name}"], 1e-9)


def distill_gates(metrics: Mapping[str, float], steps: int) -> list[Gate]:
    """Of the student: is it near its teacher."""
    shown = steps or 1
    taken = f"{shown} step{'s' if shown > 1 else ''}"
    advice = "the teacher is shipped instead, with more steps a frame: give more minutes"
    return [
        Gate(
            f"{what} of {taken} over the teacher's",
            _over_teacher(metrics, shown, name),
            "below 1.2",
            advice,
            high=_NEAR,
        )
        for name, (what, _) in _COMPARED.items()
    ]


def world_gates(returned: float, ends: float) -> list[Gate]:
    """Of the finished world, under the recorded actions."""
    advice = "agents will learn from a distorted game: give more minutes"
    return [
        Gate(
            f"{name} in the world over {name} in the recordings, same actions",
            value,
            "0.85 to 1.15",
            advice,
            0.7,
            1.4,
        )
        for name, value in (("reward", returned), ("ends of episodes", ends))
        if not math.isnan(value)
    ]


def action_gates(report: ActionReport) -> list[Gate]:
    """Of the finished world: do keys do what they say."""
    what = f"{report.metric} of actions read from"
    keys = "keys do less than in the game: give more minutes"
    lost = "the tokenizer loses what shows the action: give more minutes, or lower `small`"
    habits = "what players do is read, not what keys did: let random_held play more"
    kept = report.reencoded / report.real if report.real > 0 else math.nan
    beyond = report.shuffled - report.chance
    return [
        Gate(f"{what} its frames over re-encoded real ones", report.relative, "0.95", keys, 0.9),
        Gate(f"{what} re-encoded over real frames", kept, "0.95", lost, 0.8),
        Gate(f"{what} other actions' frames above chance", beyond, "0", habits, -math.inf, 0.1),
    ]
