"""Is a stage's result good enough to go on from? One measurement, one bound, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nfd_env.evaluation.clips import ActionReport
from nfd_env.recipe.measure import GameMeasures

# What a world's frames are drawn by is compared by this with the best of all that was tried, and in
# texture with the teacher's many steps, in units of each measurement: how much is too little to
# matter, and how many times the best is near enough besides. Rollouts count for more than the
# texture of single frames: with few steps the flow model is smoother, but drifts less.
_COMPARED = {
    "texture": ("texture distance", 0.002, 5.0),
    "frechet": ("distance of rollouts", 0.5, 1.5),
    "error_8": ("error after 8 frames", 0.01, 1.5),
    "standing_32": ("drift of what stands out in 32 frames", 0.2, 1.1),
    "energy": ("drift of the energy in long rollouts", 0.1, 1.5),
}
_RATIOS = ("standing_32", "energy")  # of which neither more nor less than 1 is good
_MAY_BE_MISSING = ("standing_32",)  # where nothing stands out, or held-out episodes are short
_FEW = (1, 2, 4)
_PREFIX = {"student": "steps", "teacher": "teacher"}  # of their metrics


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


def length_gate(share: float, steps: int) -> Gate:
    """Of episodes that were cut off before the game file says, so that there are enough of them."""
    name = f"share of episodes cut off after {steps} steps, so that each process records some"
    advice = (
        "what comes later in an episode, its end perhaps, is hardly seen: record more (minutes, "
        "frames), or with fewer workers"
    )
    return Gate(name, share, "0", advice, high=0.2)


def agent_gate(returned: float, by_chance: float) -> Gate:
    """Of an agent's recordings: does it play better than chance, so that they show more."""
    name = "mean return of the agent in the real game, above that of random play"
    advice = (
        "what it learned in the world does not pay in the game: give more minutes, or set "
        "agent.decisions"
    )
    return Gate(name, returned - by_chance, "above 0", advice)


def reading_gates(metrics: Mapping[str, float]) -> list[Gate]:
    """Of the net that reads actions back: does what keys do show in the game's own frames."""
    (name, value), *_ = metrics.items()
    text = f"{'R²' if name == 'r2' else 'F1'} of actions read from real held-out frames"
    advice = "actions hardly show, or are not the frames' own: worlds are not judged well by them"
    return [Gate(text, value, "above 0.8", advice, 0.5)]


def tokenizer_gates(metrics: Mapping[str, float]) -> list[Gate]:
    """Of the tokenizer: are the things that move still there."""
    lost = (
        "small things are lost: give more minutes, lower `small`, or set "
        "tokenizer.model.encoder_channels to fewer levels"
    )
    blurred = (
        "frames are blurred: give more minutes, more tokenizer.model.latent_channels, or smaller "
        "frames (source.size)"
    )
    gates = [
        Gate("PSNR of held-out frames, dB", metrics["psnr"], "above 28", blurred, 20, stops=True)
    ]
    gain = metrics.get("moving_psnr", math.nan) - metrics.get("moving_psnr_frozen", math.nan)
    if not math.isnan(gain):  # nothing may have moved in these frames
        moving = "dB that moving pixels are better than in a frozen picture"
        gates.insert(0, Gate(moving, gain, "above 6", lost, 3.0, stops=True))
    return gates


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


@dataclass(frozen=True)
class Drawn:
    """What a world's frames are drawn by.

    Attributes:
        by: "student" or "teacher".
        steps: of which.
        near: whether what they draw is near the best of all that was tried.
    """

    by: str
    steps: int
    near: bool = True


def fewest_steps(metrics: Mapping[str, float]) -> Drawn:
    """Student or teacher with the fewest steps that are near the best of all that was tried.

    Best is said of each measurement by itself: the distance and error of rollouts, and how far
    these have become richer or poorer in what stands out, and long ones in energy. The texture of
    single frames is compared with that of the teacher's many steps. Where student and teacher are
    near in as many steps, the one whose rollouts have the smaller distance; where nothing is near
    in everything, what is least far in what it is worst in.
    """
    tried = [
        Drawn(by, steps)
        for steps in _FEW
        for by in _PREFIX
        if _key(by, steps, "frechet") in metrics
    ]
    for steps in _FEW:
        near = [d for d in tried if d.steps == steps and _farthest(metrics, d) <= 1]
        if near:
            return min(near, key=lambda drawn: metrics[_key(drawn.by, drawn.steps, "frechet")])
    return replace(min(tried, key=lambda drawn: _farthest(metrics, drawn)), near=False)


def _key(by: str, steps: int, name: str) -> str:
    return f"{_PREFIX[by]}{steps}_{name}"


def _off(metrics: Mapping[str, float], key: str) -> float:
    """How far a measurement is from what is wanted; infinite where the picture broke."""
    value = metrics[key]
    if key.endswith(_RATIOS):
        value = abs(math.log(value)) if value > 0 else math.inf
    return math.inf if math.isnan(value) else value


def _farthest(metrics: Mapping[str, float], drawn: Drawn) -> float:
    """The largest measurement over its bound; above 1: not near."""
    gates = distill_gates(metrics, drawn)
    return max(gate.value / gate.high if gate.high else math.inf for gate in gates)


def distill_gates(metrics: Mapping[str, float], drawn: Drawn) -> list[Gate]:
    """Of what the world's frames are drawn by: is it near the best of all that was tried."""
    taken = f"the {drawn.by}'s {drawn.steps} step{'s' if drawn.steps > 1 else ''}"
    advice = "nothing that was tried is near the best in all of this: give more minutes"
    gates = []
    for name, (what, little, times) in _COMPARED.items():
        every = (_key(by, steps, name) for by in _PREFIX for steps in _FEW)
        known = [key for key in every if key in metrics]
        if name in _MAY_BE_MISSING and all(math.isnan(metrics[key]) for key in known):
            continue
        best, whose = min(_off(metrics, key) for key in known), "the best that was tried"
        if name == "texture" and "teacher_texture" in metrics:
            best, whose = metrics["teacher_texture"], "the teacher's with many steps"
        value = _off(metrics, _key(drawn.by, drawn.steps, name))
        high = little + times * best if math.isfinite(best) else 0.0
        gates.append(Gate(f"{what}, {taken}", value, f"{best:.3g}: {whose}", advice, high=high))
    return gates


def world_gates(returned: float, ends: float, ahead: int, energy: float) -> list[Gate]:
    """Of the finished world, under the recorded actions."""
    advice = "agents will learn from a distorted game: give more minutes"
    lasts = Gate(
        f"energy of the latents after {ahead} frames, generated over real",
        energy,
        "1; more: errors add up until the picture breaks, less: it fades",
        "pictures do not last, so that episodes are to be kept short: give more minutes, "
        "or set flow.own_errors higher than 0.5 in the game file",
        0.5,
        1.6,
    )
    return [lasts] + [
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
