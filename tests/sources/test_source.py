"""The real environment seen through a world's eyes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.sources import processes
from nfd_env.sources.source import SourceConfig, SourceError, make_source
from nfd_env.sources.spec import GameFailedError, recorded_part
from tests.counter_env import HEIGHT, WIDTH, move, read, source


def finish(env: Any, action: int = 2) -> list[np.ndarray]:
    """All frames of an episode, the first one included."""
    frames = [env.reset(seed=0)[0]]
    while True:
        observation, _, terminated, truncated, _ = env.step(action)
        frames.append(observation)
        if terminated or truncated:
            return frames


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [({}, {}), ({"key": "screen"}, {"dict_key": "screen"}), ({"frames": "render"}, {})],
)
def test_frames_from_everywhere(settings: dict[str, Any], kwargs: dict[str, Any]) -> None:
    env = make_source(source(kwargs=kwargs, **settings), length=5)
    assert env.observation_space.shape == (HEIGHT, WIDTH, 3)
    frames = np.stack(finish(env))
    assert frames.dtype == np.uint8 and frames[0] in env.observation_space
    counter, steps = read(frames)
    assert steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.diff(counter).tolist() == [move(2)] * 5


def test_space_reward_and_ends_are_the_envs_own() -> None:
    env = make_source(source(kwargs={"length": 2}))
    assert env.action_space.n == 3
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated, info) == (-1.0, False, False, {})
    assert type(reward) is float and type(terminated) is bool
    assert env.step(2)[1:4] == (1.0, True, False)


def test_an_opening_is_passed_at_rest_and_counts_for_nothing() -> None:
    plain = make_source(source(), length=8)
    plain.reset(seed=0)
    for _ in range(3):
        plain.step(1)  # rests, by its name below
    after = plain.step(2)
    env = make_source(source(opening=3, action_names=["left", "noop", "right"]), length=8)
    first, _ = env.reset(seed=0)
    assert read(first[None])[1].tolist() == [3]
    step = env.step(2)
    assert np.array_equal(step[0], after[0]) and step[1:4] == after[1:4]


def test_an_opening_that_a_game_does_not_outlive_is_said() -> None:
    env = make_source(source(opening=3), length=3)
    with pytest.raises(GameFailedError, match="within its opening of 3 steps"):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="source.opening must be from 0 to 10000, got -1"):
        source(opening=-1)


def test_only_an_opening_that_is_there_takes_part_in_what_was_recorded() -> None:
    older = {k: v for k, v in asdict(source()).items() if k != "opening"}
    assert recorded_part(asdict(source())) == recorded_part(older)
    assert recorded_part(asdict(source(opening=1))) != recorded_part(older)


def test_crop_and_resize() -> None:
    whole = make_source(source()).reset(seed=0)[0]
    cropped = make_source(source(crop=[8, 24, 16, 48])).reset(seed=0)[0]
    assert np.array_equal(cropped, whole[8:24, 16:48])
    env = make_source(source(crop=[8, 24, 16, 48], size=[8, 16]))
    assert env.observation_space.shape == (8, 16, 3)
    small = env.reset(seed=0)[0]
    averages = cropped.reshape(8, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(small - averages).max() <= 1
    read(make_source(source(size=[16, 24])).reset(seed=0)[0])  # still readable


@pytest.mark.parametrize("kwargs", [{}, {"dict_key": "screen"}])
def test_a_terminal_step_without_a_frame_shows_the_last_one_again(kwargs: dict[str, Any]) -> None:
    settings = source(key=kwargs.get("dict_key", ""), terminal_frame=False)
    frames = finish(make_source(settings, length=4, hide_terminal=True, **kwargs))
    assert read(np.stack(frames))[1].tolist() == [0, 1, 2, 3, 3]
    assert np.array_equal(frames[-1], frames[-2])
    # Without the setting, the hidden frame is what it is.
    plain = finish(
        make_source(replace(settings, terminal_frame=True), hide_terminal=True, **kwargs)
    )
    assert not plain[-1].any()
    # It begins anew after a reset.
    env = make_source(settings, length=4, hide_terminal=True, **kwargs)
    finish(env)
    assert read(env.reset(seed=0)[0])[1] == 0


def test_observations_belong_to_the_caller() -> None:
    env = make_source(source(kwargs={"length": 3}, terminal_frame=False), hide_terminal=True)
    frames = finish(env)  # the counter env draws into one buffer
    assert len({f.tobytes() for f in frames[:3]}) == 3
    first, _ = env.reset(seed=0)
    kept = first.copy()
    env.step(1)
    assert np.array_equal(first, kept)
    env.reset(seed=0)[0][:] = 0
    observation = env.step(1)[0]
    observation[:] = 0
    env.step(1)
    assert env.step(1)[0].any()


def test_render_shows_what_is_observed() -> None:
    env = make_source(source(crop=[8, 24, 16, 48]), render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert np.array_equal(env.render(), observation)
    observation = env.step(2)[0]
    shown = env.render()
    assert np.array_equal(shown, observation)
    shown[:] = 0
    assert np.array_equal(env.render(), observation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (source(key="screen"), "no observation entry 'screen'"),
        (source(crop=[0, 33, 0, 48]), "does not lie inside"),
        (SourceConfig("CartPole-v1"), "set frames: render"),
        (SourceConfig("Game-v0", imports=["no_such_game.envs"]), "pip install no_such_game"),
    ],
)
def test_wrong_sources(settings: SourceConfig, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        make_source(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": "screen"}, "observation or render"),
        ({"size": [0, 0]}, r"source.size must be \[height, width\]"),
        ({"size": [96]}, r"source.size must be \[height, width\]"),
        ({"crop": [8, 8, 0, 48]}, r"source.crop must be \[top, bottom"),
        ({"crop": [1, 2]}, r"source.crop must be \[top, bottom"),
        ({"crop": [-1, 2, 0, 1]}, r"source.crop must be \[top, bottom"),
        ({"fps": math.nan}, "source.fps must be from 0.01 to 10000, got nan"),
        ({"fps": -1}, "source.fps must be from"),
        ({"display_aspect": math.inf}, "source.display_aspect must be from 0 to 100"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig("Game-v0", **settings)


def test_an_unknown_environment_is_a_source_error() -> None:
    with pytest.raises(SourceError, match="NoSuchGame-v0"):
        make_source(SourceConfig("NoSuchGame-v0"))


def test_a_dict_without_the_entry() -> None:
    with pytest.raises(SourceError, match="no observation entry 'frame'"):
        make_source(source(kwargs={"dict_key": "screen"}, key="frame"))


# ----------------------------------------------------------------------------------------- ViZDoom

DOOM = SourceConfig(
    "VizdoomTakeCover-v1",
    imports=["vizdoom.gymnasium_wrapper"],
    key="screen",
    crop=[60, 180, 0, 320],
    size=[96, 128],
    terminal_frame=False,
)


def test_doom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)  # the game writes its settings where it runs
    env = make_source(DOOM, episode_timeout=25)
    try:
        assert env.action_space.n == 3
        assert env.observation_space.shape == (96, 128, 3)
        frames = finish(env, action=1)
        assert all(f in env.observation_space for f in frames)
        assert np.array_equal(frames[-1], frames[-2])
        assert len({f.tobytes() for f in frames}) > len(frames) / 2
        assert frames[-1].any()
        # The same seed is the same game.
        again = finish(env, action=1)
        assert all(np.array_equal(a, b) for a, b in zip(frames, again, strict=True))
    finally:
        env.close()


def test_doom_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("vizdoom", "vizdoom.gymnasium_wrapper"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="pip install vizdoom"):
        make_source(DOOM)


PATIENCE = 300  # seconds; a machine may be busy
GAME = """
import ctypes, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
import gymnasium
from nfd_env.sources.source import make_source
from tests.counter_env import CounterEnv, source

