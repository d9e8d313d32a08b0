"""Recordings that are long enough for short windows."""

from __future__ import annotations

import pytest

from nfd_env.data.shards import RecordedDataset
from tests.counter_env import record_counter_episodes


@pytest.fixture(scope="session")
def long_recordings(tmp_path_factory: pytest.TempPathFactory) -> RecordedDataset:
    """Two of four episodes of 90 transitions are held out. Do not write into it."""
    folder = tmp_path_factory.mktemp("long")
    record_counter_episodes(folder, episodes=4, validation_every=2, length=90)
    return RecordedDataset(folder)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that asks for this depends on rollouts being long."""
    from nfd_env.evaluation import evaluate, held_out, reports

    for module in (held_out, evaluate, reports):
        for name, value in (("EARLY", 70), ("LONG", 160), ("HORIZONS", (1, 8, 32))):
            monkeypatch.setattr(module, name, value, raising=False)
