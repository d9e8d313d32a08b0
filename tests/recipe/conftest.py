"""Finished runs, which take long: one of each for all tests here. Do not write into them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipe.tiny import game, run, twice


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one round."""
    folder = tmp_path_factory.mktemp("recipe") / "dots"
    run(game(folder))
    return folder


@pytest.fixture(scope="session")
def made_twice(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one with a second round after that."""
    folder = tmp_path_factory.mktemp("rounds") / "dots"
    shutil.copytree(made, folder)
    said = run(twice(folder))
    assert not any("tokenizer is made anew" in line for line in said)
    return folder
