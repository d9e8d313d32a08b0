"""Everything that can be derived about a training: sizes, batches, steps. Decided once and stored.

The one place where this is decided. When a stage begins, a few of its steps are timed; what follows
from that is written to ``plan.yaml``, so that going on after a stop computes exactly what would
have been computed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nfd_env.precision import autocast, choose_precision
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.measure import GameMeasures
from nfd_env.sources.source import PRESENTATION
from nfd_env.training.loop import Stage

# Shares of the time that is left after recording. The flow model profits longest from more steps.
SHARES = {"tokenizer": 0.22, "flow": 0.45, "heads": 0.08, "distill": 0.15}
_RESERVE = 0.1  # for encoding, calibration and the report
_TRAINED = 0.85  # of a stage's time; the rest goes to validation and strips
_FEWEST = {"tokenizer": 60, "flow": 60, "heads": 40, "distill": 20}
_MOST = {"tokenizer": 30_000, "flow": 60_000, "heads": 6_000, "distill": 3_000}

# Settings that say where things lie, and nothing of what they are.
PATHS = ("recordings", "tokenizer", "latents", "teacher", "dynamics", "heads", "folder")

_WITH_STEPS = ("steps", "warmup_steps", "validate_every", "discrete_steps")

_LATENTS = 1536  # numbers in a frame's latents that a small transformer can follow
_TOKENS = (12, 32)  # fewest and most tokens a frame
_CONTEXT, _HORIZON = 4, 32  # frames of the rollouts by which flow and distillation are judged


class PlanError(ValueError):
    """No training can be planned for this game and budget."""


@dataclass(frozen=True)
class Grid:
    """How a frame becomes tokens.

    Attributes:
        levels: of the tokenizer, each halving the frame.
        channels: of the latents.
        height: rows of latents.
        width: columns of latents.
        patch: latents a token along each side.
    """

    levels: int
    channels: int
    height: int
    width: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens a frame."""
        return (self.height // self.patch) * (self.width // self.patch)


def choose_grid(height: int, width: int, small: float) -> Grid:
    """The grid of latents for frames of a size, in which things of side ``small`` are kept.

    A latent as large as several small things loses them, whatever the loss is: a third level lost
    Breakout's ball. Too many latents are more than a small transformer can follow.

    Args:
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        small: side in pixels of the smallest moving things; infinite for no such.

    Raises:
        PlanError: when no grid has from 12 to 32 tokens.
    """
    found: list[tuple[float, Grid]] = []
    for levels in (2, 3, 4):
        if height % 2**levels or width % 2**levels:
            continue
        rows, columns = height >> levels, width >> levels
        channels = 16 if levels == 4 else 8
        cost = abs(math.log2(rows * columns * channels / _LATENTS))
        cost += 3 * max(0.0, levels - math.log2(max(4.0, small)))
        for patch in (1, 2, 3, 4, 5, 6, 8):
            grid = Grid(levels, channels, rows, columns, patch)
            if rows % patch or columns % patch or not _TOKENS[0] <= grid.tokens <= _TOKENS[1]:
                continue
            found.append((cost + 0.1 * abs(math.log2(grid.tokens / 16)), grid))
    if not found:
        raise PlanError(
            f"frames of {height}x{width} cannot be cut into {_TOKENS[0]} to {_TOKENS[1]} equal "
            "tokens; set source.size to sides that 16 divides, such as [64, 64] or [96, 128]"
        )
    return min(found, key=lambda entry: entry[0])[1]


def fitting_size(height: int, width: int, most: int = 96 * 128) -> list[int]:
    """The size that frames are brought to: sides that 16 divides, about the same aspect.

    Args:
        height: of the game's frame.
        width: of the game's frame.
        most: most pixels.
    """
    scale = min(1.0, math.sqrt(most / (height * width)))
    candidates = []
    for rows in range(48, 209, 16):
        for columns in range(48, 209, 16):
            if rows * columns > 1.1 * most:
                continue
            try:
                choose_grid(rows, columns, math.inf)
            except PlanError:
                continue
            aspect = abs(math.log(rows / columns) - math.log(height / width))
            area = abs(math.log(rows * columns / (height * width * scale**2)))
            candidates.append((2 * aspect + area, [rows, columns]))
    return min(candidates)[1]


@dataclass(frozen=True)
class Plan:
    """The settings of every stage, as plain values.

    Attributes:
        made_for: what it was derived from: measures, budget and device.
        seconds: expected, of each stage.
        seconds_per_step: measured.
        tokenizer: of ``TokenizerTrainingConfig`` and so on.
        flow: see there.
        heads: see there.
        distill: see there.
        export: of ``ExportConfig``.
    """

    made_for: dict[str, Any]
    seconds: dict[str, float]
    seconds_per_step: dict[str, float]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    flow: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)


