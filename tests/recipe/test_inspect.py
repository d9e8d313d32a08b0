"""``nfd init`` on games of many kinds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces

from nfd_env.data.shards import RecordingError
from nfd_env.recipe.game import load_game, snake_case
from nfd_env.recipe.inspect import write_game
from nfd_env.sources.keys import check_controls
from nfd_env.sources.source import SourceError, make_source
from nfd_env.video import write_mp4
from tests.recipe.dots import DotsEnv

DOTS = ["tests.recipe.dots", "tests.recipe.hostile"]


def test_the_file_says_what_was_found_and_can_be_trained_as_it_is(tmp_path: Path) -> None:
    path, picture = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    game = load_game(path)
    assert game.name == "Dots" and game.source.frames == "observation"
    assert game.source.size == [48, 48] and game.source.fps == 20
    assert game.source.action_names == ["left", "noop", "right"]
    assert "left" in game.source.keys["left"] and "right" in game.source.keys["right"]
    assert len(path.read_text().splitlines()) <= 25
    assert "# nfd train dots.yaml " in path.read_text()
    preview = cv2.imread(str(picture))
    assert preview is not None and preview.shape[0] >= 256
    drawn = picture.read_bytes()
    for there in (path, picture):
        with pytest.raises(FileExistsError, match=f"{there.name} is there already.*-o"):
            write_game("tests/Dots-v0", path, imports=DOTS)
        path.unlink(missing_ok=True)
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize(
    ("env_id", "kwargs", "names"),
    [
        ("HealthGathering", {"max_buttons_pressed": 0}, "turn_left turn_right move_forward"),
        ("TakeCover", {}, "noop move_right move_left"),
        (
            "Basic",
            {"max_buttons_pressed": 2},
            "noop attack move_right move_right+attack move_left move_left+attack "
            "move_left+move_right",
        ),
        (
            "TakeCover",
            {"max_buttons_pressed": 0, "use_multi_binary_action_space": False},
            "noop_move_left move_left noop_move_right move_right",
        ),
    ],
)
def test_buttons_of_doom_have_their_names_and_keys(
    env_id: str, kwargs: dict[str, int], names: str, tmp_path: Path
) -> None:
    pytest.importorskip("vizdoom")
    path, _ = write_game(f"Vizdoom{env_id}-v1", tmp_path / "my game.yaml", kwargs)
    source = load_game(path).source
    assert source.action_names == [name.replace("noop_", "noop ") for name in names.split()]
    assert "left" in source.keys.get("turn_left", source.keys.get("move_left", []))
    assert "# nfd train 'my game.yaml' " in path.read_text()


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
        ("tests/Hostile-v0:dict", "must be Discrete, or .* flatten it with a wrapper"),
        ("tests/Hostile-v0:huge", "1000000000 actions to tell apart, and a world at most 4096"),
        ("tests/Hostile-v0:none", "has no action_space"),
        ("tests/Hostile-v0:rust", "cannot be made: rust"),
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


@pytest.mark.parametrize(
    "fault",
    ["sometimes", "multi_discrete", "multi_binary", "endless", "many_bounds", "rate", "close"],
)
def test_difficult_games_get_a_file_that_can_be_read(fault: str, tmp_path: Path) -> None:
    path, _ = write_game("tests/Hostile-v0", tmp_path / "g.yaml", {"fault": fault}, DOTS)
    game = load_game(path)
    assert game.source.kwargs == {"fault": fault} and game.source.terminal_frame


def test_a_game_that_goes_elsewhere_does_not_take_the_file_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = write_game("tests/Hostile-v0", "g.yaml", {"fault": "elsewhere"}, DOTS)
    assert Path.cwd() == tmp_path and load_game(tmp_path / path).source.size == [48, 48]


def one_video(path: Path, size: tuple[int, int] = (32, 32)) -> None:
    """Five black frames with four actions beside them, alone in their folder."""
    path.parent.mkdir(parents=True)
    write_mp4(path, np.zeros((5, *size, 3), np.uint8), 25)
    path.with_suffix(".csv").write_text("action\n" + "1\n" * 4)


def test_frames_that_are_squeezed_are_shown_as_wide_as_the_game(tmp_path: Path) -> None:
    where = tmp_path / "videos"
    for name, size in (("wide", (32, 256)), ("square", (64, 64))):
        one_video(where / name / "a.mp4", size)
        path, _ = write_game(f"videos:{where / name}", tmp_path / f"{name}.yaml")
        assert load_game(path).source.display_aspect == (8.0 if name == "wide" else 0.0)


@pytest.mark.parametrize("name", ["null", "1e5", "On", "Pong"])
def test_names_that_yaml_would_take_for_something_else(name: str, tmp_path: Path) -> None:
    gymnasium.register(f"{name}-v0", entry_point=DotsEnv)
    path, _ = write_game(f"{name}-v0", tmp_path / "g.yaml", imports=DOTS)
    game = load_game(path)
    assert (game.name, game.source.env_id) == (name, f"{name}-v0")


class DotsOfPygame(DotsEnv):
    def get_keys_to_action(self) -> dict[Any, int]:
        """K_LEFT, "F1", Escape's code, K_d, a chord."""
        return {(1073741904,): 0, "f1": 2, (27,): 1, (100,): 2, (97, 98): 1}


