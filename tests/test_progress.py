from __future__ import annotations

import pytest

from nfd_env.progress import progress_bar


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(20_000), "rollouts", True)) == list(range(20_000))
    written = capsys.readouterr().err
    assert "rollouts" in written and written.count("\r") <= 3


def test_it_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(progress_bar(range(5), "rollouts", False))) == 5
    assert capsys.readouterr().err == ""
