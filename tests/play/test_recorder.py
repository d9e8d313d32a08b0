"""Recordings of a play: nothing is lost, whatever ends it."""

import errno
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.files import FolderError  # noqa: E402
from nfd_env.play import recorder as recorders
from nfd_env.play.game import EnvGame, Outcome
from nfd_env.play.keys import Keymap
from nfd_env.play.recorder import PlayRecorder

SHAPE = (4, 6, 3)


@pytest.fixture
def often(monkeypatch):
    """Commits come after every few steps."""
    monkeypatch.setattr(recorders, "_COMMIT_EVERY", 0.01)


def frame(number):
    return np.full(SHAPE, number % 256, np.uint8)


def opened(folder, failed=pytest.fail, **kwargs):
    return PlayRecorder(folder, SHAPE, spaces.Discrete(9), {"env_id": "x"}, 35, failed, **kwargs)


def play(recorder, numbers, end="", pause=0.0, by_agent=False):
    for n in numbers:
        last = n == numbers[-1]
        outcome = Outcome(frame(n), n, last and end == "over", last and end == "cut", {})
        recorder.took(n % 9, outcome, by_agent)
        time.sleep(pause)


def until(true, seconds=300):  # a machine may be busy
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it never came true")


def test_pieces_become_the_episode_that_was_played(tmp_path, often):
    recorder = opened(tmp_path)
    for seed, end in ((7, "over"), (8, "cut"), (9, "")):
        recorder.began(frame(0), seed)
        play(recorder, range(1, 21), pause=0.003)
        play(recorder, range(21, 41), end, pause=0.003, by_agent=True)
    recorder.close()
    episodes = [e.load() for e in RecordedDataset(tmp_path)]
    assert [e.seed for e in episodes] == [7, 8, 9] and recorder.saved == 3
    for episode, terminated in zip(episodes, (True, False, False), strict=True):
        assert episode.frames[:, 0, 0, 0].tolist() == list(range(41))
        assert episode.actions.tolist() == [n % 9 for n in range(1, 41)]
        assert episode.rewards.tolist() == list(range(1, 41))
        assert episode.policy == "agent+person"
        assert episode.terminated.tolist() == [False] * 39 + [terminated]
        assert episode.truncated.tolist() == [False] * 39 + [not terminated]
    assert [e.total_reward for e in RecordedDataset(tmp_path)] == [820.0] * 3


def test_the_picture_of_a_game_that_failed_is_not_recorded_again(tmp_path):
    recorder = opened(tmp_path)
    recorder.began(frame(0), 7)
    play(recorder, range(1, 4))
    recorder.took(4, Outcome(frame(3), 0.0, False, True, {}, error="the game failed"), False)
    play(recorder, range(5, 8))  # until another episode begins
    recorder.began(frame(10), 8)
    play(recorder, range(11, 13))
    recorder.close()
    first, second = (e.load() for e in RecordedDataset(tmp_path))
    assert first.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and first.rewards.tolist() == [1, 2, 3]
    assert not first.terminated.any()
    assert second.frames[:, 0, 0, 0].tolist() == [10, 11, 12]


def test_what_was_played_is_there_before_the_end(tmp_path, often):
    recorder = opened(tmp_path)
    recorder.began(frame(0), 1)
    lengths = []
    for first in (1, 11, 21):
        play(recorder, range(first, first + 10))
        until(lambda to=first + 9: [len(e) for e in RecordedDataset(tmp_path)] == [to])
        (episode,) = RecordedDataset(tmp_path)
        lengths.append(len(episode))
        assert episode.truncated.tolist() == [False] * (len(episode) - 1) + [True]
        assert episode.load().frames[-1, 0, 0, 0] == len(episode)
    recorder.close()
    assert lengths == [10, 20, 30] and len(RecordedDataset(tmp_path)) == 1


def test_long_episodes_become_segments_and_another_recording_follows(tmp_path, often):
    for _ in range(2):
        recorder = opened(tmp_path, limit=10)
        recorder.began(frame(0), 3)
        play(recorder, range(1, 26), "over")
        play(recorder, range(26, 30))  # nothing has begun
        recorder.close()
        play(recorder, range(30, 33))
        recorder.close()
    episodes = list(RecordedDataset(tmp_path))
    assert [len(e) for e in episodes] == 2 * [10, 10, 5]
    assert [bool(e.terminated[-1]) for e in episodes] == 2 * [False, False, True]
    assert episodes[1].load().frames[0, 0, 0, 0] == 10


