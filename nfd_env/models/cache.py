"""The persistent ring of keys and values: each finished frame's are computed once and kept.

Every row of the batch (every environment) has its own length and can be reset alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfd_env.models.captured import CapturedCall
from nfd_env.models.layers import Attend, attend_masked, attend_packed, by_token
from nfd_env.models.sight import Sight


@dataclass(frozen=True)
class StreamView:
    """What one streaming pass needs: the frames' numbers, and attention through the ring."""

    frames: Tensor
    attend: Attend


class FrameCache:
    """Keys and values of the last frames of each environment, at absolute frame positions.

    Frame number n stands in slot n modulo ``ring``. Unfinished frames of the pass under way stand
    behind the finished ones, in slots of frames that nothing sees any more, until the next pass
    overwrites them. Key frames (see ``Sight``) stand in a second ring behind the first as well, key
    frame number k in its slot k modulo ``far_ring``, and are seen there once they are no longer
    among the latest.
    """

    def __init__(
        self,
        batch: int,
        layers: int,
        heads: int,
        head_width: int,
        tokens: int,
        sight: Sight,
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
            sight: which frames a frame may see.
            drafts: most unfinished frames in one pass.
            commits: most frames finished in one pass. The rings hold as many frames as a pass may
                have beyond those that a frame sees, so that the first frame of a pass still finds
                everything it may see after the last one has been written.
            device: of the buffers.
            dtype: of the buffers.
        """
        self.sight, self.ring, self.far_ring = sight, sight.window - 1 + commits + drafts, 0
        if sight.keyframes:
            # A pass of commits + drafts frames, and the window that hides its first frame's past.
            hidden = sight.window - 1 + commits + drafts
            self.far_ring = sight.keyframes + -(-hidden // sight.stride)
        self.drafts, self.commits, self.tokens = drafts, commits, tokens
        shape = (layers, batch, heads, self.ring + self.far_ring, tokens, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._untouched = True
        # Calls that were captured with these very buffers; copies have their own.
        self.captured: dict[Hashable, CapturedCall] = {}

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.length)

    def reset(self, mask: Tensor) -> None:
        """Forget everything of the rows where ``mask`` (bool (B,)) is True."""
        self.length = self.length.masked_fill(mask, 0)

    def put(self, rows: Tensor, other: FrameCache) -> None:
        """Replace the ``rows`` (int (n,)) by the n rows of ``other``, a cache of the same shape."""
        self._untouched = False
        self.keys[:, rows] = other.keys
        self.values[:, rows] = other.values
        self.length = self.length.index_copy(0, rows, other.length)

    def take(self, rows: Tensor) -> FrameCache:
        """A copy of the ``rows`` (int (n,))."""
        copy = object.__new__(FrameCache)
        copy.__dict__.update(self.__dict__, captured={})
        copy.keys, copy.values = self.keys[:, rows], self.values[:, rows]
        copy.length = self.length[rows]
        return copy

    def clone(self) -> FrameCache:
        """An independent copy."""
        return self.take(torch.arange(self.batch, device=self.length.device))

    def resized(self, drafts: int, commits: int) -> FrameCache:
        """A copy with room for other numbers of ``drafts`` and ``commits``."""
        layers, batch, heads, _, tokens, width = self.keys.shape
        copy = FrameCache(
            batch,
            layers,
            heads,
            width,
            tokens,
            self.sight,
            drafts,
            commits,
            self.keys.device,
            self.keys.dtype,
        )
        copy.length, copy._untouched = self.length.clone(), self._untouched
        rows, newest = torch.arange(batch, device=self.length.device)[:, None], self.length - 1
        back = torch.arange(self.sight.window - 1, device=rows.device)
        numbers = newest[:, None] - back
        source, target = numbers % self.ring, numbers % copy.ring
        if self.far_ring:
            back = torch.arange(min(self.far_ring, copy.far_ring), device=rows.device)
            numbers = newest[:, None] // self.sight.stride - back
            source = torch.cat((source, self.ring + numbers % self.far_ring), 1)
            target = torch.cat((target, copy.ring + numbers % copy.far_ring), 1)
        for mine, its in ((self.keys, copy.keys), (self.values, copy.values)):
            its[:, rows, :, target] = mine[:, rows, :, source]
        return copy

    def begin(
        self, count: int, commit: int | Sequence[int], numbers: Tensor | None = None
    ) -> StreamView:
        """Prepare a pass over ``count`` frames that follow the ring's; see ``Dynamics.stream``.

        Raises:
            ValueError: when the pass has more finished or unfinished frames than there is room for.
        """
        commits = [commit] if isinstance(commit, int) else list(commit)
        fewest, largest = min(commits), max(commits)
        uneven = fewest < largest
        # Nothing is pushed out of an empty ring, so it takes a whole context at once.
        whole = largest > self.commits or numbers is not None
        empty = whole and not uneven and (self._untouched or not self.length.any())
        if numbers is not None and not (empty and largest == count == len(numbers)):
            raise ValueError("only a finished context in an empty cache can have frame numbers")
        most = count if empty else self.commits
        if not 0 <= fewest <= largest <= min(count, most) or count - largest > self.drafts:
            raise ValueError(
                f"a pass may finish at most {most} frames and draft {self.drafts}, "
                f"got {largest} and {count - largest}"
            )
        device, self._untouched = self.length.device, False
        if numbers is None:
            frames = self.length[:, None] + torch.arange(count, device=device)
            self.length = self.length + (torch.tensor(commits, device=device) if uneven else fewest)
        else:
            frames = numbers.to(device).expand(self.batch, -1)
            self.length = frames[:, -1] + 1
        if empty:
            return StreamView(frames, self._take_in(frames, numbers is None))
        mask = self._mask(frames)
        write, write_far = self._writer(frames % self.ring), self._far_writer(frames)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            for buffer, new in ((keys, k), (values, v)):
                write(buffer, new)
                write_far(buffer, new)
            seen = mask[:, :, -q.shape[1] * self.tokens :]
            return attend_packed(q, keys.flatten(2, 3), values.flatten(2, 3), seen)

        return StreamView(frames, attend)

    def _take_in(self, frames: Tensor, consecutive: bool) -> Attend:
        """Attention among the ``frames`` (B, F) of a whole context, which keeps the last ones.

        Args:
            frames: their numbers, the same in every row.
            consecutive: whether these are 0 to F - 1.
        """
        numbers, count, sight = frames[0], frames.shape[1], self.sight
        mask = by_token(sight.sees(numbers[:, None], numbers[None]), self.tokens)
        kept = min(count, sight.window - 1)
        if not consecutive:
            kept = int(sight.near(numbers[-1] + 1, numbers).sum())
        write = self._writer(frames[:, -kept:] % self.ring)
        # Of the key frames as many as the ring holds.
        marked = torch.arange(0, count, sight.stride, device=frames.device)
        if not consecutive:
            marked = (numbers % sight.stride == 0).nonzero()[:, 0]
        ring = max(1, self.far_ring)
        marked = marked[-ring:]
        far = self.ring + numbers[marked] // sight.stride % ring

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
                write(buffer, new[:, -kept:])
                if self.far_ring:
                    buffer[:, :, far] = new[:, marked].permute(0, 3, 1, 2, 4).to(buffer.dtype)
            return attend_masked(q, k, v, mask, scale=1.0)

        return attend

    def _mask(self, frames: Tensor) -> Tensor:
        """What ``frames`` (B, F) may see of the rings once they are in them.

        Returns:
            (B, heads, F * tokens, slots * tokens), to add to the scores.
        """
        newest, query = frames[:, -1:], frames[:, :, None]

        # A slot of a draft that was dropped is taken for a frame that is too far back to be seen.
        def held(newest: Tensor, ring: int) -> Tensor:
            return (newest - (newest - torch.arange(ring, device=frames.device)) % ring)[:, None]

        latest = held(newest, self.ring)
        seen = self.sight.near(query, latest) & (latest >= 0)
        if self.far_ring:
            stride = self.sight.stride
            marked = stride * held(newest // stride, self.far_ring)
            seen = torch.cat((seen, self.sight.far(query, marked) & (marked >= 0)), -1)
        mask = torch.zeros(seen.shape, device=frames.device, dtype=self.keys.dtype)
        mask = by_token(mask.masked_fill(~seen, -torch.inf), self.tokens)[:, None]
        return mask.expand(-1, self.keys.shape[2], -1, -1).contiguous()

    def _writer(self, slots: Tensor) -> Callable[[Tensor, Tensor], None]:
        """A function that writes (B, F, tokens, heads, c) to the ``slots`` (B, F) of a layer."""
        if may_look(slots) and bool((slots == slots[0]).all()):
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

    def _far_writer(self, frames: Tensor) -> Callable[[Tensor, Tensor], None]:
        """A function that writes those of (B, F, tokens, heads, c) that are key frames."""
        if not self.far_ring:
            return lambda buffer, new: None
        marked = frames % self.sight.stride == 0
        slots = self.ring + frames // self.sight.stride % self.far_ring
        if not may_look(frames):
            # The others are written once more to where they are anyway.
            return self._writer(torch.where(marked, slots, frames % self.ring))
        rows, places = marked.nonzero(as_tuple=True)
        if not len(rows):
            return lambda buffer, new: None
        chosen = slots[rows, places]

        def scatter(buffer: Tensor, new: Tensor) -> None:
            buffer[rows, :, chosen] = new[rows, places].transpose(1, 2).to(buffer.dtype)

        return scatter


def may_look(x: Tensor) -> bool:
    """Whether the operations to come may depend on what is in ``x``.

    A GPU would have to be waited for, and its operations could not be captured.
    """
    return x.device.type == "cpu"
