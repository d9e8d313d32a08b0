"""The persistent ring of keys and values: each finished frame's are computed once and kept.

Every row of the batch (every environment) has its own length and can be reset alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Frame number n stands in slot n modulo ``ring``. Unfinished frames of the pass under way stand
    behind the finished ones, in slots of frames that nothing sees any more, until the next pass
    overwrites them.
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
            commits: most frames finished in one pass. The ring holds as many frames as a pass may
                have beyond the window - 1 before a frame, so that the first frame of a pass still
                finds everything it may see after the last one has been written.
            device: of the buffers.
            dtype: of the buffers.
        """
        self.window, self.ring = window, window - 1 + commits + drafts
        self.drafts, self.commits, self.tokens = drafts, commits, tokens
        shape = (layers, batch, heads, self.ring, tokens, head_width)
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
        empty = largest > self.commits and not self.length.any()
        most = self.ring - self.drafts if empty else self.commits
        if not 0 <= fewest <= largest <= min(count, most) or count - largest > self.drafts:
            raise ValueError(
                f"a pass may finish at most {most} frames and draft {self.drafts}, "
                f"got {largest} and {count - largest}"
            )
        device = self.length.device
        frames = self.length[:, None] + torch.arange(count, device=device)
        uneven = fewest < largest
        self.length = self.length + (torch.tensor(commits, device=device) if uneven else fewest)
        mask = self._mask(frames)
        write = self._writer(frames % self.ring)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            write(keys, k)
            write(values, v)
            seen = mask[:, :, -q.shape[1] * self.tokens :]
            return attend_packed(q, keys.flatten(2, 3), values.flatten(2, 3), seen)

        return StreamView(frames, attend)

    def _mask(self, frames: Tensor) -> Tensor:
        """What ``frames`` (B, F) may see of the ring once they are in it.

        Returns:
            (B, heads, F * tokens, ring * tokens), to add to the scores.
        """
        newest = frames[:, -1:]
        # A slot of a draft that was dropped is taken for a frame that fell out of the window.
        held = newest - (newest - torch.arange(self.ring, device=frames.device)) % self.ring
        seen = sees(frames[:, :, None], held[:, None], self.window) & (held >= 0)[:, None]
        mask = torch.zeros(seen.shape, device=frames.device, dtype=self.keys.dtype)
        mask = mask.masked_fill(~seen, -torch.inf).repeat_interleave(self.tokens, 1)
        mask = mask.repeat_interleave(self.tokens, 2)[:, None]
        return mask.expand(-1, self.keys.shape[2], -1, -1).contiguous()

    def _writer(self, slots: Tensor) -> Callable[[Tensor, Tensor], None]:
        """A function that writes (B, F, tokens, heads, c) to the ``slots`` (B, F) of a layer."""
        if slots.device.type == "cpu" and bool((slots == slots[0]).all()):
            first, count = int(slots[0, 0]), slots.shape[1]
            before = min(count, self.ring - first)  # the rest goes on at the ring's beginning

            def write(buffer: Tensor, new: Tensor) -> None:
                new = new.permute(0, 3, 1, 2, 4)
                buffer[:, :, first : first + before] = new[:, :, :before]
                if before < count:
                    buffer[:, :, : count - before] = new[:, :, before:]

            return write
        rows = torch.arange(self.batch, device=slots.device)[:, None]

        def scatter(buffer: Tensor, new: Tensor) -> None:
            buffer[rows, :, slots] = new.transpose(2, 3).to(buffer.dtype)

        return scatter


def sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether frame ``query`` attends to frame ``key``: itself and ``window`` - 1 before it."""
    return (key <= query) & (key > query - window)
