"""How many steps each stage trains, in batches of what size, by the time that one takes here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.plan import BEGUN_FROM, ENOUGH_STEPS, JUDGING, PATHS, RESERVE, SHARES, Plan

_VALIDATED = 0.15  # of a stage's time, where that is enough for one validation
LEAST_STEPS = 10  # of each stage, however small the budget
# In a short training of the tokenizer on a CPU many steps of few frames learn more than few steps
# of many (docs/trials.md): its batch is made so much smaller, down to an eighth, for so many steps.
_WANTED = {"tokenizer": 2_000}
_SMALLEST_PART = 8
_MOST = {
    "inverse_dynamics": 2_000,
    "tokenizer": 30_000,
    "flow": 60_000,
    "heads": 6_000,
    "distill": 3_000,
}
_WITH_STEPS = ("steps", "warmup_steps", "validate_every", "discrete_steps")


def with_smaller_batch(
    plan: Plan, game: GameConfig, name: str, seconds: float, per_step: float, parts: int = 1
) -> Plan:
    """``plan`` with a batch so small that there is time for enough steps; see ``with_steps``.

    A batch of ``parts`` equal ones stays one.
    """
    values = getattr(plan, name)
    own = getattr(game, name).get("train", {})
    if "steps" in own or "batch_size" in own:
        return plan
    train = values["train"]
    batch, steps = train["batch_size"], max(0.0, seconds) / per_step
    size = min(batch, int(batch * steps / ENOUGH_STEPS[name]))
    # On a GPU a step of few takes as long as one of many.
    if name in _WANTED and not train["device"].startswith("cuda"):
        size = min(size, max(batch // _SMALLEST_PART, int(batch * steps / _WANTED[name])))
    size = max(parts, max(2, size) // parts * parts)
    if size >= batch:
        return plan
    smaller = {**values, "train": {**train, "batch_size": size}}
    return replace(plan, batches={**plan.batches, name: batch}, **{name: smaller})


def with_steps(
    plan: Plan, game: GameConfig, name: str, seconds: float, per_step: float, validation: float
) -> Plan:
    """``plan`` with the steps of one stage, where the game file does not set them.

    Args:
        plan: so far.
        game: the game file.
        name: of the stage.
        seconds: to be spent on it.
        per_step: seconds a step.
        validation: seconds of a validation.
    """
    values = getattr(plan, name)
    most = 6 if game.minutes >= 20 and name != "distill" else 2
    often = int(np.clip(_VALIDATED * seconds / max(validation, 1e-9), 1, most))
    train = dict(values["train"])
    own = getattr(game, name).get("train", {})
    if "steps" not in own:
        steps = int((seconds - often * validation) / per_step)
        train["steps"] = int(np.clip(steps, LEAST_STEPS, _MOST[name]))
    steps = train["steps"]
    train.setdefault("warmup_steps", max(1, min(200, steps // 10)))
    train.setdefault("validate_every", max(1, -(-steps // often)))
    values = {**values, "train": train}
    if name == "distill":
        values.setdefault("discrete_steps", steps)
    return replace(
        plan,
        seconds={**plan.seconds, name: round(steps * per_step + often * validation, 1)},
        seconds_per_step={**plan.seconds_per_step, name: round(per_step, 5)},
        **{name: values},
    )


def as_begun(plan: Plan, game: GameConfig, name: str) -> dict[str, Any]:
    """The settings of a stage without what was decided of its steps, but for the game file's."""
    own = getattr(game, name)
    values = {k: v for k, v in getattr(plan, name).items() if k not in _WITH_STEPS or k in own}
    given = own.get("train", {})
    train = {k: v for k, v in values["train"].items() if k not in _WITH_STEPS or k in given}
    train["batch_size"] = plan.batch_size(name)
    return {**values, "train": {"steps": ENOUGH_STEPS[name], **train}}


def with_decisions(plan: Plan, old: Plan, game: GameConfig) -> Plan:
    """``plan`` with the steps that ``old`` decided on for stages that are otherwise the same."""

    def content(plan: Plan, name: str) -> dict[str, Any]:
        values = getattr(plan, name)
        left_out = {*PATHS, *BEGUN_FROM, *_WITH_STEPS, *JUDGING, "folder"}
        train = {k: v for k, v in values["train"].items() if k not in left_out}
        train["batch_size"] = plan.batch_size(name)
        return {**{k: v for k, v in values.items() if k not in left_out}, "train": train}

    for name in SHARES:
        mine, its = getattr(plan, name), getattr(old, name)
        if name not in old.seconds or content(plan, name) != content(old, name):
            continue
        own = getattr(game, name).get("train", {})
        free = [key for key in _WITH_STEPS if key not in own]
        decided = {k: v for k, v in its["train"].items() if k in free}
        others = {k: v for k, v in its.items() if k in _WITH_STEPS}
        batches = dict(plan.batches)
        if name in old.batches and "batch_size" not in own:
            batches[name] = old.batches[name]
            decided["batch_size"] = its["train"]["batch_size"]
        plan = replace(
            plan,
            batches=batches,
            seconds={**plan.seconds, name: old.seconds[name]},
            seconds_per_step={**plan.seconds_per_step, name: old.seconds_per_step[name]},
            **{name: {**mine, **others, "train": {**mine["train"], **decided}}},
        )
    return plan


def share_of(name: str) -> float:
    """Which part of the time that is left when a stage begins is its own."""
    order = list(SHARES)
    later = sum(SHARES[stage] for stage in order[order.index(name) :])
    return SHARES[name] / (later + RESERVE)
