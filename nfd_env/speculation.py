"""Speculative frames: drawn before they are asked for, on the assumption that the action is kept.

With n = ``frames``, a pass draws n frames jointly for the current action (arXiv 2506.01380, section
on speculative sampling). The first one is handed out. On the next steps, as long as the real action
is the assumed one, the others are, without any pass; at the first difference they are dropped.

Each environment of a batch goes its own way. Those that need a pass on a step share one: their rows
are taken out of the state, drawn together, and put back. Frames that were handed out since a row's
last pass, 1 to n of them, are pending and are committed to the ring in its next one; rows with
fewer than others are padded, because one wide pass costs less than up to n narrow ones.

A draft is stored beside the history and never in it: the ring, the heads' memory and the frame
counter move only when a frame is handed out or committed, so dropping one is forgetting it. Its
noise is a function of (seed, episode, frame number), so that a frame which is drawn again has the
same.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfd_env.world_model import Context, Drawn, Transition, WorldModel, WorldState

_PRIOR = 0.9  # share of actions taken to be kept, before anything was seen
_MEMORY = 32  # steps that the running share of kept actions remembers
_SAMPLES = 9  # passes whose median is the cost of a pass
_NEEDED = 3  # passes to measure before anything is decided
_WARM = 2  # first passes of a kind, which also pay for memory and compilation
_WORTH = 0.96  # measured cost over what it saves, below which drafts are made: both are guesses
_PROBE = 128  # passes after which the other kind is measured again


@dataclass
class SpeculativeState(WorldState):
    """A ``WorldState`` with the frames of each row's last pass, the unused ones being drafts.

    ``remembered`` and ``memory`` are those of ``block``, (B, n, ...), and ``action`` (B, 1,
    action_width) led into all of its frames.

    Attributes:
        block: the frames of the last pass; rows that drew fewer than n are padded.
        used: how many of them were handed out, 1 to n; these are pending.
        ready: how many can be handed out: all of them, or those up to the one that ends the
            episode.
        counts: int64 (B, 3), frames drafted, accepted and dropped in this slot so far.
        kept: float64 (B,), running share of steps that kept the action of the step before.
        acted: bool (B,), whether there was a step in this episode.
    """

    block: Drawn
    used: list[int]
    ready: list[int]
    counts: np.ndarray
    kept: np.ndarray
    acted: np.ndarray

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> SpeculativeState:
        """See ``WorldState.take``; drafts and counters come along."""
        listed = list(rows)
        index = torch.as_tensor(listed, device=self.action.device)
        block = self.block.map(lambda part: part[index])
        return SpeculativeState(
            self.cache.take(index),
            block.remembered,
            self.action[index],
            block.memory,
            [self.seeds[r] for r in listed],
            [self.frame[r] for r in listed],
            block,
            [self.used[r] for r in listed],
            [self.ready[r] for r in listed],
            self.counts[listed],
            self.kept[listed],
            self.acted[listed],
        )

    @torch.inference_mode()
    def put(self, rows: Sequence[int], other: WorldState) -> None:
        """See ``WorldState.put``."""
        assert isinstance(other, SpeculativeState)
        listed = list(rows)
        index = torch.as_tensor(listed, device=self.action.device)
        self.cache.put(index, other.cache)
        self.action = self.action.index_copy(0, index, other.action)
        self.keep(
            Drawn(
                **{
                    name: part.index_copy(0, index, getattr(other.block, name))
                    for name, part in vars(self.block).items()
                }
            )
        )
        for place, row in enumerate(listed):
            self.seeds[row], self.frame[row] = other.seeds[place], other.frame[place]
            self.used[row], self.ready[row] = other.used[place], other.ready[place]
        self.counts[listed], self.kept[listed] = other.counts, other.kept
        self.acted[listed] = other.acted

    def keep(self, block: Drawn) -> None:
        """Make ``block`` the frames of the last pass."""
        self.block, self.remembered, self.memory = block, block.remembered, block.memory

    def drop(self, row: int) -> None:
        """Forget the drafts of a row."""
        self.counts[row, 2] += self.ready[row] - self.used[row]
        self.ready[row] = self.used[row]

    def succeed(self, before: SpeculativeState, rows: Sequence[int | None]) -> None:
        """Go on counting where these rows of ``before`` stop; what they drafted is dropped."""
        for place, row in enumerate(rows):
            if row is not None:
                before.drop(row)
                self.counts[place], self.kept[place] = before.counts[row], before.kept[row]

    def report(self) -> dict[str, np.ndarray]:
        """Frames drafted, accepted and dropped so far, each int64 (B,)."""
        columns = self.counts.T.copy()
        return dict(zip(("drafted", "accepted", "dropped"), columns, strict=True))


@dataclass
class _Cost:
    """Seconds a row of the latest passes over some number of frames."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    passes: int = 0
    latest: int = 0

    def median(self) -> float:
        return float(np.median(self.seconds))


