"""Everything that can be derived about a training before it is timed: sizes, batches, rates.

The one place where this is decided. When a stage begins, a few of its steps are timed; what follows
from that, see ``nfd_env.recipe.steps``, is written to ``plan.yaml`` beside it, so that going on
after a stop computes exactly what would have been computed.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env import config
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.grid import PlanError, choose_grid
from nfd_env.recipe.measure import GameMeasures
from nfd_env.sources.source import PRESENTATION
from nfd_env.training.latent_stage import CONTEXT, LEAST_HORIZON
from nfd_env.training.optimiser import has_muon

# Shares of the time that is left after recording. The flow model profits longest from more steps.
# What a student learns in such times was worse than the flow model's own one or two steps in all
# that lasts (docs/trials.md, "What draws the frames"): it gets little more than comparing takes.
SHARES = {"inverse_dynamics": 0.03, "tokenizer": 0.22, "flow": 0.53, "heads": 0.08, "distill": 0.07}
SHARED = ("tokenizer", "flow", "distill")  # stages that several processes train together
RESERVE = 0.1  # for encoding, calibration and the report
AGENT_SHARE = 0.25  # of a later round's time, see nfd_env.recipe.rounds
ENOUGH_STEPS = {
    "inverse_dynamics": 60,
    "tokenizer": 60,
    "flow": 60,
    "heads": 40,
    "distill": 20,
}
"""Where there is time for fewer, a stage's batch is made smaller; planned until it was timed."""

# Settings that say where things lie, and nothing of what they are.
PATHS = ("recordings", "tokenizer", "latents", "teacher", "dynamics", "heads", "folder")

# Settings of validations, which follow the budget and change no weights.
JUDGING = ("rollouts", "long_rollout", "reference_steps", "validation_windows")

# Settings that name weights to begin with, in later rounds those of the round before.
BEGUN_FROM = ("initial", "initial_motion", "student")

# Pictures of three games after an hour's training drifted, one until it was not to be recognised;
# with this much they last, and are as near to what happened, see docs/trials.md.
STILLNESS = 0.01

# Shipped worlds by the levels of their tokenizers, with which that of another game begins: what
# edges and colours are need not be learned anew (docs/trials.md).
PRETRAINED = {2: "BigFish", 3: "CarRacing", 4: "DoomTakeCover"}
PRETRAINED_MOTION = ("BigFish", "CarRacing")  # those that have convolutions, see LocalMotion

LEAST_FRAMES = CONTEXT + LEAST_HORIZON  # of an episode, to judge a world by

FEWEST_FRAMES = 1_000  # recorded, unless the file says otherwise
_MOST_FRAMES = 250_000
_FRAMES_A_MINUTE = 2_500  # of the budget; more than a training of that length can look at
_RECORDING_SHARE = 0.12  # of the budget, at most
ALL_SHARES = {
    "agent": AGENT_SHARE,
    "record": _RECORDING_SHARE,
    **SHARES,
    **dict.fromkeys(("encode", "world", "report"), RESERVE / 3),
}
"""What a stage may take of a round's time, before it is known better."""
EPISODES = 8  # that each recording process makes at least, so that there are some to hold out


def wanted_frames(minutes: float) -> int:
    """Frames worth recording for a budget."""
    return int(min(_MOST_FRAMES, max(FEWEST_FRAMES, _FRAMES_A_MINUTE * minutes)))


def frames_to_record(game: GameConfig, rate: float, encoding: float) -> int:
    """Frames to record, where the game file leaves it open.

    Args:
        game: the game file.
        rate: steps a second that one process plays.
        encoding: seconds that it takes to encode a frame.
    """
    seconds = _RECORDING_SHARE * 60 * game.minutes
    a_frame = max(encoding, 1 / (rate * game.collect_config(1).workers))
    most = int(seconds / a_frame)
    return max(FEWEST_FRAMES, min(wanted_frames(game.minutes), most))


