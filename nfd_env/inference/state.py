"""What a world remembers of each row, and what goes into it and comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nfd_env.models.cache import FrameCache
from nfd_env.models.rows import Rows


@dataclass(frozen=True)
class Context:
    """Real frames that a world starts from.

    Attributes:
        latents: (K, C, h, w), K >= 1.
        actions: encoded, (K, action_width), the action leading into each frame; the first may be
            zeros.
        beginning: whether an episode began with these frames.
    """

    latents: Tensor
    actions: Tensor
    beginning: bool = True


@dataclass(frozen=True)
class Transition:
    """What one action brought about in each row.

    Attributes:
        latents: (B, C, h, w), the new frames.
        reward: float32 (B,).
        terminated: bool (B,), drawn with probability ``hazard``.
        hazard: float32 (B,).
        memory: (B, width), the heads' recurrent state after it.
    """

    latents: Tensor
    reward: Tensor
    terminated: Tensor
    hazard: Tensor
    memory: Tensor


@dataclass(eq=False)
class Drawn(Rows):
    """Frames that were drawn jointly, and what depends on each of them.

    Attributes:
        latents: (B, n, C, h, w).
        reward: float32 (B, n).
        terminated: bool (B, n).
        hazard: float32 (B, n).
        remembered: (B, n, C, h, w), the frames at the history level.
        memory: (B, n, width), the heads' recurrent state after each frame.
    """

    latents: Tensor
    reward: Tensor
    terminated: Tensor
    hazard: Tensor
    remembered: Tensor
    memory: Tensor

    def padded(self, frames: int) -> Drawn:
        """The same with zeros behind, so that there are ``frames``."""
        missing = frames - self.reward.shape[1]
        if not missing:
            return self
        parts = vars(self).values()
        return Drawn(
            *(torch.cat((x, x.new_zeros((len(x), missing, *x.shape[2:]))), 1) for x in parts)
        )

    def transition(self, frames: Tensor | int) -> Transition:
        """What each row's frame number ``frames``, int or int64 (B,), brought about."""
        rows = slice(None)
        if isinstance(frames, Tensor):
            rows = torch.arange(len(frames), device=frames.device)
        return Transition(
            *(
                part[rows, frames]
                for part in (self.latents, self.reward, self.terminated, self.hazard, self.memory)
            )
        )


@dataclass(eq=False)
class WorldState(Rows):
    """Everything that the future of each row depends on, and counters of what was drafted.

    Where several frames are drawn at a time, the first ones of a row's last pass have happened, and
    the others are drafts: they wait for the action to be kept, and are no part of the history.

    Attributes:
        cache: keys and values of the frames before those of the last pass.
        drawn: the frames of each row's last pass, n or fewer; behind them zeros.
        action: (B, 1, action_width), the action that led into all of them.
        keys: int64 (B,), of all the noise of each row's episode; see ``noise``.
        used: int64 (B,), how many of them have happened, 1 to n; they are not in the cache yet.
        ready: int64 (B,), how many can happen: all that were drawn, or those up to the one that
            ends the episode, or up to the end of the step that they were drawn in.
        kept: float64 (B,), running share of the frames in this episode whose action was that of the
            frame before.
        counts: int64 (B, 3), frames drafted, accepted and dropped in this slot so far.
        frames: n, most frames that are drawn in one pass.
        world_id: of the world that it belongs to, see ``WorldModel``.
    """

    cache: FrameCache
    drawn: Drawn
    action: Tensor
    keys: Tensor
    used: np.ndarray
    ready: np.ndarray
    kept: np.ndarray
    counts: np.ndarray
    frames: int
    world_id: str

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.used)

    @property
    def memory(self) -> Tensor:
        """(B, width), the heads' recurrent state after the last frame."""
        return self.drawn.memory[:, 0] if self.frames == 1 else self.last.memory

    @property
    def last(self) -> Transition:
        """The last frame of each row, and what was said of it."""
        if self.frames == 1:
            return self.drawn.transition(0)
        return self.drawn.transition(torch.tensor(self.used - 1, device=self.keys.device))

    @property
    def frame(self) -> list[int]:
        """Number of the last frame of each row, counted from the first that its start was given."""
        return (self.cache.length.cpu().numpy() + self.used - 1).tolist()

    def fork(self) -> WorldState:
        """An independent copy; stepping one leaves the other alone."""
        return self.take(range(self.batch))

    def drop(self, rows: Sequence[int]) -> None:
        """Forget the drafts of some rows."""
        self.counts[rows, 2] += self.ready[rows] - self.used[rows]
        self.ready[rows] = self.used[rows]

    def count_on(self, before: WorldState, rows: Sequence[int | None]) -> None:
        """Go on counting where these rows of ``before`` stop; what they drafted is dropped."""
        for place, row in enumerate(rows):
            if row is not None:
                before.drop([row])
                self.counts[place] = before.counts[row]

    def report(self) -> dict[str, np.ndarray]:
        """Frames drafted, accepted and dropped so far, each int64 (B,)."""
        columns = self.counts.T.copy()
        return dict(zip(("drafted", "accepted", "dropped"), columns, strict=True))
