"""The persistent ring of keys and values: each finished frame's are computed once and kept.

Every row of the batch (every environment) has its own length and can be reset alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfd_env.models.layers import Attend, attend_packed


@dataclass(frozen=True)
class StreamView:
    """What one streaming pass needs: the frames' numbers, and attention through the ring."""

    frames: Tensor
    attend: Attend


class FrameCache:
    """Keys and values of the last frames of each environment, at absolute frame positions.

    A finished frame with number n stands in slot n modulo ``ring``, so it falls out when frame
    n + ``ring`` is finished. Behind the ring are scratch slots for the unfinished frames of the
    pass under way, which the next pass overwrites.
    """

    def __init__(
        self,
        batch: int,
        layers: int,
        heads: int,
        head_width: int,
        tokens: int,
        window: int,
        drafts: int = 1,
        commits: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate an empty cache for ``batch`` environments.

        Args:
            batch: rows.
            layers: transformer blocks.
            heads: attention heads.
            head_width: channels of a head.
            tokens: tokens a frame.
            window: frames that a frame may see, itself included.
            drafts: most unfinished frames in one pass.
            commits: most frames finished in one pass. The ring holds that many frames beyond the
                window - 1 before a frame, so that the first finished frame of a pass still finds
                everything it may see after the last one has been written.
            device: of the buffers.
            dtype: of the buffers.
        """
        self.window, self.ring = window, window - 1 + commits
        self.drafts, self.commits, self.tokens = drafts, commits, tokens
        # Rows may finish different numbers of frames; where fewer, more slots behind are written.
        scratch = drafts + commits - 1
        shape = (layers, batch, heads, self.ring + scratch, tokens, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.length)

    def reset(self, mask: Tensor) -> None:
        """Forget everything of the rows where ``mask`` (bool (B,)) is True."""
        self.length = self.length.masked_fill(mask, 0)

    def put(self, rows: Tensor, other: FrameCache) -> None:
        """Replace the ``rows`` (int (n,)) by the n rows of ``other``, a cache of the same shape."""
        self.keys[:, rows] = other.keys
        self.values[:, rows] = other.values
        self.length = self.length.index_copy(0, rows, other.length)

    def take(self, rows: Tensor) -> FrameCache:
        """A copy of the ``rows`` (int (n,))."""
        copy = object.__new__(FrameCache)
        copy.__dict__.update(self.__dict__)
        copy.keys, copy.values = self.keys[:, rows], self.values[:, rows]
        copy.length = self.length[rows]
        return copy

    def clone(self) -> FrameCache:
        """An independent copy."""
        return self.take(torch.arange(self.batch, device=self.length.device))

    def begin(self, count: int, commit: int | Sequence[int]) -> StreamView:
        """Prepare a pass over ``count`` frames that follow the ring's; see ``Dynamics.stream``.

        Raises:
            ValueError: when the pass has more finished or unfinished frames than there is room for.
        """
        commits = [commit] if isinstance(commit, int) else list(commit)
        fewest, largest = min(commits), max(commits)
        # Nothing is pushed out of an empty ring, so it takes a whole context at once.
        most = self.commits if largest <= self.commits or self.length.any() else self.ring
        if not 0 <= fewest <= largest <= min(count, most) or count - largest > self.drafts:
            raise ValueError(
                f"a pass may finish at most {most} frames and draft {self.drafts}, "
                f"got {largest} and {count - largest}"
            )
        device = self.length.device
        frames = self.length[:, None] + torch.arange(count, device=device)
        uneven = fewest < largest
        self.length = self.length + (torch.tensor(commits, device=device) if uneven else fewest)
        # The newest frame number that each slot holds once this pass's commits are written.
        newest = self.length[:, None] - 1
        held = newest - (newest - torch.arange(self.ring, device=device)) % self.ring
        slots, scattered, unfinished = frames[:, :fewest] % self.ring, fewest, frames[:, fewest:]
        if uneven:  # no frame is unfinished in every row, so each one has a slot of its own
            behind = frames - self.length[:, None]
            slots = torch.where(behind < 0, frames % self.ring, self.ring + behind)
            scattered = count
            unfinished = self.length[:, None] + torch.arange(count - fewest, device=device)
        key_frames = torch.cat((held, unfinished), 1)
        mask = sees(frames[:, :, None], key_frames[:, None, :], self.window)
        mask = (mask & (key_frames >= 0)[:, None]).repeat_interleave(self.tokens, 1)
        hidden = ~mask.repeat_interleave(self.tokens, 2)[:, None]
        additive = torch.zeros(hidden.shape, device=device, dtype=self.keys.dtype)
        additive = additive.masked_fill(hidden, -torch.inf)
        rows = torch.arange(self.batch, device=device)[:, None]
        last = self.ring + count - fewest

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            for buffer, new in ((keys, k), (values, v)):
                new = new.transpose(2, 3)  # B F heads P c
                if scattered:
                    buffer[rows, :, slots] = new[:, :scattered]
                if scattered < count:
                    buffer[:, :, self.ring : last] = new[:, scattered:].transpose(1, 2)
            out = attend_packed(
                q.flatten(1, 2).transpose(1, 2),
                keys[:, :, :last].flatten(2, 3),
                values[:, :, :last].flatten(2, 3),
                additive,
            )
            return out.transpose(1, 2).reshape(q.shape)

        return StreamView(frames, attend)


def sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether frame ``query`` attends to frame ``key``: itself and ``window`` - 1 before it."""
    return (key <= query) & (key > query - window)