@dataclass(frozen=True)
class Plan:
    """The settings of every stage, as plain values.

    Attributes:
        made_for: what it was derived from: measures, budget and device.
        seconds: expected, of each stage.
        seconds_per_step: measured.
        batches: of stages whose batch was made smaller for the time there is: what it would be.
        inverse_dynamics: of ``InverseDynamicsTrainingConfig``.
        tokenizer: of ``TokenizerTrainingConfig`` and so on.
        flow: see there.
        heads: see there.
        distill: see there.
        export: of ``ExportConfig``.
    """

    made_for: dict[str, Any]
    seconds: dict[str, float]
    seconds_per_step: dict[str, float]
    inverse_dynamics: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    flow: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)

    def batch_size(self, name: str) -> int:
        """Of a stage, as it is derived, whatever the time allowed: what it is known by."""
        size: int = self.batches.get(name) or getattr(self, name)["train"]["batch_size"]
        return size


def stored(path: Path) -> Plan:
    """The plan in the file ``path``.

    Raises:
        ConfigError: when there is none, or it is none.
    """
    return config.from_mapping(Plan, config.read(path), str(path))


def settings(
    game: GameConfig, measures: GameMeasures, device: str, action_width: int, processes: int = 1
) -> Plan:
    """The plan but for the numbers of steps; ``processes`` share the batches of ``SHARED``."""
    folder, data = game.run_folder, game.recordings_place
    height, width = measures.frame_size
    # What a user chose for the tokenizer holds for everything that is built on it.
    own = game.tokenizer.get("model") or {}
    allowed = (len(own["encoder_channels"]),) if own.get("encoder_channels") else (2, 3, 4)
    patch = int((game.flow.get("model") or {}).get("patch", 0))
    grid = choose_grid(height, width, game.small or measures.small, allowed, patch)
    needed = max(grid.channels, measures.channels.get(grid.levels, 0))
    grid = replace(grid, channels=own.get("latent_channels", needed))
    gpu = device.startswith("cuda")
    pixels = height * width
    tokenizer_batch = int(np.clip(32 * 64 * 64 / pixels, 8, 32)) * (8 if gpu else 1)
    channels = [48, 96, *{2: [], 3: [128]}.get(grid.levels, [160, 256, 256, 256])][: grid.levels]
    window = 16 if gpu or game.minutes >= 180 else 12
    frames = min(window, int(measures.median_length) + 1)
    if measures.longest + 1 < LEAST_FRAMES:
        raise PlanError(
            f"the longest held-out episode has {measures.longest + 1} frames; judging a world "
            f"takes episodes of at least {LEAST_FRAMES}: record longer episodes (raise "
            "max_episode_steps, or let policies play that live longer)"
        )
    weights = {
        "recordings": data,
        "tokenizer": str(folder / "tokenizer" / "model.safetensors"),
        "latents": str(folder / "latents"),
    }
    history = {
        "history_levels": {"skew": 3.0, "draft_share": 0.04},
        # Noise added to what is remembered made rollouts of 32 frames worse in four games of four.
        "history_level": 0.0,
        # Ends are rare, and windows alike hardly show what leads to them.
        "ending_share": 0.2 if measures.ends else 0.0,
    }

    def train(name: str, batch_size: int, **values: Any) -> dict[str, Any]:
        own = getattr(game, name).get("train") or {}
        parts = processes * int(own.get("accumulate") or 1) if name in SHARED else 1
        return {
            "folder": str(folder / name),
            "steps": ENOUGH_STEPS[name],
            "seed": game.seed,
            "device": device,
            "batch_size": -(-batch_size // parts) * parts,
            **values,
        }

    inverse_dynamics = {
        "recordings": data,
        "validation_windows": int(np.clip(30 * game.minutes, 64, 2048)),
        "train": train(
            "inverse_dynamics", batch_size=256 if gpu else 64, learning_rate=2e-3, ema_decay=0.99
        ),
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
            **_transformer(gpu, game.minutes),
            "heads": 4,
            "window": window,
            "modulation_rank": 32,
            "recent": 3,
            "stillness": STILLNESS,
        },
        "frames": frames,
        "rollouts": int(np.clip(game.minutes, 2, 8)),
        "level_shift": 2.0,
        # Without them pictures broke within some hundred frames in two games of three, see
        # docs/trials.md.
        "own_errors": 0.5 if game.flow.get("history", "two_copies") == "two_copies" else 0.0,
        "train": train(
            "flow",
            batch_size=96 if gpu else 8,
            learning_rate=1.2e-3,
            # As far as AdamW in a fifth fewer steps, see docs/trials.md.
            optimiser="muon" if has_muon() else "adamw",
            ema_decay=0.998,
            decay_fraction=0.5,
            # On a CPU steps are a seventh faster, for one to three minutes of compiling.
            compile=gpu or (game.minutes >= 120 and has_compiler()),
        ),
    }
    heads: dict[str, Any] = {
        **weights,
        "signal_weight": 3.0 if game.signals else 0.0,
        "nearby": 32,
        # Signals say what to remember for long; without them ends are too few to learn that from,
        # and short sequences show more of them.
        "frames": 128 if game.signals else 32,
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
        # Rollouts of all that may draw frames: 10 of them took 195 s of a core (Chaser, 4 x 256).
        "rollouts": int(np.clip(game.minutes / 6, 3, 16)),
        "reference_steps": 18 if game.minutes >= 5 else 8,
        "long_rollout": int(np.clip(4 * game.minutes, 16, 96)),
        "train": train(
            "distill",
            batch_size=64 if gpu else 8,
            learning_rate=2e-4,
            ema_decay=0.99,
            keep_best="steps1_texture",
        ),
    }
    export: dict[str, Any] = {
        "name": game.name,
        "folder": str(game.world_folder),
        "recordings": data,
        "tokenizer": str(folder / "tokenizer"),
        "dynamics": str(folder / "distill"),
        "heads": str(folder / "heads"),
        "teacher": str(folder / "flow") if game.teacher else "",
        "start_margin": start_margin(measures),
        "max_episode_steps": game.world_steps,
        "presentation": {name: getattr(game.source, name) for name in PRESENTATION},
    }
    plan = Plan({}, {}, {}, inverse_dynamics, tokenizer, flow, heads, distill, export)
    return _with_beginnings(_overridden(plan, game), game)