class Speculator:
    """Steps a ``WorldModel`` with drafts, as long as they pay.

    Drafts pay when a pass with them, shared by the frames of it that will be used, costs less than
    the passes that it saves. How many will be used follows from each row's running share of kept
    actions, which is seen on every step, drafts or not. What a pass costs is measured; so that the
    machine's whims are noticed, the kind that is not in use is measured again now and then.
    """

    def __init__(
        self,
        model: WorldModel,
        frames: int,
        frame_skip: int = 1,
        draft_cost: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Draft for ``model``.

        Args:
            model: draws the frames.
            frames: n, most frames of one pass, from 2 to the window - 1.
            frame_skip: frames that an action is kept for with certainty.
            draft_cost: cost of a pass over n frames relative to one over the fewest; None to
                measure it.
            clock: seconds, for the measurement.

        Raises:
            ValueError: when ``frames`` is out of range.
        """
        check_frames(frames, model.dynamics.config.window)
        self.model, self.frames, self.frame_skip = model, frames, frame_skip
        self.draft_cost, self._clock = draft_cost, clock
        self._costs: dict[int, _Cost] = defaultdict(_Cost)
        self._passes = 0

    @torch.inference_mode()
    def start(
        self, contexts: Sequence[Context], seeds: Sequence[tuple[int, int]]
    ) -> SpeculativeState:
        """See ``WorldModel.start``."""
        plain = self.model.start(contexts, seeds, self.frames)
        batch, device = plain.batch, self.model.device
        scalar = torch.zeros(batch, 1, device=device)
        first = Drawn(
            torch.zeros_like(plain.remembered),
            scalar,
            scalar.bool(),
            scalar,
            plain.remembered,
            plain.memory[:, None],
        )
        state = SpeculativeState(
            **vars(plain),
            block=first,
            used=[1] * batch,
            ready=[1] * batch,
            counts=np.zeros((batch, 3), np.int64),
            kept=np.full(batch, _PRIOR),
            acted=np.zeros(batch, bool),
        )
        state.keep(self._padded(first))
        return state

    @torch.inference_mode()
    def step(
        self,
        state: SpeculativeState,
        actions: Tensor,
        certain: int = 1,
        active: np.ndarray | None = None,
    ) -> Transition:
        """Advance rows of ``state`` (in place) by one frame.

        Args:
            state: as ``start`` made it.
            actions: encoded, (B, action_width).
            certain: frames, this one included, for which the actions are certain to be kept.
            active: bool (B,), the rows to advance; what is returned for the others means nothing.
                None for all.
        """
        batch = state.batch
        active = np.ones(batch, bool) if active is None else active
        actions = actions.to(self.model.device, torch.float32)
        same = (actions == state.action[:, 0]).all(1).cpu().numpy()
        if certain == self.frame_skip:
            seen = active & state.acted
            state.kept[seen] += (same[seen] - state.kept[seen]) / _MEMORY
            state.acted |= active
        waiting = np.array(state.ready) > state.used
        hits = active & same & waiting
        missed = active & ~hits
        if missed.any():
            width = self._width(state, certain, active)
            if width < self.frames:
                # Parts of a batch cost more to draw than they save: without drafts all rows are
                # drawn together, and what drafts some still have is dropped.
                hits, missed = np.zeros_like(hits), active
            self._draw(state, actions, [int(r) for r in np.flatnonzero(missed)], width)
        state.counts[hits, 1] += 1
        for row in np.flatnonzero(active):
            state.used[row] += 1
            state.frame[row] += 1
        index = torch.tensor(state.used, device=actions.device) - 1
        rows = torch.arange(batch, device=actions.device)
        return Transition(*(part[rows, index] for part in state.block.outcome()))

    def _draw(self, state: SpeculativeState, actions: Tensor, rows: list[int], width: int) -> None:
        """Replace the blocks of ``rows``; nothing of the new ones is used yet."""
        # Measured with the moving of rows, which only drafts make necessary: rows of a batch then
        # run out of drafts at different times.
        begin = self._now()
        for row in rows:
            state.drop(row)
        everything = len(rows) == state.batch
        part = state if everything else state.take(rows)
        index = torch.tensor(rows, device=actions.device)
        chosen = actions if everything else actions[index]
        pending = max(part.used)
        last = torch.tensor(part.used, device=actions.device) - 1
        history = WorldState(
            part.cache,
            part.remembered[:, :pending],
            part.action.expand(-1, pending, -1),
            part.memory[torch.arange(len(rows), device=actions.device), last],
            part.seeds,
            part.frame,
        )
        drawn = self.model.draw(history, chosen, width, part.used)
        part.keep(self._padded(drawn))
        part.action = chosen[:, None]
        ended = drawn.terminated.cpu().numpy()
        for row in range(len(rows)):
            after = np.flatnonzero(ended[row])
            part.ready[row] = int(after[0]) + 1 if len(after) else width
            part.used[row] = 0
            # What would follow the end of the episode was drawn for nothing.
            part.counts[row] += (width - 1, 0, width - part.ready[row])
        if part is not state:
            state.put(rows, part)
        self._count_pass(width, (self._now() - begin) / len(rows))

    def _padded(self, drawn: Drawn) -> Drawn:
        missing = self.frames - drawn.reward.shape[1]
        if not missing:
            return drawn
        return drawn.map(lambda x: torch.cat((x, x.new_zeros((len(x), missing, *x.shape[2:]))), 1))

    def _width(self, state: SpeculativeState, certain: int, active: np.ndarray) -> int:
        """How many frames the next pass draws."""
        fewest = min(certain, self.frames)
        if fewest == self.frames:
            return self.frames
        cost = self.draft_cost
        if cost is None:
            for width in (self.frames, fewest):
                known = self._costs[width]
                unknown = len(known.seconds) < _NEEDED
                if unknown or self._passes - known.latest >= _PROBE:
                    return width
            cost = self._costs[self.frames].median() / self._costs[fewest].median()
        ahead = np.arange(self.frames)
        decisions = -(-np.maximum(ahead - certain + 1, 0) // self.frame_skip)
        expected = (state.kept[active, None] ** decisions).sum(1)
        pays = cost * float((fewest / expected).mean()) <= (1 if self.draft_cost else _WORTH)
        return self.frames if pays else fewest

    def _count_pass(self, width: int, seconds: float) -> None:
        self._passes += 1
        cost = self._costs[width]
        cost.passes, cost.latest = cost.passes + 1, self._passes
        if cost.passes > _WARM:
            cost.seconds.append(seconds)

    def _now(self) -> float:
        if self.draft_cost is not None:
            return 0.0
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self._clock()


def check_frames(frames: Any, window: int) -> None:
    """Check a number of frames that one pass is to draw.

    Raises:
        ValueError: when it is below 1, or beyond the ``window`` - 1 frames that the ring keeps.
    """
    if not isinstance(frames, int | np.integer) or not 1 <= frames <= window - 1:
        raise ValueError(
            f"speculative_frames must be a whole number from 1 (no speculation) to {window - 1}, "
            f"the number of past frames that this world keeps, got {frames!r}"
        )
