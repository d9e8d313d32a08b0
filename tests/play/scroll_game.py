"""A stand-in for ``Slots`` whose picture scrolls with the action: easy to measure, and free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.play.game import Outcome, Sampling
from nfd_env.play.keys import Keymap
from nfd_env.sources.spec import SourceConfig

SOURCE = SourceConfig(
    env_id="Scroll-v0",
    action_names=["noop", "right", "left"],
    keys={"right": ["right", "d"], "left": ["left", "a"]},
)
MOVE = {0: 0, 1: 2, 2: -2}
WIDTH = 128


class ScrollGame:
    """Turning right moves the picture to the left by two columns a step, as in a real game."""

    name = "Scroll"
    display = "smooth"
    default_sampling: Sampling | None = Sampling(2)
    steps_of: tuple[int, int] | None = (2, 6)
    views: tuple[str, ...] = ("dream",)
    source: SourceConfig | None = None
    ood: float | None = None

    def __init__(
        self,
        count: int,
        fps: float = 35.0,
        fail_at: int | None = None,
        end_at: int | None = None,
    ) -> None:
        self.count, self.fps, self.display_aspect = count, fps, 2.6667
        self.frame_shape: tuple[int, ...] = (96, WIDTH, 3)
        self.keymap = Keymap.from_source(SOURCE, spaces.Discrete(3))
        self.at = [0] * count
        self.seeds: list[int] = [0] * count
        self.steps_taken = [0] * count
        self.batches: list[int] = []
        self.sampling = [Sampling(2)] * count
        self.drafts: dict[int, dict[Any, Outcome]] = {}
        self.fail_at, self.end_at = fail_at, end_at

    def reset(self, slot: int, seed: int | None = None) -> np.ndarray:
        self.at[slot] = self.steps_taken[slot] = 0
        self.seeds[slot] = self.seeds[slot] if seed is None else seed
        self.drafts.pop(slot, None)
        return self.frame(0)

    def seed_of(self, slot: int) -> int:
        return self.seeds[slot]

    def view(self, slot: int) -> str:
        return "dream"

    def set_view(self, slot: int, view: str) -> np.ndarray:
        raise AssertionError("there is nothing else to be seen")

    def beside(self, slot: int) -> np.ndarray | None:
        return None

    def close(self) -> None:
        self.closed = True

    def set_sampling(self, slot: int, sampling: Sampling) -> None:
        self.sampling[slot] = sampling

    def has_draft(self, slot: int) -> bool:
        return slot in self.drafts

    def cost(self, rows: Mapping[int, int]) -> float:
        return 1e-3 * sum(rows.values())

    def outcome(self, slot: int, action: Any, guessed: bool) -> Outcome:
        info = {"hazard": 0.0} | ({"acceptance": 0.5} if self.sampling[slot].speculation else {})
        info |= {} if self.ood is None else {"ood": self.ood}
        frame = self.frame(self.at[slot] + MOVE[action])
        ended = self.steps_taken[slot] + 1 == self.end_at
        return Outcome(frame, 1.0, ended, False, info, guessed)

    def step(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        self.batches.append(len(actions))
        made = {slot: self.outcome(slot, action, False) for slot, action in actions.items()}
        self._advance(actions)
        return made

    def take_drafts(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        drafts = {s: self.drafts.pop(s, {}) for s in actions}
        hits = {s: drafts[s][a] for s, a in actions.items() if a in drafts[s]}
        self._advance({s: actions[s] for s in hits})
        return hits

    def draft(self, guesses: Mapping[int, Sequence[Any]]) -> None:
        for slot, actions in guesses.items():
            self.drafts[slot] = {a: self.outcome(slot, a, True) for a in actions}

    def _advance(self, actions: Mapping[int, Any]) -> None:
        for slot, action in actions.items():
            self.at[slot] += MOVE[action]
            self.steps_taken[slot] += 1
            if self.fail_at is not None and self.steps_taken[slot] >= self.fail_at:
                raise RuntimeError("the model failed on purpose")

    def frame(self, at: int) -> np.ndarray:
        """Stripes at columns that move left as ``at`` grows; blue says how far."""
        columns = (np.arange(WIDTH) + at) % 64
        picture = np.zeros((96, WIDTH, 3), np.uint8)
        picture[:, :, 0] = 255 * (columns < 16)
        picture[:, :, 1] = 60
        picture[:, :, 2] = at % 256
        return picture