def test_keys_as_pygame_counts_them(tmp_path: Path) -> None:
    gymnasium.register("DotsOfPygame-v0", entry_point=DotsOfPygame)
    path, _ = write_game("DotsOfPygame-v0", tmp_path / "g.yaml", imports=DOTS)
    source = load_game(path).source
    names, keys = source.action_names, source.keys
    assert "left" in keys[names[0]] and "d" in keys[names[2]]
    check_controls(spaces.Discrete(3), names, keys)


def test_a_folder_with_a_slash_behind_it_gives_the_name(tmp_path: Path) -> None:
    where = tmp_path / "clips"
    one_video(where / "a.MP4")
    path, _ = write_game(f"videos:{where}/", tmp_path / "g.yaml")
    assert load_game(path).name == "clips"
    with pytest.raises(RecordingError, match="nowhere: no such folder"):
        write_game(f"videos:{tmp_path / 'nowhere'}", tmp_path / "h.yaml")


def test_a_folder_whose_name_yaml_would_cut_off(tmp_path: Path) -> None:
    where = tmp_path / "my #1 videos"
    one_video(where / "a.mp4")
    path, _ = write_game(f"videos:{where}", tmp_path / "g.yaml")
    assert load_game(path).source.env_id == f"videos:{where}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = undefined_name", "cannot be imported: NameError: .*undefined_name.*line 1"),
        ("raise SystemExit(5)", "cannot be imported: SystemExit: 5"),
        ("import not_there_at_all", "cannot be imported: ModuleNotFoundError.*not_there_at_all"),
        ("def", "cannot be imported: SyntaxError"),
        (None, "needs the package 'own_game': pip install own_game, or, .* a module of your own"),
    ],
)
def test_a_module_of_ones_own_that_cannot_be_imported(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if text is not None:
        (tmp_path / "own_game.py").write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        write_game("Own-v0", "g.yaml", imports=["own_game"])
    assert "\n" not in str(caught.value)
    sys.modules.pop("own_game", None)


def test_a_module_of_ones_own_is_found_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found_game.py").write_text(
        "import gymnasium\nfrom tests.recipe.dots import DotsEnv\n"
        "gymnasium.register('Found-v0', entry_point=DotsEnv)\n"
    )
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p] + [str(Path.cwd())])
    monkeypatch.chdir(tmp_path)
    path, _ = write_game("Found-v0", "g.yaml", imports=["found_game"])
    del sys.modules["found_game"]
    sys.path.remove(str(tmp_path))
    assert make_source(load_game(path).source).reset(seed=0)[0].shape == (48, 48, 3)
    sys.modules.pop("found_game", None)


def test_an_unknown_key_and_a_bad_budget_are_named(tmp_path: Path) -> None:
    path, _ = write_game("tests/Dots-v0", tmp_path / "dots.yaml", imports=DOTS)
    with pytest.raises(ValueError, match="minuts"):
        load_game(path, ["minuts=3"])
    with pytest.raises(ValueError, match="minutes must be above 0"):
        load_game(path, minutes=-1.0)
