"""OpenCV's libraries are not everywhere: only frames of another size need it, and say so first."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfd_env.data.alignment import _CELLS, _averages, measure_alignment
from nfd_env.data.collect import CollectConfig, PolicyConfig, collect
from nfd_env.data.shards import RecordedDataset
from nfd_env.data.summary import save_contact_sheet
from nfd_env.evaluation.film import beside
from nfd_env.sources.source import SourceError, make_source
from nfd_env.video import enlarge, write_png
from tests.counter_env import record_counter_episodes, source


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)


def test_what_was_recorded_is_shown_and_measured(tmp_path: Path) -> None:
    record_counter_episodes(tmp_path, 12)
    data = RecordedDataset(tmp_path)
    picture = save_contact_sheet(data)
    assert picture is not None
    assert np.array(Image.open(picture)).shape == (6 * 96, 8 * 144, 3)
    assert measure_alignment(data).transitions > 0


def test_pictures(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    assert np.array_equal(np.array(Image.open(write_png(tmp_path / "ü" / "a", frame))), frame)
    assert enlarge(frame, 40).shape == (40, 60, 3) and enlarge(frame, 40, 2.0).shape == (40, 80, 3)
    shown = beside([(frame, "real recording"), (frame, "")])
    assert shown.shape == (192 + 24, 2 * 288 + 8, 3)
    assert shown[:24, :288].std() > 10 and shown[:24, 296:].std() == 0  # a word, and none


def test_cells_are_means_of_areas() -> None:
    for size in (16, 32, 50, 64, 144):
        weights = _averages(size)
        assert weights.shape == (_CELLS, size)
        assert np.allclose(weights.sum(1), 1)
        assert np.allclose(weights.sum(0), _CELLS / size)  # each pixel counts alike


def test_frames_of_another_size_are_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    make_source(source()).close()
    with pytest.raises(SourceError, match="source.size needs OpenCV.*apt install libgl1"):
        make_source(source(size=[16, 24]))
    policies = [PolicyConfig("random_held")]
    with pytest.raises(SourceError, match="source.size needs OpenCV"):
        collect(CollectConfig(source(size=[16, 24]), str(tmp_path / "d"), 50, policies), False)
    assert not (tmp_path / "d").exists()
