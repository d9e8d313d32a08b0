"""``nfd init`` on games of many kinds."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import yaml

from nfd_env.recipe.game import load_game
from nfd_env.recipe.inspect import write_game
from nfd_env.sources.source import SourceError

DOTS = ["tests.recipe.dots"]


def test_the_file_says_what_was_found_and_can_be_trained_as_it_is(tmp_path: Path) -> None:
    path, picture = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    game = load_game(path)
    assert game.name == "Dots" and game.source.frames == "observation"
    assert game.source.size == [48, 48] and game.source.fps == 20
    assert game.source.action_names == ["left", "noop", "right"]
    assert "left" in game.source.keys["left"] and "right" in game.source.keys["right"]
    assert len(path.read_text().splitlines()) <= 25
    assert cv2.imread(str(picture)).shape[0] >= 256
    with pytest.raises(FileExistsError, match="-o"):
        write_game("tests/Dots-v0", path, imports=DOTS)


def test_pictures_that_are_only_rendered_are_found(tmp_path: Path) -> None:
    path, _ = write_game("tests/RenderedOnly-v0", tmp_path / "r.yaml", imports=DOTS)
    assert yaml.safe_load(path.read_text())["source"]["frames"] == "render"


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("tests/Symbols-v0", "map of symbols"),
        ("NoSuchGame-v0", "cannot be made"),
        ("envpool/NoSuchGame-v0", "no task|needs EnvPool"),
    ],
)
def test_what_cannot_be_recorded_is_said_and_nothing_is_written(
    env_id: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        write_game(env_id, tmp_path / "g.yaml", imports=DOTS)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_and_a_bad_budget_are_named(tmp_path: Path) -> None:
    path, _ = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    with pytest.raises(ValueError, match="minuts"):
        load_game(path, ["minuts=3"])
    with pytest.raises(ValueError, match="minutes must be above 0"):
        load_game(path, minutes=-1.0)
