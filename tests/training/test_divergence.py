"""Which losses have exploded, and which are only noisy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from nfd_env.training.divergence import LossWatch, TrainingDiverged


def fires_at(losses: Sequence[float] | np.ndarray, parts: Sequence[str] = ()) -> int | None:
    watch = LossWatch()
    for step, loss in enumerate(losses):
        try:
            watch.see(float(loss), [parts[step]] if len(parts) else [])
        except TrainingDiverged:
            return step
    return None


def noise(steps: int, spread: float, seed: int = 0) -> np.ndarray:
    """Log-normal factors of median 1."""
    return np.exp(spread * np.random.default_rng(seed).normal(size=steps))


STEPS = np.arange(3000)
USUAL = {
    "falls": 2 * np.exp(-STEPS / 300) + 0.15,
    "falls at once": np.where(STEPS < 25, 500.0, 0.2),
    "one bad batch in ten": np.where(STEPS % 10 == 0, 1000.0, 0.15),
    "a student that begins as its teacher": 0.8 * np.clip(STEPS / 500, 0, 1) ** 2,
    "twice as much after a restart": np.where(STEPS < 1500, 0.2, 0.4),
    "negative": np.linspace(1, -3, 3000),
    "zero": np.zeros(3000),
    "from nothing to a good one": np.where(STEPS < 1500, 1e-6, 0.05),
}


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_ordinary_losses_do_not_fire(name: str, spread: float) -> None:
    for seed in range(2):
        assert fires_at((USUAL[name] * noise(3000, spread, seed))[::2]) is None


@pytest.mark.parametrize(
    ("losses", "latest"),
    [
        (np.where(STEPS < 1500, 0.15, 2.0), 1515),  # a network that has forgotten everything
        (2 * np.exp(STEPS / 40), 200),  # from the first step on
        (np.where(STEPS < 1000, 0.3, 0.3 * np.exp((STEPS - 1000) / 300)), 2200),  # slowly
        (np.where(STEPS < 700, 1.0, 1e30), 715),
    ],
)
def test_explosions_fire_soon(losses: np.ndarray, latest: int) -> None:
    step = fires_at(losses * noise(3000, 0.3))
    assert step is not None and step <= latest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_fires_at_once(value: float) -> None:
    assert fires_at([1.0, value]) == 1


def test_another_kind_of_loss_begins_anew() -> None:
    losses = [0.1] * 300 + [50.0] * 300
    assert fires_at(losses) is not None
    assert fires_at(losses, ["grid"] * 300 + ["tangent"] * 300) is None


def test_it_goes_on_where_it_was() -> None:
    losses = [0.1] * 300 + [50.0] * 300
    watch = LossWatch()
    for loss in losses[:305]:
        watch.see(loss, ["a"])
    again = LossWatch()
    again.load_state_dict(watch.state_dict())
    with pytest.raises(TrainingDiverged, match="median over 20 steps is 25.1, that of the 200 st"):
        for loss in losses[305:325]:
            again.see(loss, ["a"])
