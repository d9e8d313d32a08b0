"""One world as functions of tensors alone, for ONNX: the package's own networks, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nfd_env.inference.rollout import Ahead, FusedVelocity
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.cache import in_turn, sees
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.heads import Heads
from nfd_env.models.layers import FrameRotation, attend_packed, by_token
from nfd_env.models.tokenizer import Tokenizer


class OpenCache:
    """The ring as tensors that come in and go out, in the order of the frames: oldest first.

    Stands in for ``FrameCache`` in ``Dynamics.stream``. A graph has no memory to write slots of, so
    that what a pass finishes moves in at the end and as much moves out at the beginning.

    Attributes:
        keys: (layers, heads, window - 1, P, head width), of the last finished frames; those before
            an episode's first frame are anything.
        values: likewise.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, length: Tensor, recent: Tensor, level: float
    ) -> None:
        """Of ``length``, int64 (1,), finished frames so far.

        ``recent``, (1, R, C, h, w), are the last ones at ``level``; zeros where there are fewer.
        """
        self.keys, self.values, self._length = keys, values, length
        self._remembered = keys.shape[2]
        self._recent = recent
        back = torch.arange(recent.shape[1], 0, -1)
        self._levels = torch.where(back[None] <= length[:, None], level, 1.0)

    def begin(self, count: int, commit: int | Sequence[int]) -> OpenAttention:
        """See ``FrameCache.begin``."""
        assert isinstance(commit, int)
        held = torch.arange(-self._remembered, count) + self._length
        self._length = self._length + commit
        return OpenAttention(self, held, count, commit)

    def follow(
        self, latents: Tensor, levels: Tensor, commit: int | Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """See ``FrameCache.follow``."""
        assert isinstance(commit, int)
        count = self._recent.shape[1]
        frames = torch.cat((self._recent, latents), 1)
        noise = torch.cat((self._levels, levels), 1)
        kept = slice(commit, commit + count)
        self._recent, self._levels = frames[:, kept], noise[:, kept]
        return in_turn(frames, noise, count)

    def kept(self, parts: Sequence[Tensor], commit: int) -> Tensor:
        """A ring, stacked from each layer's (heads, frames, P, c) after a pass."""
        return torch.stack([part[:, commit : commit + self._remembered] for part in parts])


class OpenAttention:
    """Attention of one pass of an ``OpenCache``, see ``nfd_env.models.layers.Attend``."""

    def __init__(self, cache: OpenCache, held: Tensor, count: int, commit: int) -> None:
        """Of the last ``count`` frames of those numbered ``held``; ``commit`` of them stay."""
        self.frames = held[None, -count:]
        self._cache, self._commit = cache, commit
        self._parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        seen = sees(held[-count:, None], held, cache.keys.shape[2] + 1) & (held >= 0)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        self._mask = by_token(mask, cache.keys.shape[3])[None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attend``; the last layer's call finishes the cache."""
        cache, (keys, values) = self._cache, self._parts
        for ring, parts, new in ((cache.keys, keys, k), (cache.values, values, v)):
            parts.append(torch.cat((ring[layer], new[0].permute(2, 0, 1, 3)), 1))
        if layer + 1 == cache.keys.shape[0]:
            cache.keys, cache.values = (cache.kept(p, self._commit) for p in self._parts)
        k, v = (parts[layer].flatten(1, 2)[None] for parts in self._parts)
        return attend_packed(q, k, v, self._mask[:, :, -q.shape[1] * q.shape[2] :])


class OpenRotation(nn.Module):
    """``FrameRotation`` without float64, which onnxruntime-web does not have beside WebGPU.

    Angles are whole numbers of a tiny part of a turn: as exact at any frame number, and small when
    they become float32, of which a GPU knows the cosine near 0 only.
    """

    _TURN = 2**40  # a frame number of 22 bits, days of play, times a whole turn stays within int64

    space: Tensor
    time_rates: Tensor

    def __init__(self, rotation: FrameRotation) -> None:
        """The same rotations as ``rotation``'s."""
        super().__init__()
        assert isinstance(rotation.time_rates, Tensor) and isinstance(rotation.space, Tensor)
        turns = rotation.time_rates / (2 * math.pi) * self._TURN
        self.register_buffer("time_rates", turns.round().long())
        self.register_buffer("space", rotation.space)

    def forward(self, frames: Tensor) -> Tensor:
        """See ``FrameRotation``."""
        parts = frames[..., None, None] * self.time_rates % self._TURN
        angles = parts.float() * (2 * math.pi / self._TURN) - math.pi
        time = -torch.stack((angles.cos(), angles.sin()), -1)  # of half a turn more
        shape = (*frames.shape, len(self.space), -1, 2)
        return torch.cat((time.expand(shape), self.space.expand(shape)), -2).unsqueeze(-3)


class NextFrame(nn.Module):
    """Draws a frame, and takes the one before it into the ring."""

    def __init__(self, dynamics: Dynamics, sampling: SamplingConfig) -> None:
        """Draw by ``dynamics``, which is changed; its steps are written out one after the other."""
        super().__init__()
        dynamics.rotation = OpenRotation(dynamics.rotation)  # type: ignore[assignment]
        self.dynamics, self._sampling = dynamics, sampling

    def forward(
        self,
        before: Tensor,
        action_before: Tensor,
        action: Tensor,
        frame: Tensor,
        noise: Tensor,
        keys: Tensor,
        values: Tensor,
        *recent: Tensor,
    ) -> tuple[Tensor, ...]:
        """One frame of one episode.

        Args:
            before: (1, C, h, w), the frame before, at the history level.
            action_before: (1, action_width), encoded, that led into it.
            action: (1, action_width), that leads into the new frame.
            frame: int64 (1,), number of the frame before; the first of an episode has 0.
            noise: (1 + ``renoisings``, C, h, w), standard normal: the frame's own, renoisings.
            keys: see ``OpenCache``; of the frames before ``before``.
            values: likewise.
            recent: where the dynamics has ``recent`` frames, those before ``before``, (1, R, C, h,
                w), as they were given for it; zeros where there are none.

        Returns:
            The new frame's latents (1, C, h, w), keys and values.
        """
        level = self._sampling.history_level
        none = before.new_zeros(1, 0, *before.shape[1:])
        cache = OpenCache(keys, values, frame, recent[0] if recent else none, level)
        ahead = Ahead(cache, before[None], action_before[None], action[None])  # type: ignore[arg-type]
        velocity = FusedVelocity(self.dynamics, ahead, level)
        scaled = (self._sampling.temperature * noise)[:, None, None].unbind(0)
        made = self._sampling.sample(velocity, scaled[0], scaled[1:])
        return made[0], cache.keys, cache.values


class Judge(nn.Module):
    """Reward and end of a transition."""

    def __init__(self, heads: Heads) -> None:
        """Of ``heads``."""
        super().__init__()
        self.heads = heads

    def forward(
        self, latents: Tensor, action: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Heads.step``: reward (1,), hazard (1,), and the memory to go on from."""
        made = self.heads.step(latents, action, memory)
        return made.reward, made.hazard, made.state


class Decoder(nn.Module):
    """Latents to a picture."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Of ``tokenizer``."""
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, latents: Tensor) -> Tensor:
        """(1, C, h, w) -> uint8 (H, W, 3)."""
        return self.tokenizer.decode_frames(latents)[0]


class Starts(nn.Module):
    """The recorded moments that episodes start from."""

    latents: Tensor
    actions: Tensor

    def __init__(self, latents: Tensor, actions: Tensor) -> None:
        """Of (n, K, C, h, w) and (n, K, action_width)."""
        super().__init__()
        self.register_buffer("latents", latents)
        self.register_buffer("actions", actions)

    def forward(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Number of a start, int64 (1,) -> its latents (K, C, h, w) and actions (K, width)."""
        return self.latents[start][0], self.actions[start][0]
