"""A learned world and its real game side by side, switched at the same moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np

from nfd_env.metrics import psnr
from nfd_env.play.game import Outcome
from nfd_env.play.slots import Slots
from nfd_env.sources.spec import SourceError

VIEWS = ("dream", "real", "split")
_REMEMBERED = 16  # frames of the real game that the dream goes on from


class _RealGame:
    """The real game of one slot, and its last frames."""

    def __init__(self, env: gymnasium.Env) -> None:
        self.env, self.over = env, True
        self.frames: deque[np.ndarray] = deque(maxlen=_REMEMBERED)
        self.actions: deque[Any] = deque(maxlen=_REMEMBERED - 1)

    def reset(self, seed: int | None) -> np.ndarray:
        frame, _ = self.env.reset(seed=seed)
        self.over = False
        self.frames.clear()
        self.actions.clear()
        self.frames.append(np.array(frame))
        return self.frames[-1]

    def step(self, action: Any) -> Outcome:
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.over = bool(terminated or truncated)
        self.frames.append(np.array(frame))
        self.actions.append(action)
        return Outcome(self.frames[-1], float(reward), bool(terminated), bool(truncated), {})

    def context(self) -> dict[str, np.ndarray]:
        """The reset option that lets the dream go on from here."""
        frames = np.stack(self.frames)
        if not self.actions:
            return {"frames": frames}
        return {"frames": frames, "actions": np.stack([np.asarray(a) for a in self.actions])}


class TwinSlots(Slots):
    """``Slots`` whose players can see the real game too.

    In the view "dream" it is ``Slots``. In "real" the real game is played, and in "split" both,
    by the same actions; there the real game's outcome counts, and the dream's frame is beside it.
    A change to "dream" lets it go on from the game's last frames. So does the end of a dream in
    "split" where the game has not ended. The game meanwhile waits as it is, which is the saved
    state that every game has, also one that could not write it down: a change back goes on there.
    An episode of the game begins at the first change, after its end, and after a new seed.
    """

    def __init__(self, make: Callable[[], gymnasium.Env], *args: Any, **kwargs: Any) -> None:
        """See ``Slots``.

        Args:
            make: makes the real game, with the world's observations and actions.
            args: of ``Slots``.
            kwargs: of ``Slots``.
        """
        super().__init__(*args, **kwargs)
        self._make = make
        self.views: tuple[str, ...] = VIEWS
        self._views = ["dream"] * self.count
        self._real: dict[int, _RealGame] = {}
        self._beside: dict[int, np.ndarray] = {}

    def view(self, slot: int) -> str:
        """What a slot shows, one of ``VIEWS``."""
        return self._views[slot]

    def beside(self, slot: int) -> np.ndarray | None:
        """The dream's frame in the view "split", uint8 (H, W, 3); else None."""
        return self._beside.get(slot)

    def set_view(self, slot: int, view: str) -> np.ndarray:
        """Change what a slot shows.

        Returns:
            Its frame from which it goes on, uint8 (H, W, 3).

        Raises:
            SourceError: when the real game cannot be made or fails; the slot dreams then.
        """
        before = self._views[slot]
        if view != "dream" and slot not in self._real:
            self._real[slot] = _RealGame(self._make())
        real = self._real.get(slot)
        self._drafts.pop(slot, None)
        goes_on = real is not None and not real.over
        if view == "dream":
            kept = self._beside.pop(slot, None)
            if before == "split" and kept is not None and goes_on:
                frame = kept
            elif before != "dream" and goes_on and real is not None:
                frame = self._begin(slot, None, real.context())
            else:
                frame = self._begin(slot, None)
            self._views[slot] = view
            return frame
        assert real is not None
        frame = real.frames[-1] if goes_on else self._reset_real(slot, self.seed_of(slot))
        self._views[slot] = view
        self._beside.pop(slot, None)
        if view == "split":
            self._beside[slot] = self._begin(slot, None, real.context())
        return frame

    def reset(self, slot: int, seed: int | None = None) -> np.ndarray:
        """See ``Slots``; in "real" and "split" an episode of the real game begins."""
        if self._views[slot] == "dream":
            if seed is not None and slot in self._real:
                self._real[slot].over = True  # a seed is another episode, of the game too
            return self._begin(slot, seed)
        frame = self._reset_real(slot, seed)
        if self._views[slot] == "split":
            self._beside[slot] = self._begin(slot, seed, self._real[slot].context())
        return frame

    def step(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """See ``Slots``."""
        dreaming = {s: a for s, a in actions.items() if self._views[s] != "real"}
        made = super().step(dreaming) if dreaming else {}
        for slot, action in actions.items():
            if self._views[slot] == "dream":
                continue
            dream: Outcome | None = made.get(slot)
            try:
                outcome = self._real[slot].step(action)
            except (Exception, SystemExit) as error:  # whatever foreign code may raise
                frame = self._real[slot].frames[-1]
                self._drop(slot)
                made[slot] = Outcome(frame, 0.0, False, True, {}, error=_said(error))
                continue
            if dream is not None:
                self._beside[slot] = dream.frame
                difference = outcome.frame.astype(np.float32) - dream.frame
                outcome.info["apart"] = psnr(float(np.square(difference).mean()))
                if "ood" in dream.info:
                    outcome.info["ood"] = dream.info["ood"]
                if (dream.terminated or dream.truncated) and not self._real[slot].over:
                    # What has ended cannot be stepped, and the game has not.
                    self._begin(slot, None, self._real[slot].context())
                    outcome.info["dream_ended"] = True
            made[slot] = outcome
        return made

    def has_draft(self, slot: int) -> bool:
        """See ``Slots``; where the real game is played, nothing is made ahead."""
        return self._views[slot] != "dream" or super().has_draft(slot)

    def close(self) -> None:
        """Close the real games."""
        for slot in list(self._real):
            self._drop(slot)

    def _reset_real(self, slot: int, seed: int | None) -> np.ndarray:
        try:
            return self._real[slot].reset(seed)
        except (Exception, SystemExit) as error:  # whatever foreign code may raise
            self._drop(slot)
            raise SourceError(_said(error)) from error

    def _drop(self, slot: int) -> None:
        """The real game of a slot is over for good; it dreams again."""
        self._views[slot] = "dream"
        self._beside.pop(slot, None)
        with suppress(Exception, SystemExit):
            self._real.pop(slot).env.close()


def _said(error: BaseException) -> str:
    return f"the real game failed: {type(error).__name__} {' '.join(str(error).split())}"