def settings(game: GameConfig, measures: GameMeasures, device: str, action_width: int) -> Plan:
    """The plan but for the numbers of steps."""
    folder, data = game.run_folder, str(game.recordings_folder)
    height, width = measures.frame_size
    grid = choose_grid(height, width, game.small or measures.small)
    gpu = device.startswith("cuda")
    pixels = height * width
    tokenizer_batch = int(np.clip(32 * 64 * 64 / pixels, 8, 32)) * (8 if gpu else 1)
    channels = {2: [48, 96], 3: [48, 96, 128], 4: [48, 96, 160, 256]}[grid.levels]
    window = 16 if gpu or game.minutes >= 180 else 12
    frames = min(window, int(measures.median_length) + 1)
    if measures.longest + 1 < _CONTEXT + _HORIZON:
        raise PlanError(
            f"the longest held-out episode has {measures.longest + 1} frames; judging a world "
            f"takes episodes of at least {_CONTEXT + _HORIZON}: record longer episodes (raise "
            "max_episode_steps, or let policies play that live longer)"
        )
    weights = {
        "recordings": data,
        "tokenizer": str(folder / "tokenizer" / "model.safetensors"),
        "latents": str(folder / "latents"),
    }
    history = {
        "history_levels": {"skew": 3.0, "draft_share": 0.08},
        "history_level": 0.03,
        # Ends are rare, and windows alike hardly show what leads to them.
        "ending_share": 0.2 if measures.ends else 0.0,
    }

    def train(name: str, **values: Any) -> dict[str, Any]:
        return {
            "folder": str(folder / name),
            "steps": _FEWEST[name],
            "seed": game.seed,
            "device": device,
            **values,
        }

    tokenizer: dict[str, Any] = {
        "recordings": data,
        "model": {
            "encoder_channels": channels,
            "decoder_channels": channels,
            "latent_channels": grid.channels,
            "encoder_blocks": 2 if grid.levels == 2 else 1,
            "decoder_blocks": 2 if grid.levels == 2 else 1,
        },
        # The smaller what moves, the fewer pixels the hardest are.
        "hard_fraction": float(np.clip(measures.moved, 0.01, 0.05)),
        "hard_weight": 2.0 if math.isfinite(measures.small) else 0.5,
        "train": train("tokenizer", batch_size=tokenizer_batch, learning_rate=1e-3),
    }
    flow: dict[str, Any] = {
        **weights,
        **history,
        "model": {
            "latent_channels": grid.channels,
            "latent_height": grid.height,
            "latent_width": grid.width,
            "patch": grid.patch,
            "action_width": action_width,
            "width": 256,
            "layers": 8 if gpu or game.minutes >= 180 else 6,
            "heads": 4,
            "window": window,
            "modulation_rank": 32,
        },
        "frames": frames,
        "level_shift": 2.0,
        "train": train(
            "flow",
            batch_size=96 if gpu else 24,
            learning_rate=1.2e-3,
            ema_decay=0.998,
            decay_fraction=0.5,
            compile=gpu,
        ),
    }
    heads: dict[str, Any] = {
        **weights,
        "signal_weight": 3.0 if game.signals else 0.0,
        "latent_noise": 0.3,
        "train": train(
            "heads",
            batch_size=32,
            learning_rate=3e-3,
            weight_decay=0.1,
            ema_decay=0.99,
            precision="fp32",
            keep_best="signal" if game.signals else "end",
        ),
    }
    distill: dict[str, Any] = {
        **weights,
        **history,
        "teacher": str(folder / "flow" / "model.safetensors"),
        "frames": frames,
        "shift": 4.0,
        # Judging a student takes rollouts of the teacher, of many passes a frame.
        "rollouts": int(np.clip(game.minutes / 3, 3, 16)),
        "reference_steps": 18 if game.minutes >= 30 else 8,
        "train": train(
            "distill",
            batch_size=64 if gpu else 16,
            learning_rate=2e-4,
            ema_decay=0.99,
            keep_best="steps1_texture",
        ),
    }
    margin = int(np.clip(measures.median_length // 8, 2, 16))
    export: dict[str, Any] = {
        "name": game.name,
        "folder": str(game.world_folder),
        "recordings": data,
        "tokenizer": str(folder / "tokenizer"),
        "dynamics": str(folder / "distill"),
        "heads": str(folder / "heads"),
        "teacher": str(folder / "flow") if game.teacher else "",
        "start_margin": margin,
        "max_episode_steps": game.world_steps,
        "presentation": {name: getattr(game.source, name) for name in PRESENTATION},
    }
    plan = Plan({}, {}, {}, tokenizer, flow, heads, distill, export)
    return _overridden(plan, game)


def _overridden(plan: Plan, game: GameConfig) -> Plan:
    """``plan`` with what the game file sets itself."""
    changed = {
        name: merged(getattr(plan, name), getattr(game, name))
        for name in ("tokenizer", "flow", "heads", "distill", "export")
    }
    return replace(plan, **changed)


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``values`` with those of ``over`` in their place."""
    result = dict(values)
    for name, value in over.items():
        below = result.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged(below, value)
        result[name] = value
    return result


def with_steps(plan: Plan, game: GameConfig, name: str, seconds: float, per_step: float) -> Plan:
    """``plan`` with the steps of one stage, where the game file does not set them.

    Args:
        plan: so far.
        game: the game file.
        name: of the stage.
        seconds: to be spent on it.
        per_step: seconds a step.
    """
    values = getattr(plan, name)
    train = dict(values["train"])
    own = getattr(game, name).get("train", {})
    if "steps" not in own:
        steps = int(_TRAINED * seconds / per_step)
        train["steps"] = int(np.clip(steps, _FEWEST[name], _MOST[name]))
        if steps < _FEWEST[name] and "batch_size" not in own:  # rather small batches than no steps
            share = max(steps, 1) / _FEWEST[name]
            train["batch_size"] = max(2, int(train["batch_size"] * share))
            per_step *= share
    steps = train["steps"]
    train.setdefault("warmup_steps", max(1, min(200, steps // 10)))
    often = 6 if game.minutes >= 20 and name != "distill" else 2
    train.setdefault("validate_every", max(1, -(-steps // often)))
    values = {**values, "train": train}
    if name == "distill":
        values.setdefault("discrete_steps", steps)
    return replace(
        plan,
        seconds={**plan.seconds, name: round(steps * per_step / _TRAINED, 1)},
        seconds_per_step={**plan.seconds_per_step, name: round(per_step, 5)},
        **{name: values},
    )


def with_decisions(plan: Plan, old: Plan, game: GameConfig) -> Plan:
    """``plan`` with the steps that ``old`` decided on for stages that are otherwise the same."""

    def content(values: Mapping[str, Any]) -> dict[str, Any]:
        left_out = {*PATHS, *_WITH_STEPS, "folder"}
        train = {k: v for k, v in values["train"].items() if k not in left_out}
        return {**{k: v for k, v in values.items() if k not in left_out}, "train": train}

    for name in SHARES:
        mine, its = getattr(plan, name), getattr(old, name)
        if name not in old.seconds or content(mine) != content(its):
            continue
        own = getattr(game, name).get("train", {})
        free = [key for key in _WITH_STEPS if key not in own]
        decided = {k: v for k, v in its["train"].items() if k in free}
        others = {k: v for k, v in its.items() if k in _WITH_STEPS}
        plan = replace(
            plan,
            seconds={**plan.seconds, name: old.seconds[name]},
            seconds_per_step={**plan.seconds_per_step, name: old.seconds_per_step[name]},
            **{name: {**mine, **others, "train": {**mine["train"], **decided}}},
        )
    return plan


def share_of(name: str) -> float:
    """Which part of the time that is left when a stage begins is its own."""
    order = list(SHARES)
    later = sum(SHARES[stage] for stage in order[order.index(name) :])
    return SHARES[name] / (later + _RESERVE)


def seconds_per_step(stage: Stage, train: Mapping[str, Any], steps: int = 3) -> float:
    """Median time of a training step, measured on real batches; ``stage`` stays as it is."""
    device = torch.device(str(train["device"]))
    network = copy.deepcopy(stage.network).to(device).train()
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-6)
    precision = choose_precision(str(train.get("precision", "auto")), device)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(2 + steps):  # the first ones also pay for memory and kernels
        begin = time.perf_counter()
        batch = stage.batch(rng, int(train["batch_size"]))
        with autocast(device, precision):
            loss, _ = stage.loss(network, batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))
