"""The persistent ring of keys and values: each finished frame's are computed once and kept.

Beside it stand the last few frames themselves, for the convolutions (``nfd_env.models.local``).

Every row of the batch (every environment) has its own length and can be reset alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nfd_env.models.layers import attend_masked, attend_packed, by_token
from nfd_env.models.rows import Rows


def sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether frame number ``query`` attends to frame number ``key``: itself and those before."""
    return (key <= query) & (key > query - window)


@dataclass(eq=False)
class FrameCache(Rows):
    """Keys and values of the last frames of each environment, at absolute frame positions.

    Frame number n stands in slot n modulo the ring's length. Unfinished frames of the pass under
    way stand behind the finished ones, in slots of frames that nothing sees any more, until the
    next pass overwrites them.

    Attributes:
        keys: (layers, B, heads, ring, tokens, head width).
        values: likewise.
        length: int64 (B,), finished frames of each row so far.
        last: float32 (B, R, C, h, w), the last finished frames as the network saw them, oldest
            first; zeros before any.
        last_level: float32 (B, R), their noise levels; 1 before any.
        window: a frame sees itself and at most ``window`` - 1 frames before it.
        room: most finished, and most unfinished, frames of a pass. The ring holds as many frames as
            a pass may have beyond those that a frame sees, so that the first frame of a pass still
            finds everything it may see after the last one has been written.
    """

    keys: Tensor = field(metadata={"axis": 1})
    values: Tensor = field(metadata={"axis": 1})
    length: Tensor
    last: Tensor
    last_level: Tensor
    window: int
    room: int

    @staticmethod
    def empty(
        batch: int,
        layers: int,
        heads: int,
        head_width: int,
        tokens: int,
        recent: tuple[int, int, int, int],
        window: int,
        room: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FrameCache:
        """An empty cache for ``batch`` environments.

        ``tokens`` a frame; ``recent`` is (R, C, h, w).
        """
        shape = (layers, batch, heads, window - 1 + 2 * room, tokens, head_width)
        return FrameCache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, *recent, device=device, dtype=torch.float32),
            torch.ones(batch, recent[0], device=device, dtype=torch.float32),
            window,
            room,
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.length)

    @property
    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Length, last frames, their levels: what is replaced as time goes on, not written to."""
        return self.length, self.last, self.last_level

    @ends.setter
    def ends(self, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        self.length, self.last, self.last_level = parts

    @property
    def ring(self) -> int:
        """Frames that there is room for."""
        return self.keys.shape[3]

    def reset(self, mask: Tensor) -> None:
        """Forget everything of the rows where ``mask`` (bool (B,)) is True."""
        self.length = self.length.masked_fill(mask, 0)
        self.last = self.last.masked_fill(mask[:, None, None, None, None], 0)
        self.last_level = self.last_level.masked_fill(mask[:, None], 1)

    def follow(
        self, latents: Tensor, levels: Tensor, commit: int | Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What stands before each frame of a pass; the last ones that are finished are kept.

        Args:
            latents: (B, F, C, h, w), the pass's frames.
            levels: (B, F), theirs.
            commit: so many of them are finished; one number, or one for each row.

        Returns:
            The R frames before each, (B, F, R, C, h, w), and their levels, (B, F, R).
        """
        recent = self.last.shape[1]
        if not recent:
            return latents[:, :, None][:, :, :0], levels[:, :, None][:, :, :0]
        frames = torch.cat((self.last, latents.float()), 1)
        noise = torch.cat((self.last_level, levels.float()), 1)
        if isinstance(commit, int):
            kept = slice(commit, commit + recent)
            self.last, self.last_level = frames[:, kept], noise[:, kept]
        else:
            rows = torch.arange(len(frames), device=frames.device)[:, None]
            finished = torch.tensor(commit, device=frames.device)[:, None]
            kept = finished + torch.arange(recent, device=frames.device)
            self.last, self.last_level = frames[rows, kept], noise[rows, kept]
        return in_turn(frames, noise, recent)

    def begin(self, count: int, commit: int | Sequence[int]) -> RingAttention:
        """Prepare a pass over ``count`` frames that follow the ring's; see ``Dynamics.stream``.

        Raises:
            ValueError: when the pass has more finished or unfinished frames than there is room for.
        """
        commits = [commit] if isinstance(commit, int) else list(commit)
        fewest, largest = min(commits), max(commits)
        if not 0 <= fewest <= largest <= min(count, self.room) or count - largest > self.room:
            raise ValueError(
                f"a pass may finish at most {self.room} frames and draft {self.room}, "
                f"got {largest} and {count - largest}"
            )
        device = self.length.device
        frames = self.length[:, None] + torch.arange(count, device=device)
        uneven = fewest < largest
        self.length = self.length + (torch.tensor(commits, device=device) if uneven else fewest)
        return RingAttention(self, frames)

    def fill(self, count: int) -> FillingAttention:
        """Prepare a pass over the first ``count`` frames, forgetting all; see ``Dynamics.fill``."""
        self.length = torch.full_like(self.length, count)
        self.last, self.last_level = torch.zeros_like(self.last), torch.ones_like(self.last_level)
        return FillingAttention(self, count)


