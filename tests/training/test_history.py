"""The history's noise levels in training."""

from __future__ import annotations

import pytest
import torch

from nfd_env.training.history import HistoryLevels


def test_without_drafts_all_history_is_almost_clean() -> None:
    torch.manual_seed(0)
    levels = HistoryLevels(0.4, 1.0, 0.0).sample((64, 50), 3.0)
    assert levels.min() >= 0 and levels.max() <= 0.4 and levels.max() > 0.39
    assert 0.11 < (levels < 0.05).float().mean() < 0.14
    skewed = HistoryLevels(0.4, 3.0, 0.0).sample((64, 50), 3.0)
    assert 0.46 < (skewed < 0.05).float().mean() < 0.54 and skewed.max() > 0.37


def test_drafted_runs() -> None:
    torch.manual_seed(0)
    levels = HistoryLevels(0.0, 1.0, 0.05).sample((4000, 40), 3.0)
    drafted = levels > 0
    # Every row's drafted frames share one level, and in half of the rows it is pure noise.
    row = levels.amax(1)
    assert torch.equal(levels, drafted * row[:, None])
    some = drafted.any(1)
    assert 0.45 < (row[some] == 1).float().mean() < 0.55
    # One begun run has 1, 2, 3 or 4 frames with probability 1/2, 1/4, 1/8, 1/8.
    rare = HistoryLevels(0.0, 1.0, 0.004).sample((200_000, 12), 3.0) > 0
    length = rare.sum(1)[rare[:, 0]]  # hardly any row has two runs
    shares = torch.bincount(length, minlength=5)[1:5] / len(length)
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.06), shares


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_level": 1.1}, "max_level must be from 0 to 1"),
        ({"skew": 0.0}, "skew must be above 0"),
        ({"draft_share": -0.1}, "draft_share must be from 0 to 1"),
        ({"draft_share": 1.1}, "draft_share must be from 0 to 1"),
    ],
)
def test_impossible_levels(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistoryLevels(**values)
