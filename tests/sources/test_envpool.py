"""EnvPool's games through the door of every other game."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from nfd_env.recipe.game import load_game
from nfd_env.recipe.inspect import write_game
from nfd_env.sources.source import SourceConfig, SourceError, make_source

pytest.importorskip("envpool", reason="EnvPool is not installed: pip install 'nfd-env[envpool]'")

CAR = SourceConfig(env_id="envpool/CarRacing-v3", size=[48, 48])


def test_the_same_seed_gives_the_same_episode_and_frames_are_copies() -> None:
    env = make_source(CAR)
    rollouts = []
    for _ in range(2):
        first, _ = env.reset(seed=3)
        kept = first.copy()
        frames = [env.step(np.array([0.3, 0.6, 0.0], np.float32))[0] for _ in range(40)]
        assert np.array_equal(first, kept)
        rollouts.append(np.stack([first, *frames]))
    assert np.array_equal(*rollouts)
    assert rollouts[0].shape == (41, 48, 48, 3) and rollouts[0].dtype == np.uint8
    assert rollouts[0][5:].std(0).max() > 0
    other, _ = env.reset(seed=4)
    assert not np.array_equal(other, rollouts[0][0])
    env.close()


@pytest.mark.parametrize(
    "source, message",
    [
        (SourceConfig("envpool/NoSuchGame-v0"), "no task 'NoSuchGame-v0'"),
        (SourceConfig("envpool/CarRacing-v3", kwargs={"laps": 3}), "no setting 'laps'"),
        (SourceConfig("envpool/CartPole-v1"), "shows no RGB frames"),
        (SourceConfig("envpool/CarRacing-v3", actions=[0, 1]), "source.actions"),
    ],
)
def test_what_cannot_be_made_is_said_at_the_door(source: SourceConfig, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        make_source(source)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("ChaserEasy", ["noop", "up", "right_down", "right", "right_up"]),
        ("FruitbotEasy", ["up", "right_down", "right", "right_up", "fire"]),
        ("NinjaEasy", ["a", "w", "s", "q", "e"]),
    ],
)
def test_actions_that_do_nothing_are_left_out(task: str, names: list[str], tmp_path: Path) -> None:
    try:
        path, _ = write_game(f"envpool/{task}-v0", tmp_path / "g.yaml")
    except SourceError as error:
        if "libqt5gui5" in str(error):
            pytest.skip(str(error))
        raise
    source = load_game(path).source
    assert source.action_names[-5:] == names
    assert source.actions == ([] if task == "NinjaEasy" else [*range(len(source.action_names))])
    assert make_source(source).action_space == gymnasium.spaces.Discrete(len(source.action_names))
    assert ("the others do nothing" in path.read_text()) == bool(source.actions)


def test_chosen_actions_and_a_frame_rate_of_ones_own() -> None:
    source = SourceConfig("envpool/Breakout-v5", actions=[0, 3, 2], fps=15)
    env = make_source(source)
    assert env.action_space == gymnasium.spaces.Discrete(3)
    assert env.metadata["render_fps"] == 15
    env.reset(seed=0)
    _, reward, terminated, _, _ = env.step(2)
    assert reward == 0 and not terminated
    env.close()
    with pytest.raises(SourceError, match="each once"):
        make_source(SourceConfig("envpool/Breakout-v5", actions=[0, 0]))
