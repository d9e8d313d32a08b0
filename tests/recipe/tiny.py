"""The recipe on a small game, with networks and trainings that are as small as can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nfd_env.data.collect import PolicyConfig
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.run import Recipe
from nfd_env.sources.source import SourceConfig
from tests.recipe.dots import ENV_ID

TINY: dict[str, Any] = {
    "inverse_dynamics": {"channels": 4, "train": {"steps": 8, "batch_size": 4}},
    "tokenizer": {
        "model": {
            "encoder_channels": [8, 8],
            "decoder_channels": [8, 8],
            "encoder_blocks": 1,
            "decoder_blocks": 1,
        },
        "train": {"steps": 30, "batch_size": 8, "learning_rate": 1e-2},
    },
    "flow": {
        "model": {
            "width": 32,
            "layers": 1,
            "heads": 2,
            "window": 5,
            "modulation_rank": 0,
            "local_width": 8,
            "local_blocks": 1,
        },
        "frames": 5,
        "train": {"steps": 8, "batch_size": 4, "validate_every": 8},
    },
    "heads": {
        "width": 16,
        "frames": 16,
        # Twice, so that there is a curve to be drawn.
        "train": {"steps": 8, "batch_size": 4, "validate_every": 4},
    },
    "distill": {
        "frames": 5,
        "rollouts": 3,
        "reference_steps": 2,
        "long_rollout": 8,
        # How often there is time for it depends on the machine, and what is kept depends on it.
        "train": {"steps": 4, "batch_size": 4, "validate_every": 4},
    },
    "export": {"starts": 8, "beginnings": 2},
}
AGENT: dict[str, Any] = {
    "decisions": 96,
    "num_envs": 4,
    "channels": 8,
    "width": 16,
    "ppo": {"rollout_steps": 8, "minibatch_size": 16, "epochs": 2},
}


def game(folder: Path, **changes: Any) -> GameConfig:
    source = SourceConfig(ENV_ID, imports=["tests.recipe.dots"], action_names=["l", "n", "r"])
    settings = GameConfig(
        name="Dots",
        source=source,
        folder=str(folder),
        minutes=1.0,
        device="cpu",
        frames=600,
        workers=1,
        max_episode_steps=60,
        validation_every=4,
        policies=[PolicyConfig("random_held", kwargs={"low": 1, "high": 6})],
        **TINY,
    )
    return replace(settings, **changes)


def twice(folder: Path, **changes: Any) -> GameConfig:
    """As many minutes for the first round as the fixture had, so that it need not be made again."""
    values: dict[str, Any] = {"rounds": 2, "minutes": 1 + 2 / 3, "agent": AGENT, **changes}
    return game(folder, **values)


def run(settings: GameConfig, stage: str | None = None) -> list[str]:
    """Run the recipe; returns what it said."""
    said: list[str] = []
    Recipe(settings, keep_going=True, say=said.append, progress=False).run(stage)
    return said
