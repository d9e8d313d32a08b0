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

Drafts need a ring with room for them, in which every pass costs a little more. While they do not
pay, the state is narrow: it has the plain ring, and a step is ``WorldModel.draw`` and hardly more.
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

from nfd_env.inference.world_model import Context, Drawn, Transition, WorldModel, WorldState

_PRIOR = 0.9  # share of actions taken to be kept, before anything was seen
_MEMORY = 32  # steps that the running share of kept actions remembers
_SAMPLES = 9  # passes whose median is the cost of a pass
_NEEDED = 3  # passes to measure before anything is decided
_WARM = 2  # first passes of a kind, which also pay for memory and compilation
_WORTH = 0.96  # measured cost over what it saves, below which drafts begin: both are guesses
_PROBE = 128  # passes after which the other kind is measured again, ...
_LONGEST_PROBE = 2048  # ... twice as many after each time that changed nothing, up to so many
_JUDGED_ROWS = 64  # fewest rows of steps while drafting after which their time is judged
_JUDGED = 4  # frames handed out while drafting, times n and rows, after which the time is judged


@dataclass
class SpeculativeState(WorldState):
    """A ``WorldState`` with the frames of each row's last pass, the unused ones being drafts.

    ``remembered`` and ``memory`` are those of ``block``, (B, room, ...), and ``action`` (B, 1,
    action_width) led into all of its frames.

    Attributes:
        frames: n, most frames that are drawn jointly.
        block: the frames of the last pass; rows that drew fewer than there is room for are padded.
        used: how many of them were handed out, 1 to n; these are pending.
        ready: how many can be handed out: all of them, or those up to the one that ends the
            episode.
        counts: int64 (B, 3), frames drafted, accepted and dropped in this slot so far.
        kept: float64 (B,), running share of steps that kept the action of the step before.
        acted: bool (B,), whether there was a step in this episode.
    """

    frames: int
    block: Drawn
    used: list[int]
    ready: list[int]
    counts: np.ndarray
    kept: np.ndarray
    acted: np.ndarray

    @property
    def speculative_frames(self) -> int:
        """See ``WorldState``."""
        return self.frames

    @property
    def room(self) -> int:
        """Frames of a pass that there is room for: n, or 1 while nothing is drafted."""
        return self.cache.drafts

    def widen(self) -> None:
        """Make room for drafts."""
        if self.room < self.frames:
            self.cache = self.cache.resized(self.frames, self.frames)
            self.keep(padded(self.block, self.frames))

    def narrow(self) -> None:
        """Take the room for drafts away, after a pass of one frame in every row."""
        assert set(self.used) <= {0, 1} and set(self.ready) == {1}
        if self.room > 1:
            self.cache = self.cache.resized(1, 1)
            self.keep(self.block.map(lambda part: part[:, :1]))

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
            self.frames,
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
        if self.room < other.room:
            self.widen()
        elif self.room > other.room:
            other = other.take(range(other.batch))
            other.widen()
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
    """What the latest passes over some number of frames took: (seconds a row, rows) each."""

    taken: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    passes: int = 0
    latest: int = 0

    def median(self) -> float:
        """Seconds a row; passes of few rows, which cost more a row, count for few."""
        half = sum(rows for _, rows in self.taken) / 2
        for seconds, rows in sorted(self.taken):
            half -= rows
            if half <= 0:
                return seconds
        raise AssertionError("nothing was measured")


