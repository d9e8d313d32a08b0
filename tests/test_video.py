"""Videos are whole or not there."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nfd_env import video
from nfd_env.play.recording import VideoFile
from nfd_env.video import caption, mp4_writer, read_mp4, write_gif, write_mp4

FRAMES = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(8)]


def test_frames_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    write_mp4(path, FRAMES, 30)
    assert np.abs(read_mp4(path).astype(int) - np.stack(FRAMES)).max() <= 3
    write_mp4(path, FRAMES, 30, size=(96, 64), pixelated=True, live=True)
    assert read_mp4(path).shape == (8, 64, 96, 3)
    target = io.BytesIO()
    write_mp4(target, FRAMES, 30)
    assert target.getvalue()[4:8] == b"ftyp"


@pytest.mark.parametrize("text", ["real   up", "generated, same actions   frame 1000"])
def test_a_caption_is_readable_above_a_narrow_frame(text: str) -> None:
    bar = caption(np.zeros((192, 192, 3), np.uint8), text)[:24]
    written = np.flatnonzero((bar > 60).any((0, 2)))
    assert written[0] >= 5 and written[-1] < 188  # nothing is cut off


def test_a_film_is_read_only_as_far_as_it_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, FRAMES, 30)
    assert len(read_mp4(path, 8)) == 8
    with pytest.raises(ValueError, match="a.mp4: has more than 7 frames"):
        read_mp4(path, 7)
    size = FRAMES[0].nbytes
    for most in (1, 8):  # one picture that is too large, and too many
        monkeypatch.setattr(video, "_LARGEST", most * size - 1)
        with pytest.raises(ValueError, match="a.mp4: its frames take more than"):
            read_mp4(path)


def test_after_an_error_the_old_file_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), mp4_writer(path, 30) as append:
        append(FRAMES[0])
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="no frames to write"):
        write_mp4(path, [], 30)
    with pytest.raises(AttributeError):
        write_gif(tmp_path / "a.gif", [FRAMES[0], None], 30)  # type: ignore[list-item]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_no_broken_film(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    code = (
        "import sys, time, numpy as np; from nfd_env.play.recording import VideoFile\n"
        "film = VideoFile(sys.argv[1], 30, (48, 32))\n"
        "for i in range(100): film.add(np.zeros((32, 48, 3), np.uint8))\n"
        "print('playing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"playing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not path.exists()


def test_a_film_of_a_play(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    film = VideoFile(path, 30, (96, 64))
    for frame in FRAMES:
        film.add(frame)
    assert not path.exists()
    film.close()
    assert read_mp4(path).shape == (8, 64, 96, 3)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        VideoFile(tmp_path / "file" / "a.mp4", 30, (96, 64))
    broken = VideoFile(path, 30, (96, 64))
    broken.add(np.zeros((3,), np.uint8))
    for frame in FRAMES * 100:  # more than the queue holds: nobody waits for ever
        broken.add(frame)
    with pytest.raises(OSError, match="the video could not be written"):
        broken.close()
    assert read_mp4(path).shape == (8, 64, 96, 3)
