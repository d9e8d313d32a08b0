"""Telling a loss that explodes from one that is noisy."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

RECENT = 20
"""Steps whose median loss is judged: single bad batches do not move it."""
_BEFORE = 200  # steps before those, that they are compared with
_SUDDEN = 10.0  # times the median of the steps before
_SLOW = 30.0  # times the lowest median ever
# Losses are of values of about unit size. Below this one, a loss that grows tenfold still is a good
# one, and a student that begins as its teacher has none at all.
_SMALL = 0.15


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number, or the loss has exploded."""


class LossWatch:
    """Watches the loss step by step.

    It has exploded when the median of the latest 20 steps is above 10 times the median of the 200
    steps before them, or above 30 times the lowest such median. Medians let single batches be as
    bad as they like, and such factors are beyond what a loss climbs to by noise, a warm-up or a
    restart: a flow loss lies near 0.15, and at 2 a network knows nothing.

    Losses are compared only while they are made of the same parts: another kind of loss, as when
    distillation goes from discrete to continuous time, begins anew.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._parts: list[str] = []
        self._losses: list[float] = []
        self._lowest = math.inf

    def see(self, loss: float, parts: list[str]) -> None:
        """Take the next step's loss, made of ``parts``.

        Raises:
            TrainingDiverged: when the loss is not finite or has exploded.
        """
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss}")
        if parts != self._parts:
            self._parts, self._losses, self._lowest = parts, [], math.inf
        self._losses = [*self._losses, loss][-RECENT - _BEFORE :]
        if len(self._losses) < 2 * RECENT:
            return
        now, before = median(self._losses[-RECENT:]), median(self._losses[:-RECENT])
        self._lowest = min(self._lowest, now, before)
        for factor, earlier, name in (
            (_SUDDEN, before, f"the {len(self._losses) - RECENT} steps before"),
            (_SLOW, self._lowest, "its best 20 steps"),
        ):
            if now > factor * max(earlier, _SMALL):
                raise TrainingDiverged(
                    f"the loss exploded: its median over {RECENT} steps is {now:.3g}, that of "
                    f"{name} was {earlier:.3g}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain values to go on from."""
        return {"parts": self._parts, "losses": self._losses, "lowest": self._lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._parts, self._losses, self._lowest = state["parts"], state["losses"], state["lowest"]