class Game(CounterEnv):
    def reset(self, **kwargs):
        if not hasattr(self, "process"):
            self.process = subprocess.Popen(["sleep", "600"], start_new_session=True)
            os.write(1, f"{self.process.pid} ".encode())
        return super().reset(**kwargs)

gymnasium.register("tests/Game-v0", Game)
kind = source()
games = [make_source(type(kind)(**{**vars(kind), "env_id": "tests/Game-v0"})) for _ in range(12)]
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda game: game.reset(seed=0), games))
if "forked" in sys.argv[1] and not ctypes.CDLL(None).fork():  # behind Python's back
    time.sleep(600)
if "killed" in sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["killed", "forgotten", "forked, killed", "forked, forgotten"])
def test_games_do_not_outlive_who_started_them(end: str) -> None:
    with tempfile.TemporaryFile() as output:  # a pipe would be held by what was forked
        done = subprocess.Popen([sys.executable, "-c", GAME, end], stdout=output, process_group=0)
        try:
            done.wait(timeout=PATIENCE)
            output.seek(0)
            games = [int(pid) for pid in output.read().split()]
            deadline = time.monotonic() + PATIENCE
            while any(map(_runs, games)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(games) == 12 and not any(map(_runs, games))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_whose_names_are_cut_in_a_character() -> None:
    """Anybody's on this machine: names end after 15 bytes."""
    rename = "open('/proc/self/comm', 'wb').write('ä'.encode() * 7 + b'\xc3'); print(); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert process.pid in processes._children()
    finally:
        process.communicate(b"\n")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