class Speculator:
    """Steps a ``WorldModel`` with drafts, as long as they pay.

    Drafts pay when a pass with them, shared by the frames of it that will be used, costs less than
    the passes that it saves. How many will be used follows from each row's running share of kept
    actions, which is seen on every step, drafts or not. What a pass costs is measured; so that the
    machine's whims are noticed, the kind that is not in use is measured again now and then. That is
    a forecast; while drafts are made, what a frame takes in the end is compared with a step without
    drafts, and where it is more, there are none for a while, each time for longer.
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
        # After so many certain frames, by how many kept actions each frame of a draft is used.
        ahead = np.arange(frames)
        self._decisions = {
            certain: -(-np.maximum(ahead - certain + 1, 0) // frame_skip)
            for certain in range(1, frame_skip + 1)
        }
        # A frame skip has more than one frame to draw jointly in any case.
        self._narrows = frame_skip == 1
        self._costs: dict[int, _Cost] = defaultdict(_Cost)
        self._passes = 0
        self._usual = 0  # the width that was decided for last
        self._interval, self._probing = _PROBE, False
        # Seconds of steps with room for drafts, and rows that they advanced.
        self._spent, self._handed = 0.0, 0
        self._refused_until, self._refusal = 0, _PROBE

    @torch.inference_mode()
    def start(
        self, contexts: Sequence[Context], seeds: Sequence[tuple[int, int]]
    ) -> SpeculativeState:
        """See ``WorldModel.start``."""
        plain = self.model.start(contexts, seeds)
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
            frames=self.frames,
            block=first,
            used=[1] * batch,
            ready=[1] * batch,
            counts=np.zeros((batch, 3), np.int64),
            kept=np.full(batch, _PRIOR),
            acted=np.zeros(batch, bool),
        )
        state.keep(first)
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
            active: bool (B,), the rows to advance; what is returned for the others means nothing,
                and while nothing is drafted they advance too. None for all.
        """
        active = np.ones(state.batch, bool) if active is None else active
        if state.room == 1 or not self._narrows or self.draft_cost is not None:
            return self._advance(state, actions, certain, active)
        begin = self._now()
        made = self._advance(state, actions, certain, active)
        self._judge(self._now() - begin, int(active.sum()), state.batch)
        return made

    def _judge(self, seconds: float, rows: int, batch: int) -> None:
        """Refuse drafts for a while where frames take longer with them than without."""
        if len(self._costs[self.frames].taken) < _SAMPLES:
            return  # the first passes also pay for memory, and for finding out
        self._spent, self._handed = self._spent + seconds, self._handed + rows
        if self._handed < max(_JUDGED * self.frames * batch, _JUDGED_ROWS):
            return
        if self._spent > self._handed * self._costs[1].median():
            self._refused_until = self._passes + self._refusal
            self._refusal = min(2 * self._refusal, _LONGEST_PROBE)
        else:
            self._refusal = _PROBE
        self._spent, self._handed = 0.0, 0

    def _advance(
        self, state: SpeculativeState, actions: Tensor, certain: int, active: np.ndarray
    ) -> Transition:
        """See ``step``."""
        batch = state.batch
        width = 0  # not decided yet
        actions = actions.to(self.model.device, torch.float32)
        same = (actions == state.action[:, 0]).all(1).cpu().numpy()
        if certain == self.frame_skip:
            seen = active & state.acted
            state.kept[seen] += (same[seen] - state.kept[seen]) / _MEMORY
            state.acted |= active
        if state.room == 1:
            width = self._width(state, certain, active)
            if width == 1:
                return self._draw_narrow(state, actions)
            state.widen()
        waiting = np.array(state.ready) > state.used
        hits = active & same & waiting
        missed = active & ~hits
        if missed.any():
            width = width or self._width(state, certain, active)
            if width < self.frames:
                # Parts of a batch cost more to draw than they save: without drafts all rows are
                # drawn together, and what drafts some still have is dropped.
                hits, missed = np.zeros_like(hits), active
            self._draw(state, actions, [int(r) for r in np.flatnonzero(missed)], width)
            if self._narrows and width == 1 and missed.all():
                state.narrow()
        state.counts[hits, 1] += 1
        for row in np.flatnonzero(active):
            state.used[row] += 1
            state.frame[row] += 1
        index = torch.tensor(state.used, device=actions.device) - 1
        rows = torch.arange(batch, device=actions.device)
        return Transition(*(part[rows, index] for part in state.block.outcome()))

    def _draw_narrow(self, state: SpeculativeState, actions: Tensor) -> Transition:
        """Advance every row of a narrow state, as ``WorldModel.step`` does."""
        begin = self._now()
        history = WorldState(
            state.cache,
            state.remembered,
            state.action,
            state.memory[:, 0],
            state.seeds,
            state.frame,
        )
        state.keep(self.model.draw(history, actions))
        state.action = actions[:, None]
        state.frame = [frame + 1 for frame in state.frame]
        self._count_pass(1, self._now() - begin, state.batch)
        return Transition(*(part[:, 0] for part in state.block.outcome()))

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
        part.keep(padded(drawn, part.room))
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
        if width > 1 or not self._narrows:
            self._count_pass(width, self._now() - begin, len(rows))

    def _width(self, state: SpeculativeState, certain: int, active: np.ndarray) -> int:
        """How many frames the next pass draws."""
        fewest = min(certain, self.frames)
        if fewest == self.frames:
            return self.frames
        cost, worth = self.draft_cost, 1.0
        if cost is None:
            tried = self._to_measure(fewest)
            if tried:
                return tried
            cost = self._costs[self.frames].median() / self._costs[fewest].median()
            worth = 1.0 if self._usual == self.frames else _WORTH
        expected = (state.kept[active, None] ** self._decisions[certain]).sum(1)
        pays = cost * float((fewest / expected).mean()) <= worth
        width = self.frames if pays and self._passes >= self._refused_until else fewest
        if width != self._usual:
            self._usual, self._interval = width, _PROBE
        elif self._probing:
            self._interval = min(2 * self._interval, _LONGEST_PROBE)
        self._probing = False
        return width

    def _to_measure(self, fewest: int) -> int:
        """The width of a pass whose cost is not known yet or not any more, or 0."""
        for width in (fewest, self.frames):
            known = self._costs[width]
            if len(known.taken) < _NEEDED:
                return width
            if self._passes - known.latest >= self._interval:
                self._probing = True
                return width
        return 0

    def _count_pass(self, width: int, seconds: float, rows: int) -> None:
        self._passes += 1
        cost = self._costs[width]
        cost.passes, cost.latest = cost.passes + 1, self._passes
        if cost.passes > _WARM:
            cost.taken.append((seconds / rows, rows))

    def _now(self) -> float:
        if self.draft_cost is not None:
            return 0.0
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self._clock()


def padded(drawn: Drawn, room: int) -> Drawn:
    """``drawn`` with zeros behind its frames, so that there are ``room``."""
    missing = room - drawn.reward.shape[1]
    if not missing:
        return drawn
    return drawn.map(lambda x: torch.cat((x, x.new_zeros((len(x), missing, *x.shape[2:]))), 1))


def check_frames(frames: Any, window: int) -> None:
    """Check a number of frames that one pass is to draw.

    Raises:
        ValueError: when it is below 1, or beyond the ``window`` - 1 frames that a frame sees right
            before it.
    """
    if not isinstance(frames, int | np.integer) or not 1 <= frames <= window - 1:
        raise ValueError(
            f"speculative_frames must be a whole number from 1 (no speculation) to {window - 1}, "
            f"the number of frames right before it that a frame of this world sees, got {frames!r}"
        )
