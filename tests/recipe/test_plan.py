"""What is derived from a game's frames."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfd_env.recipe.grid import PlanError, choose_grid, fitting_size
from nfd_env.recipe.plan import SHARES, merged, share_of


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
