"""Recordings whose frames stay in the videos they came in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.config import ConfigError
from nfd_env.data.importers import import_recordings
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.data.videos import VideoFrames, _Decoder, _decoder
from nfd_env.data.windows import Places
from nfd_env.sources.source import SourceConfig
from tests.data.test_importers import assert_aligned, of, played, videos

__all__ = ["played"]  # a fixture


def lying(folder: Path, **settings: Any) -> SourceConfig:
    source = of(folder, **settings)
    return replace(source, kwargs={**source.kwargs, "copy": False})


@pytest.fixture
def where(tmp_path: Path, played: RecordedDataset) -> Path:
    _decoder.cache_clear()
    return videos(tmp_path / "v", played)


def test_frames_are_those_of_a_copy_and_are_not_copied(where: Path, tmp_path: Path) -> None:
    size = [24, 32]
    copied = import_recordings(of(where, size=size), tmp_path / "c", 12, 3, False)
    data = import_recordings(lying(where, size=size), tmp_path / "d", 12, 3, False)
    assert [len(e) for e in data] == [len(e) for e in copied] == [12, 12, 6] * 3
    data.check(6)
    stored = {p.name for p in (tmp_path / "d").rglob("*.bin")}
    assert stored == {"pts.bin", "actions.bin", "rewards.bin", "ends.bin"}
    rng = np.random.default_rng(0)
    for number in rng.permutation(len(data)):
        mine, its = data.episodes[int(number)], copied.episodes[int(number)]
        assert isinstance(mine.frames, VideoFrames)
        first = int(rng.integers(len(mine)))
        np.testing.assert_array_equal(mine.frames[first : first + 3], its.frames[first : first + 3])
        np.testing.assert_array_equal(mine.actions, its.actions)
    (mine,), (its,) = data.shard_frames().values(), copied.shard_frames().values()
    np.testing.assert_array_equal(np.asarray(mine), its)  # as they are encoded


def test_it_goes_on_where_it_stopped_and_reads_nothing_again(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = [p.rename(tmp_path / p.name) for p in where.glob("2.*")]
    import_recordings(lying(where), tmp_path / "d", 12, 2, False)
    for path in hidden:
        path.rename(where / path.name)
    (where / "0.csv").write_text("broken")  # of a video that is there
    data = import_recordings(lying(where), tmp_path / "d", 12, 2, False)
    assert [len(e) for e in data] == [12, 12, 6] * 3
    whole = import_recordings(lying(where), tmp_path / "d", 12, 2, False)
    assert len(whole) == 9


def test_what_goes_on_is_decoded_once(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = import_recordings(lying(where), tmp_path / "d", 100, 2, False)
    assert_aligned(data, [30, 30, 30])
    _decoder.cache_clear()
    jumps: list[int] = []
    jump = _Decoder._jump
    monkeypatch.setattr(_Decoder, "_jump", lambda s, t: (jumps.append(t), jump(s, t))[1])
    frames = data.episodes[0].frames
    for first in range(0, 28, 2):
        _ = frames[first : first + 3]
    assert len(jumps) == 1
    assert _decoder.cache_info().currsize == 1
    assert len(_decoder(*next(iter([(frames.video, (), ())])))._kept) <= 64


def test_a_video_that_is_gone_or_another(where: Path, tmp_path: Path) -> None:
    data = import_recordings(lying(where), tmp_path / "d", 100, 2, False)
    (where / "1.mp4").rename(where / "x.mp4")
    with pytest.raises(RecordingError, match=r"1\.mp4 is missing: the recordings refer to it"):
        _ = data.episodes[1].frames
    (where / "1.mp4").write_bytes(b"nothing")
    _decoder.cache_clear()  # another process
    with pytest.raises(RecordingError, match=r"1\.mp4 cannot be read"):
        _ = data.episodes[1].frames[0]


def test_what_cannot_be_left_where_it_is(where: Path, tmp_path: Path) -> None:
    source = lying(where)
    with pytest.raises(ConfigError, match="action_space must be set where copy is false"):
        import_recordings(replace(source, kwargs={"copy": False}), tmp_path / "d", 12, 2, False)
    import_recordings(of(where), tmp_path / "c", 12, 2, False)
    with pytest.raises(RecordingError, match="another source, in_videos"):
        import_recordings(source, tmp_path / "c", 12, 2, False)


VPT = [
    "keyboard.keys:key.keyboard.w",
    "mouse.buttons:0",
    "mouse.dx",
]


def test_rows_like_those_of_vpt(where: Path, tmp_path: Path) -> None:
    for path in where.glob("*.csv"):
        path.unlink()
        rows = [
            {
                "mouse": {"dx": 50.0 * n, "buttons": [0] * (n % 2)},
                "keyboard": {"keys": ["key.keyboard.w", "key.keyboard.d"][n % 2 :]},
                "tick": n,
            }
            for n in range(30)
        ]
        path.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    space = {"type": "Box", "low": [0, 0, -100], "high": [1, 1, 100], "dtype": "float32"}
    kwargs = {"copy": False, "clip": True, "columns": VPT, "action_space": space}
    data = import_recordings(SourceConfig(f"videos:{where}", kwargs=kwargs), tmp_path / "d")
    actions = data.episodes[0].actions
    assert actions[:4].tolist() == [[1, 0, 0], [0, 1, 50], [1, 0, 100], [0, 1, 100]]
    wrong = {**kwargs, "columns": ["mouse.dz", *VPT[1:]]}
    with pytest.raises(RecordingError, match=r"0\.jsonl: a row has no entry 'mouse\.dz'"):
        import_recordings(SourceConfig(f"videos:{where}", kwargs=wrong), tmp_path / "e")


def test_runs_of_places_stay_within_their_episodes() -> None:
    places = Places([3, 0, 40, 20], 2)
    rng = np.random.default_rng(0)
    drawn = places.draw(rng, 64, 16).reshape(4, 16)
    for run in drawn:
        episodes = {places.find(int(place))[0] for place in run}
        assert len(episodes) == 1 and (np.diff(run) >= 0).all()
    assert np.array_equal(
        places.draw(np.random.default_rng(1), 8),
        np.random.default_rng(1).integers(0, len(places), 8),
    )
