"""``nfd init`` on games of many kinds."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import yaml

from nfd_env.recipe.game import load_game, snake_case
from nfd_env.recipe.inspect import write_game
from nfd_env.sources.source import SourceError

DOTS = ["tests.recipe.dots", "tests.recipe.hostile"]


def test_the_file_says_what_was_found_and_can_be_trained_as_it_is(tmp_path: Path) -> None:
    path, picture = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    game = load_game(path)
    assert game.name == "Dots" and game.source.frames == "observation"
    assert game.source.size == [48, 48] and game.source.fps == 20
    assert game.source.action_names == ["left", "noop", "right"]
    assert "left" in game.source.keys["left"] and "right" in game.source.keys["right"]
    assert len(path.read_text().splitlines()) <= 25
    preview = cv2.imread(str(picture))
    assert preview is not None and preview.shape[0] >= 256
    drawn = picture.read_bytes()
    for there in (path, picture):
        with pytest.raises(FileExistsError, match=f"{there.name} is there already.*-o"):
            write_game("tests/Dots-v0", path, imports=DOTS)
        path.unlink(missing_ok=True)
    assert picture.read_bytes() == drawn


def test_pictures_that_are_only_rendered_are_found(tmp_path: Path) -> None:
    path, _ = write_game("tests/RenderedOnly-v0", tmp_path / "r.yaml", imports=DOTS)
    source = yaml.safe_load(path.read_text())["source"]
    assert source["frames"] == "render" and source["action_names"] == ["west", "stay", "east"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("BigFish", "big_fish"),
        ("MiniGrid-DoorKey-8x8", "mini_grid_door_key_8x8"),
        ("ALE_Pong", "ale_pong"),
        ("dots", "dots"),
    ],
)
def test_files_and_folders_are_named_after_the_game(name: str, file: str) -> None:
    assert snake_case(name) == file


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("tests/Symbols-v0", "map of symbols"),
        ("NoSuchGame-v0", "cannot be made"),
        ("envpool/NoSuchGame-v0", "no task|needs EnvPool"),
        ("tests/Hostile-v0:reset", "fails in every episode.*no level.*first reset"),
        ("tests/Hostile-v0:exit", r"fails in every episode.*exit\(3\)"),
    ],
)
def test_what_cannot_be_recorded_is_said_and_nothing_is_written(
    env_id: str, message: str, tmp_path: Path
) -> None:
    env_id, _, fault = env_id.partition(":")
    kwargs = {"fault": fault} if fault else {}
    with pytest.raises(SourceError, match=message):
        write_game(env_id, tmp_path / "g.yaml", kwargs, imports=DOTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["sometimes", "multi_discrete", "multi_binary", "endless"])
def test_difficult_games_get_a_file_that_can_be_read(fault: str, tmp_path: Path) -> None:
    path, _ = write_game("tests/Hostile-v0", tmp_path / "g.yaml", {"fault": fault}, DOTS)
    game = load_game(path)
    assert game.source.kwargs == {"fault": fault} and game.source.terminal_frame


def test_an_unknown_key_and_a_bad_budget_are_named(tmp_path: Path) -> None:
    path, _ = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    with pytest.raises(ValueError, match="minuts"):
        load_game(path, ["minuts=3"])
    with pytest.raises(ValueError, match="minutes must be above 0"):
        load_game(path, minutes=-1.0)