def test_one_episode_in_eleven_is_held_out_the_second_to_begin_with(tmp_path):
    for count in (1, 24):
        recorder = opened(tmp_path, limit=10)
        for seed in range(count):
            recorder.began(frame(0), seed)
            recorder.began(frame(0), seed)  # reset before anything was done
            play(recorder, range(1, 16), "over")
        recorder.close()
    splits = [e.split for e in RecordedDataset(tmp_path)]
    # Two segments each; those of one episode stay together.
    assert splits[::2] == splits[1::2]
    held_out = [n for n, split in enumerate(splits[::2]) if split == "validation"]
    assert held_out == [1, 12, 23]


def test_a_full_disk_ends_the_recording_with_one_line(tmp_path, often, monkeypatch):
    said = []
    recorder = opened(tmp_path, said.append)
    recorder.began(frame(0), 1)
    play(recorder, range(1, 6))
    until(lambda: [len(e) for e in RecordedDataset(tmp_path)] == [5])

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        play(recorder, range(6, 9))
        until(lambda: said)
        assert recorder.ended
        play(recorder, range(9, 12))  # the game goes on
        recorder.began(frame(0), 2)
        play(recorder, range(1, 4))
        recorder.close()
    assert len(said) == 1 and "No space left on device" in said[0] and "\n" not in said[0]
    (episode,) = RecordedDataset(tmp_path)
    assert len(episode) == 5 and episode.load().frames[-1, 0, 0, 0] == 5
    recorder = opened(tmp_path)
    recorder.began(frame(0), 3)
    play(recorder, range(1, 4), "over")
    recorder.close()
    assert [len(e) for e in RecordedDataset(tmp_path)] == [5, 3]


def test_recordings_of_something_else_are_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(RecordingError, match="another action_space"):
        PlayRecorder(tmp_path, SHAPE, spaces.Discrete(2), {"env_id": "x"}, 35, pytest.fail)


WINDOW = """
import sys
from nfd_env.play import recorder
from nfd_env.play.window.player import KeyboardPlayer
from tests.play.scroll_game import ScrollGame
recorder._COMMIT_EVERY = float(sys.argv[2])

def on_shown(shown):
    if shown.number > 20:
        print("going", flush=True)

KeyboardPlayer(ScrollGame(1, fps=100), seed=1, save=sys.argv[1], on_shown=on_shown).run()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_window_that_is_ended_has_kept_the_play(tmp_path, name):
    pytest.importorskip("pygame")
    number, folder = getattr(signal, name), tmp_path / "kept"
    killed = name == "SIGKILL"
    environment = os.environ | {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    process = subprocess.Popen(
        [sys.executable, "-c", WINDOW, str(folder), "0.2" if killed else "1000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line == "going\n":
                break
        if killed:
            until(lambda: [len(e) > 30 for e in RecordedDataset(folder)] == [True])
        else:
            assert len(RecordedDataset(folder)) == 0  # nothing yet, so the end has to do it
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    codes = {"SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9, "SIGINT": -2}
    assert process.returncode == codes[name], said
    (episode,) = RecordedDataset(folder)
    assert len(episode) > 10 and episode.truncated[-1] and episode.policy == "person"
    blue = episode.load().frames[:, 0, 0, 2]
    assert (blue == blue[0]).all()  # nobody pressed a key


class Halving(gymnasium.Env):
    """Spoils the actions that it is given."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        return self.render(), {}

    def step(self, action):
        action *= 0.5
        return self.render(), 0.0, False, False, {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


def test_a_game_cannot_change_what_was_pressed():
    env = Halving()
    game = EnvGame(env, Keymap(env.action_space, []))
    action = np.ones(2, np.float32)
    game.step({0: action})
    assert action.tolist() == [1, 1]


def test_a_server_that_could_save_nothing_does_not_begin(tmp_path):
    pytest.importorskip("aiohttp")
    from nfd_env.play.web.saving import Saver

    file = tmp_path / "file"
    file.write_text("x")
    for wrong in (file, file / "below"):
        with pytest.raises(FolderError, match="file.* cannot be made"):
            Saver(wrong)
    Saver(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
