"""What is derived from a game's frames."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfd_env import config
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import load_weights
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.grid import PlanError, choose_grid, fitting_size
from nfd_env.recipe.measure import GameMeasures, channels_needed, side_of_small
from nfd_env.recipe.plan import (
    PRETRAINED,
    PRETRAINED_MOTION,
    SHARES,
    Plan,
    merged,
    settings,
)
from nfd_env.recipe.steps import share_of
from nfd_env.sources.source import SourceConfig
from nfd_env.training.initial import initial_weights


@pytest.mark.parametrize(
    "height, width, small, levels, tokens",
    [
        (64, 64, 3.0, 2, 16),  # as BigFish was trained by hand
        (64, 64, math.inf, 2, 16),
        (96, 128, math.inf, 3, 12),
        (96, 128, 3.0, 2, 12),  # a third level loses what is three pixels large
        (96, 96, 3.0, 2, 16),
        (80, 80, 4.0, 2, 16),
    ],
)
def test_the_grid_keeps_small_things_and_has_few_tokens(
    height: int, width: int, small: float, levels: int, tokens: int
) -> None:
    grid = choose_grid(height, width, small)
    assert (grid.levels, grid.tokens) == (levels, tokens)
    assert grid.height << levels == height and grid.width << levels == width


def test_a_size_that_cannot_be_cut_is_refused_with_one_that_can() -> None:
    with pytest.raises(PlanError, match=r"source.size"):
        choose_grid(90, 70, 3.0)


def test_the_more_details_pictures_have_the_more_channels_their_latents_get() -> None:
    rng = np.random.default_rng(0)
    plain = np.zeros((64, 64, 96, 3), np.uint8)
    for frame, row, column in zip(plain, *rng.integers(0, 56, (2, 64)), strict=True):
        frame[row : row + 8, column : column + 8] = [200, 80, 40]
    assert channels_needed(plain) == {2: 8, 3: 8, 4: 8}
    assert channels_needed(rng.integers(0, 256, plain.shape, np.uint8)) == {2: 16, 3: 16, 4: 16}
    assert channels_needed(plain[:, :60]).keys() == {2}  # 60 rows divide by 4, not by 8
    # Twelve numbers that are spread over each patch, and next to nothing beside them.
    basis = np.linalg.qr(rng.normal(size=(48, 12)))[0]
    patches = 128 + 60 * rng.normal(size=(8192, 12)) @ basis.T
    tiles = patches.clip(0, 255).astype(np.uint8).reshape(64, 8, 16, 4, 4, 3)
    frames = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(64, 32, 64, 3)
    assert channels_needed(frames)[2] == 12


def planned(side: float, device: str = "cpu", **own: Any) -> Plan:
    """Of frames of 96 x 128 in which things of ``side`` pixels move."""
    known: dict[str, Any] = {field.name: 400 for field in fields(GameMeasures)}
    known |= {"frame_size": [96, 128], "small": side, "channels": {2: 12}}
    return settings(GameConfig("a", SourceConfig("a-v0"), **own), GameMeasures(**known), device, 3)


def test_the_game_file_has_the_last_word_on_channels() -> None:
    def channels(**model: int) -> tuple[int, int]:
        plan = planned(3.0, tokenizer={"model": model})
        return plan.tokenizer["model"]["latent_channels"], plan.flow["model"]["latent_channels"]

    assert channels() == (12, 12)
    assert channels(latent_channels=5) == (5, 5)


@pytest.mark.parametrize(
    ("side", "own", "pictures", "motion"),
    [
        (3.0, {}, "BigFish", "BigFish"),
        (math.inf, {}, "CarRacing", "CarRacing"),
        (3.0, {"tokenizer": {"model": {"encoder_channels": [8] * 4}}}, "DoomTakeCover", None),
        (3.0, {"tokenizer": {"initial": "CarRacing"}}, "CarRacing", "CarRacing"),
        (3.0, {"tokenizer": {"initial": ""}}, None, None),
        (3.0, {"tokenizer": {"model": {"encoder_blocks": 3}}}, None, None),
        (3.0, {"flow": {"model": {"local_width": 32}}}, "BigFish", None),
        (3.0, {"flow": {"initial_motion": ""}}, "BigFish", None),
        (3.0, {"flow": {"initial": "x.safetensors"}}, "BigFish", None),
    ],
)
def test_a_game_begins_with_what_a_world_of_as_many_levels_knows(
    side: float, own: dict[str, Any], pictures: str | None, motion: str | None
) -> None:
    plan = planned(side, **own)
    begun = plan.tokenizer.get("initial", None), plan.flow.get("initial_motion", None)
    assert begun == (pictures, motion)


@pytest.mark.parametrize(("levels", "world"), PRETRAINED.items())
def test_what_it_begins_with_fits(levels: int, world: str) -> None:
    plan = planned(3.0, tokenizer={"model": {"encoder_channels": [8] * levels}})
    model = config.from_mapping(TokenizerConfig, plan.tokenizer["model"])
    learned = load_weights(initial_weights(world, "tokenizer"), Tokenizer, TokenizerConfig)
    Tokenizer(replace(model, decoder_channels=[8] * levels)).begin_with(learned)
    dynamics = load_weights(initial_weights(world, "flow"), Dynamics, DynamicsConfig)
    assert (dynamics.local is not None) == (world in PRETRAINED_MOTION)
    if dynamics.local is not None:
        network = Dynamics(config.from_mapping(DynamicsConfig, plan.flow["model"]))
        assert network.local is not None
        network.local.begin_with(dynamics.local)


@given(st.integers(30, 1080), st.integers(30, 1920))
def test_frames_of_any_size_are_brought_to_one_that_can_be_planned(height: int, width: int) -> None:
    rows, columns = fitting_size(height, width)
    assert rows % 16 == 0 and columns % 16 == 0 and rows * columns <= 1.1 * 96 * 128
    assert 12 <= choose_grid(rows, columns, math.inf).tokens <= 32
    assert 12 <= choose_grid(rows, columns, 2.0).tokens <= 32


def test_what_the_file_sets_stands_over_what_is_derived() -> None:
    values = {"model": {"width": 256, "layers": 6}, "frames": 12}
    assert merged(values, {"model": {"layers": 2}}) == {
        "model": {"width": 256, "layers": 2},
        "frames": 12,
    }
    assert values["model"]["layers"] == 6


def test_the_stages_share_what_is_left_and_leave_a_reserve() -> None:
    left = 1.0
    for name in SHARES:
        left -= left * share_of(name)
    assert 0.05 < left < 0.2


def test_specks_of_a_large_thing_that_moves_are_no_small_things() -> None:
    assert side_of_small([4, 4, 4, 9]) == 2.0  # a ball and a paddle
    assert side_of_small([2] * 40 + [400, 900]) == 30.0  # a wall that comes near
    assert side_of_small([2]) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("minutes", "device", "width", "layers"),
    [
        (2.0, "cpu", 128, 2),
        (60.0, "cpu", 128, 2),
        (120.0, "cpu", 256, 4),
        (180.0, "cpu", 256, 8),
        (9.0, "cuda:0", 256, 8),
    ],
)
def test_the_less_time_the_smaller_the_flow_model(
    minutes: float, device: str, width: int, layers: int
) -> None:
    model = planned(3.0, device=device, minutes=minutes).flow["model"]
    assert (model["width"], model["layers"]) == (width, layers)
