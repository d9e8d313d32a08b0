"""What an environment of somebody else's hands over is copied, checked, and refused by name."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.sources.frames import frame_rate
from nfd_env.sources.source import SourceConfig, SourceError, make_source
from nfd_env.sources.spec import short
from tests.sources.test_source import DOOM

ID = "tests/Foreign-v0"
FRAME = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)


class Panic(BaseException):
    """What a game written in Rust raises is no Exception."""


def panic(env: Any, action: Any) -> Any:
    raise Panic("rust")


class Foreign(gymnasium.Env):
    """Shows ``frame`` and does what ``behave(env, action)`` says; knows no render mode."""

    metadata: dict[str, Any] = {}

    def __init__(
        self,
        frame: Any = FRAME,
        behave: Callable[..., Any] | None = None,
        space: spaces.Space | None = None,
        actions: spaces.Space | None = None,
    ) -> None:
        self.frame, self.behave, self.count = frame, behave, 0
        shape, dtype = np.shape(frame), getattr(frame, "dtype", np.uint8)
        self.observation_space = space or spaces.Box(0, 255, shape, dtype)
        self.action_space = actions or spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self.frame, {"seen": self.frame}

    def step(self, action: Any) -> Any:
        self.count += 1
        made = None if self.behave is None else self.behave(self, action)
        return (self.frame, 0.0, False, False, {"seen": self.frame}) if made is None else made

    def render(self) -> Any:
        return self.frame


gymnasium.register(ID, entry_point=Foreign, disable_env_checker=True)


def make(frames: str = "observation", **kwargs: Any) -> gymnasium.Env:
    return make_source(SourceConfig(ID, frames=frames), **kwargs)


def outcome(**changed: Any) -> Callable[..., Any]:
    parts = {"frame": FRAME, "reward": 0.0, "terminated": False, "truncated": False, "info": {}}
    return lambda env, action: tuple({**parts, **changed}.values())


# ------------------------------------------------------------------------------------- at the door


@pytest.mark.parametrize("frames", ["observation", "render"])
@pytest.mark.parametrize("grey", [FRAME[:, :, 0], FRAME[:, :, :1]], ids=["H,W", "H,W,1"])
def test_grey_frames_are_shown_in_grey(grey: np.ndarray, frames: str) -> None:
    env = make(frames, frame=grey)
    observation, _ = env.reset()
    assert observation in env.observation_space
    assert np.array_equal(observation, np.repeat(grey.reshape(8, 12, 1), 3, 2))


def test_transparency_of_a_rendered_picture_is_dropped() -> None:
    env = make("render", frame=np.concatenate([FRAME, FRAME[:, :, :1]], 2))
    assert np.array_equal(env.reset()[0], FRAME)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((8, 12, 4), np.uint8), "RGBA or stacked"),
        (np.zeros((4, 8, 12), np.uint8), "come first"),
        (np.zeros((3, 8, 12), np.uint8), "come first"),
        (np.zeros((4, 8, 12, 3), np.uint8), "one at a time"),
        (np.zeros((8, 12, 3), np.float32), "uint8 from 0 to 255, not float32"),
        (np.zeros((8, 12, 3), np.int64), "not int64"),
        (np.zeros(5, np.uint8), "one at a time"),
    ],
)
def test_other_frames_are_refused_at_the_door(frame: np.ndarray, message: str) -> None:
    with pytest.raises(SourceError, match=f"{ID} .*{message}.*; set frames: render"):
        make(frame=frame)


@pytest.mark.parametrize("frame", [None, [FRAME], "picture", np.zeros((4, 8, 12, 3), np.uint8)])
def test_what_is_rendered_must_be_a_picture(frame: Any) -> None:
    with pytest.raises(SourceError, match="render mode rgb_array|one at a time"):
        make("render", frame=frame, space=spaces.Discrete(2))


def test_an_env_that_knows_no_render_mode() -> None:
    for frames in ("render", "observation"):
        env = make(frames, render_mode="rgb_array")
        observation, _ = env.reset()
        assert np.array_equal(observation, FRAME)
        assert np.array_equal(env.render(), FRAME)


def test_a_slip_in_the_arguments_is_named() -> None:
    with pytest.raises(SourceError, match="unexpected keyword argument 'farme'.*source.kwargs"):
        make(farme=FRAME)


@pytest.mark.parametrize("error", [RuntimeError("no ROM"), SystemExit(3), KeyError()])
def test_a_game_that_cannot_be_made(error: BaseException) -> None:
    class Broken(Foreign):
        def __init__(self) -> None:
            raise error

    gymnasium.register("tests/Broken-v0", entry_point=Broken)
    try:
        with pytest.raises(SourceError, match="tests/Broken-v0 cannot be made: .+"):
            make_source(SourceConfig("tests/Broken-v0"))
    finally:
        del gymnasium.registry["tests/Broken-v0"]


# ----------------------------------------------------------------------------------- while playing


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (outcome(frame=np.zeros((9, 12, 3), np.uint8)), "9 x 12 pixels, those before were 8 x 12"),
        (outcome(frame=FRAME / 255), "float64"),
        (outcome(frame=None), "NoneType instead of an RGB array"),
        (outcome(reward=float("nan")), "reward must be a finite number, got nan"),
        (outcome(reward=np.inf), "reward must be a finite number, got inf"),
        (outcome(reward=1e300), "reward must be a finite number"),
        (outcome(reward=None), "reward must be one number, got None"),
        (outcome(reward=np.zeros(2)), "reward must be one number"),
        (outcome(reward=[[1], [1, 2]]), "reward must be one number"),
        (outcome(terminated=np.zeros(2, bool)), "terminated must be one number"),
        (outcome(truncated="no"), "truncated must be one number"),
        (lambda env, action: (FRAME, 0.0, False, {}), r"step\(\) must return \(observation, rew"),
        (lambda env, action: sys.exit(4), r"step\(\) called exit\(4\)"),
        (panic, r"step\(\) raised Panic: rust"),
        (lambda env, action: {}["\n"], r"step\(\) raised KeyError: .*test_foreign.py, line \d+"),
        (lambda env, action: 1 / 0, r"step\(\) raised ZeroDivisionError: .*test_foreign.py, line"),
    ],
)
def test_nonsense_is_refused_by_name_episode_and_step(
    behave: Callable[..., Any], message: str
) -> None:
    late = lambda env, action: behave(env, action) if env.count == 2 else None  # noqa: E731
    env = make(behave=late)
    env.reset()
    env.step(0)
    env.reset()
    env.step(0)
    with pytest.raises(SourceError, match=f"{ID}, episode 1, step 2: .*{message}") as error:
        env.step(0)
    assert "\n" not in str(error.value)


def test_a_game_that_was_not_begun_is_the_callers_affair() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded):
        make().step(0)


def test_what_cannot_be_printed_is_named_by_its_type() -> None:
    class HalfMade:
        def __repr__(self) -> str:
            raise AttributeError("not yet")

    assert (short(HalfMade()), short(10**5000), short("a\n b")) == (
        "<HalfMade>",
        "<int>",
        "'a\\n b'",
    )


def test_a_game_that_exits_at_reset() -> None:
    class Leaving(Foreign):
        def reset(self, **kwargs: Any) -> Any:
            sys.exit("bye")

    gymnasium.register("tests/Leaving-v0", entry_point=Leaving)
    try:
        env = make_source(SourceConfig("tests/Leaving-v0"))
        with pytest.raises(SourceError, match=r"episode 0, step 0: reset\(\) called exit\('bye'\)"):
            env.reset()
    finally:
        del gymnasium.registry["tests/Leaving-v0"]


@pytest.mark.parametrize("reward", [np.array([2.0]), np.array(2), np.float32(2), True + True])
def test_an_array_of_one_number_is_a_reward(reward: Any) -> None:
    env = make(behave=outcome(reward=reward, terminated=np.array([True])))
    env.reset()
    _, total, terminated, _, _ = env.step(0)
    assert type(total) is float and total == 2.0 and terminated is True


def test_neither_side_changes_what_the_other_holds() -> None:
    kept = []

    def scribble(env: Any, action: Any) -> None:
        kept.append(action)
        action *= 0.5
        env.frame += 1

    env = make(behave=scribble, frame=FRAME.copy(), actions=spaces.Box(-1.0, 1.0, (2,)))
    first, info = env.reset()
    action = np.array([0.5, 1.0], np.float32)
    observation, *_, later = env.step(action)
    assert action.tolist() == [0.5, 1.0] and kept[0].tolist() == [0.25, 0.5]
    assert np.array_equal(first, FRAME) and np.array_equal(info["seen"], FRAME)
    observation[:] = 0
    later["seen"][:] = 0
    assert np.array_equal(env.step(action)[0], FRAME + 2)


# -------------------------------------------------------------------------------------- frame rate


@pytest.mark.parametrize(
    ("told", "exact", "shown"), [(8.75, 8.75, 9), (0.2, 0.2, 1), (None, 30, 30)]
)
def test_a_frame_rate_is_exact_in_recordings_and_whole_for_writers_of_films(
    monkeypatch: pytest.MonkeyPatch, told: float | None, exact: float, shown: int
) -> None:
    monkeypatch.setattr(Foreign, "metadata", {"render_fps": told})
    for env in make(), make_source(SourceConfig(ID, fps=told or 0.0)):
        assert env.metadata["render_fps"] == shown and type(env.metadata["render_fps"]) is int
        assert frame_rate(env) == frame_rate(gymnasium.wrappers.TimeLimit(env, 5)) == exact


@pytest.mark.parametrize("told", [math.nan, math.inf, -1, "fast", [30], 1e9])
def test_what_is_no_frame_rate_is_named(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    monkeypatch.setattr(Foreign, "metadata", {"render_fps": told})
    with pytest.raises(SourceError, match="render_fps is .*, which is no frame rate; set source.f"):
        make()
    assert make_source(SourceConfig(ID, fps=12)).metadata["render_fps"] == 12


# ----------------------------------------------------------------------------------------- ViZDoom


def game_folder(game: Any) -> Path:
    return Path(game.unwrapped.game.get_vizdoom_path()).parent


KILLED = """
import os, signal
from nfd_env.sources.source import make_source
from tests.sources.test_source import DOOM
game = make_source(DOOM)
print(game.unwrapped.game.get_vizdoom_path(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_game_goes_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vizdoom")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    running: Any = make_source(DOOM)
    told = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    left = Path(told.stdout.strip()).parent
    assert left.parent == tmp_path and left.exists()
    elsewhere = tmp_path / "elsewhere"  # of somebody else's
    elsewhere.mkdir()
    (tmp_path / left.name).with_name(f"{left.name}x").symlink_to(elsewhere)
    other: Any = make_source(DOOM)
    assert not left.exists() and elsewhere.exists()
    assert game_folder(running).exists() and game_folder(other).exists()
    for game in running, other:
        game.close()
        game.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"elsewhere", f"{left.name}x"}


def test_games_started_at_once_leave_nothing_where_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    games: list[Any] = [make_source(DOOM) for _ in range(3)]
    folders = [game_folder(game) for game in games]
    with ThreadPoolExecutor(3) as pool:
        frames = list(pool.map(lambda game: game.reset(seed=3)[0], games))
    assert all(np.array_equal(frame, frames[0]) for frame in frames)
    for game in games:
        game.step(1)
        game.close()
    assert not any(tmp_path.iterdir())
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("action", [-1, 2, 99])
def test_only_chosen_actions_are_taken(action: int) -> None:
    """A list counts from its end: -1 was the last one, silently."""
    env = make_source(SourceConfig(ID, frames="observation", actions=[1, 0]))
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(ValueError, match=f"a number from 0 to 1, got {action}"):
        env.step(action)
    env.close()
