from __future__ import annotations

import pytest
import torch

from nfd_env.models.sight import Sight


def seen(sight: Sight, query: int) -> list[int]:
    keys = torch.arange(query + 5)
    return keys[sight.sees(torch.tensor(query), keys)].tolist()


def test_the_latest_frames_and_key_frames_before_them() -> None:
    sight = Sight(window=3, keyframes=2, stride=4)
    assert sight.frames == 5 and sight.reach == 11
    assert seen(sight, 0) == [0]
    assert seen(sight, 2) == [0, 1, 2]
    assert seen(sight, 3) == [0, 1, 2, 3]
    assert seen(sight, 5) == [0, 3, 4, 5]
    assert seen(sight, 12) == [4, 8, 10, 11, 12]  # 12 is a key frame itself
    assert seen(sight, 14) == [4, 8, 12, 13, 14]
    assert seen(sight, 15) == [8, 12, 13, 14, 15]


@pytest.mark.parametrize(("window", "keyframes", "stride"), [(2, 1, 1), (8, 8, 8), (5, 3, 7)])
def test_a_full_history_shows_as_many_frames_as_it_says(
    window: int, keyframes: int, stride: int
) -> None:
    sight = Sight(window, keyframes, stride)
    for query in range(3 * sight.reach, 3 * sight.reach + 2 * stride):
        numbers = seen(sight, query)
        assert len(numbers) == sight.frames
        assert query - numbers[0] < sight.reach


def test_without_key_frames_there_is_only_the_window() -> None:
    assert seen(Sight(4), 20) == [17, 18, 19, 20]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 1}, "window must be at least 2 frames, got 1"),
        ({"window": 2, "keyframes": -1}, "keyframes must not be negative"),
        ({"window": 2, "stride": 0}, "their stride at least 1"),
    ],
)
def test_ranges(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sight(**wrong)