def _transformer(gpu: bool, minutes: float) -> dict[str, int]:
    """Width and layers of the flow model.

    In an hour of one core half the width and layers, at half the time a step, came nearer in two
    games of two (docs/trials.md).
    """
    if gpu or minutes >= 180:
        return {"width": 256, "layers": 8}
    if minutes >= 120:
        return {"width": 256, "layers": 4}
    return {"width": 128, "layers": 2}


def start_margin(measures: GameMeasures) -> int:
    """Frames that recorded episodes must still go on for after a start."""
    return int(np.clip(measures.median_length // 8, 2, 16))


def has_compiler() -> bool:
    """Whether ``torch.compile`` finds a C++ compiler for the CPU."""
    return sys.platform != "win32" and any(map(shutil.which, ("c++", "g++", "clang++")))


def _overridden(plan: Plan, game: GameConfig) -> Plan:
    """``plan`` with what the game file sets itself.

    Raises:
        ConfigError: when it sets where things lie: that is decided here.
    """
    for name in (*SHARES, "export"):
        own = getattr(game, name)
        wrong = [key for key in PATHS if key in own]
        wrong += ["train.folder"] if "folder" in (own.get("train") or {}) else []
        if wrong:
            raise config.ConfigError(
                f"{name}.{wrong[0]}: everything lies in the run folder, see folder; leave it out"
            )
    changed = {
        name: merged(getattr(plan, name), getattr(game, name)) for name in (*SHARES, "export")
    }
    return replace(plan, **changed)


def _with_beginnings(plan: Plan, game: GameConfig) -> Plan:
    """``plan`` with the shipped world that tokenizer and flow model begin with.

    Where the game file leaves it open, and asks for no other sizes than that world has.
    """
    tokenizer, flow = dict(plan.tokenizer), dict(plan.flow)
    if not {"encoder_blocks", "decoder_blocks"} & (game.tokenizer.get("model") or {}).keys():
        levels = len(tokenizer["model"]["encoder_channels"])
        tokenizer.setdefault("initial", PRETRAINED.get(levels, ""))
    sizes = {"recent", "local_width", "local_blocks"} & (game.flow.get("model") or {}).keys()
    # Its convolutions know the latents of its tokenizer only.
    if tokenizer.get("initial") in PRETRAINED_MOTION and not sizes and not flow.get("initial"):
        flow.setdefault("initial_motion", tokenizer["initial"])
    for values, key in ((tokenizer, "initial"), (flow, "initial_motion")):
        if not values.get(key):
            values.pop(key, None)  # as in runs from before there was something to begin with
    return replace(plan, tokenizer=tokenizer, flow=flow)


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``values`` with those of ``over`` in their place."""
    result = dict(values)
    for name, value in over.items():
        below = result.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged(below, value)
        result[name] = value
    return result