def in_turn(frames: Tensor, levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` = R frames before each but the first R: (B, F + R, ...) -> (B, F, R, ...)."""
    places = torch.arange(frames.shape[1] - count, device=frames.device)[:, None]
    places = places + torch.arange(count, device=frames.device)
    return frames[:, places], levels[:, places]


class RingAttention:
    """Attention of a pass through the ring, which takes in the keys and values of its frames.

    Attributes:
        frames: int64 (B, F), the numbers of the pass's frames.
    """

    def __init__(self, cache: FrameCache, frames: Tensor) -> None:
        """Of the ``frames`` that follow the finished ones of ``cache``."""
        self.frames, self._cache = frames, cache
        self._slots = frames % cache.ring
        same = may_look(frames) and bool((self._slots == self._slots[0]).all())
        self._first = int(self._slots[0, 0]) if same else None
        self._mask = self._visible()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attend``."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._write(keys, k)
        self._write(values, v)
        seen = self._mask[:, :, -q.shape[1] * q.shape[2] :]
        return attend_packed(q, keys.flatten(2, 3), values.flatten(2, 3), seen)

    def _write(self, ring: Tensor, new: Tensor) -> None:
        """Write (B, F, tokens, heads, c) into the ring of a layer."""
        if self._first is None:
            rows = torch.arange(len(new), device=new.device)[:, None]
            ring[rows, :, self._slots] = new.transpose(2, 3).to(ring.dtype)
            return
        # Slices are faster than indices; what is too much goes on at the ring's beginning.
        new = new.permute(0, 3, 1, 2, 4)
        count, first = new.shape[2], self._first
        before = min(count, ring.shape[2] - first)
        ring[:, :, first : first + before] = new[:, :, :before]
        if before < count:
            ring[:, :, : count - before] = new[:, :, before:]

    def _visible(self) -> Tensor:
        """What the frames may see of the ring once they are in it, to add to the scores.

        Returns:
            (B, heads, F * tokens, ring * tokens).
        """
        keys, newest = self._cache.keys, self.frames[:, -1:]
        # A slot of a draft that was dropped is taken for a frame that is too far back to be seen.
        slots = torch.arange(self._cache.ring, device=newest.device)
        held = (newest - (newest - slots) % self._cache.ring)[:, None]
        seen = sees(self.frames[:, :, None], held, self._cache.window) & (held >= 0)
        mask = torch.zeros(seen.shape, device=seen.device, dtype=keys.dtype)
        mask = by_token(mask.masked_fill(~seen, -torch.inf), keys.shape[4])[:, None]
        return mask.expand(-1, keys.shape[2], -1, -1).contiguous()


class FillingAttention:
    """Attention among the frames of a whole history, of which the ring keeps the last ones.

    Attributes:
        frames: int64 (B, F), the frames' numbers, from 0 on.
    """

    def __init__(self, cache: FrameCache, count: int) -> None:
        """Of the first ``count`` frames of every row."""
        numbers = torch.arange(count, device=cache.length.device)
        self.frames, self._cache = numbers.expand(cache.batch, -1), cache
        seen = sees(numbers[:, None], numbers[None], cache.window)
        self._mask = by_token(seen, cache.keys.shape[4])
        self._kept = min(count, cache.window - 1)
        self._slots = numbers[-self._kept :] % cache.ring

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attend``."""
        for ring, new in ((self._cache.keys[layer], k), (self._cache.values[layer], v)):
            kept = new[:, -self._kept :].permute(0, 3, 1, 2, 4)
            ring.index_copy_(2, self._slots, kept.to(ring.dtype))
        return attend_masked(q, k, v, self._mask, scale=1.0)


def may_look(x: Tensor) -> bool:
    """Whether the operations to come may depend on what is in ``x``.

    A GPU would have to be waited for, and its operations could not be captured.
    """
    return x.device.type == "cpu"
