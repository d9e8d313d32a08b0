"""The game files that come along say nothing that their stages would refuse hours later."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from nfd_env import config
from nfd_env.data.tables import TableConfig
from nfd_env.evaluation.inverse_dynamics import InverseDynamicsTrainingConfig
from nfd_env.named import import_named
from nfd_env.recipe.door import check_parts, check_settings
from nfd_env.recipe.game import GameConfig, load_game
from nfd_env.recipe.gates import Drawn
from nfd_env.recipe.grid import PlanError, choose_grid
from nfd_env.recipe.look import Look
from nfd_env.recipe.measure import GameMeasures
from nfd_env.recipe.plan import settings
from nfd_env.recipe.run import Recipe, StageRecord
from nfd_env.sources.source import SourceConfig
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.training.distill import DistillTrainingConfig
from nfd_env.training.export import ExportConfig
from nfd_env.training.flow import FlowTrainingConfig
from nfd_env.training.heads import HeadsTrainingConfig
from nfd_env.training.ranks import Ranks
from nfd_env.training.tokenizer import TokenizerTrainingConfig

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"), key=lambda path: path.stem)
PAPER = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))
STAGES = {
    "inverse_dynamics": InverseDynamicsTrainingConfig,
    "tokenizer": TokenizerTrainingConfig,
    "flow": FlowTrainingConfig,
    "heads": HeadsTrainingConfig,
    "distill": DistillTrainingConfig,
    "export": ExportConfig,
}


def measures(frame_size: list[int]) -> GameMeasures:
    values = dict.fromkeys((field.name for field in fields(GameMeasures)), 400)
    own = {"frame_size": frame_size, "small": 6.0, "moved": 0.02, "channels": {}}
    return GameMeasures(**{**values, **own})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_stage_takes_the_settings_of_the_game_file(path: Path) -> None:
    game = load_game(path)
    plan = settings(game, measures(game.source.size), "cpu", action_width=3)
    made = {
        name: config.from_mapping(kind, getattr(plan, name), name) for name, kind in STAGES.items()
    }
    flow, tokenizer = made["flow"], made["tokenizer"]
    assert tokenizer.model.latent_channels == flow.model.latent_channels
    levels = len(tokenizer.model.encoder_channels)
    assert game.source.size == [side << levels for side in flow.model.latent_shape[1:]]
    for policy in game.policies:
        if ":" in policy.policy:
            assert callable(import_named(policy.policy))
    assert not game.signals or callable(import_named(game.signals))


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (Drawn("student", 1), (1, "consistency")),
        (Drawn("teacher", 2), (2, "dpm_solver_pp")),
        (Drawn("teacher", 4, near=False), (4, "dpm_solver_pp")),
    ],
)
def test_a_part_of_the_sampling_leaves_the_rest_derived(
    drawn: Drawn, expected: tuple[int, str]
) -> None:
    path = next(path for path in FILES if path.stem == "doom_take_cover")
    game = load_game(path, ["export.sampling.temperature=1.15"])
    plan = settings(game, measures(game.source.size), "cpu", action_width=3)
    record = StageRecord("", extra={"drawn": asdict(drawn)})
    recipe = Recipe(game)
    recipe.records = {"distill": record}
    sampling = recipe._sampling(plan)["sampling"]
    assert sampling["temperature"] == 1.15
    assert (sampling["steps"], sampling["sampler"]) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"small": float("nan")}, "small must be at least 0 and finite, got nan"),
        ({"workers": 10**6}, "workers must be from 1 to 1024"),
    ],
)
def test_numbers_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GameConfig("A", SourceConfig("A-v0"), **changed)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_sizes_are_games_that_can_be_planned(path: Path) -> None:
    game = load_game(path, device="cpu")
    source = config.from_mapping(TableConfig, game.source.kwargs, "kwargs")
    width = ActionCodec(space_from_dict(source.action_space)).width
    assert width == len(source.columns) == 25 and not source.copy
    plan = settings(game, measures([224, 384]), "cpu", width, processes=8)
    built = check_settings(plan, Look([224, 384], source.action_space, 20.0))
    check_parts(built, Ranks(0, 8))
    flow = built["flow"]
    assert (flow.model.tokens, flow.frames, flow.model.window) == (84, 32, 32)
    assert built["tokenizer"].model.downsampling == 16


def test_a_patch_of_ones_own_lifts_the_bounds_of_tokens() -> None:
    with pytest.raises(PlanError, match="cannot be cut into 12 to 32"):
        choose_grid(224, 384, 6.0, (4,))
    grid = choose_grid(224, 384, 6.0, (4,), patch=2)
    assert (grid.height, grid.width, grid.tokens) == (14, 24, 84)
    with pytest.raises(PlanError, match=r"flow\.model\.patch 5 at 16 pixels a latent"):
        choose_grid(224, 384, 6.0, (4,), patch=5)
