"""A world that steps: tokenizer, dynamics and heads behind ``start`` and ``step``.

One step is: draw the new frame's noise, denoise it in a pass that also commits the frame before it
to the key/value ring, then read reward and end off the drawn frame.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env.flow.solvers import Velocity
from nfd_env.inference.cuda_graph import CapturedCalls
from nfd_env.inference.noise import mix, noise
from nfd_env.inference.rollout import Ahead, FusedVelocity, new_cache
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context, Drawn, Transition, WorldState
from nfd_env.models.cache import FrameCache
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.heads import Heads
from nfd_env.models.tokenizer import Tokenizer
from nfd_env.precision import stepping

# Share of kept actions taken for granted when an episode begins, see ``speculation``.
PRIOR_KEPT = 0.9


class WorldModel:
    """Steps batches of worlds; holds no state of any of them.

    The same seeds and actions give the same rollout bit for bit, on one device with batches of
    one size. A row of a batch equals the same row alone up to how products of other sizes are
    summed: on a CPU within 2 grey levels over 60 frames, in fp32 and in bf16, whose operations
    are the same for every number of rows; on a GPU, which chooses its kernels by size, so much
    in fp32 (with ``torch.backends.cudnn.allow_tf32 = False`` where the dynamics has
    convolutions), while bf16 rollouts part after some frames and stay alike in distribution
    only.

    Attributes:
        sampling: how frames are drawn where a call does not say otherwise.
        world_id: what states of this world carry and those of others do not.
        captures: replay steps as CUDA graphs, see ``CapturedCall``; True on a GPU.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dynamics: Dynamics,
        heads: Heads,
        sampling: SamplingConfig,
        world_id: str = "",
    ) -> None:
        """Put the networks together; they must be on one device and in eval mode.

        Args:
            tokenizer: encodes and decodes frames.
            dynamics: draws frames.
            heads: reward and termination.
            sampling: the default.
            world_id: "" for a digest of the heads, which student and teacher of a world share.
        """
        self.tokenizer, self.dynamics, self.heads = tokenizer, dynamics, heads
        self.sampling, self.world_id = sampling, world_id or digest(heads)
        self.captures = self.device.type == "cuda"
        self._captured = CapturedCalls()

    def with_sampling(self, sampling: SamplingConfig) -> WorldModel:
        """The same networks with another default."""
        made = copy.copy(self)
        made.sampling, made._captured = sampling, CapturedCalls()
        return made

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.dynamics.embed.weight.device

    @property
    def precision(self) -> str:
        """The number format of tokenizer and dynamics, "fp32" or "bf16"."""
        return "bf16" if self.dynamics.embed.weight.dtype == torch.bfloat16 else "fp32"

    @stepping
    def start(
        self,
        contexts: Sequence[Context],
        seeds: Sequence[tuple[int, int]],
        frames: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> WorldState:
        """States whose last frame is each context's last frame.

        Args:
            contexts: one a row; rows may have different numbers of frames. The heads see all of
                them, the dynamics model as many as it looks back.
            seeds: one (environment seed, episode number) a row.
            frames: n, most frames that are drawn in one pass, see ``speculation``.
            sampling: None for the default.
        """
        sampling = sampling or self.sampling
        groups: dict[int, list[int]] = {}  # rows with equally many frames share one pass
        for row, context in enumerate(contexts):
            groups.setdefault(len(context.latents), []).append(row)
        parts = [
            self._start_group(
                [contexts[r] for r in rows], [seeds[r] for r in rows], frames, sampling
            )
            for rows in groups.values()
        ]
        if len(parts) == 1:
            return parts[0]
        state = parts[0].take([0] * len(contexts))
        for part, rows in zip(parts, groups.values(), strict=True):
            state.put(rows, part)
        return state

    def _start_group(
        self,
        contexts: list[Context],
        seeds: list[tuple[int, int]],
        frames: int,
        sampling: SamplingConfig,
    ) -> WorldState:
        """``start`` from equally long contexts."""
        batch, count = len(contexts), len(contexts[0].latents)
        # A power of two where it is captured, so that there are few sizes.
        padding = (1 << (batch - 1).bit_length()) - batch if self.captures else 0
        contexts = [*contexts, *[contexts[0]] * padding]
        keys = [mix(*seed) for seed in [*seeds, *[seeds[0]] * padding]]
        inputs = (
            self._moved(torch.stack([c.latents for c in contexts]).float()),
            self._moved(torch.stack([c.actions for c in contexts]).float()),
            self._moved(torch.tensor(keys, dtype=torch.int64, device="cpu")),
        )
        begin = partial(self._begun, frames, sampling)
        if self.captures:
            key = "start", len(contexts), count, frames, sampling
            made = self._captured(self, key, begin, *inputs)
        else:
            made = begin(*inputs)
        remembered, memory, *parts = made
        cache = FrameCache(*parts, window=self.dynamics.config.window, room=frames)
        latents, actions, keys = inputs
        nothing, ones = latents.new_zeros(len(keys), 1), np.ones(len(keys), np.int64)
        drawn = Drawn(latents[:, -1:], nothing, nothing.bool(), nothing, remembered, memory)
        state = WorldState(
            cache,
            drawn.padded(frames),
            actions[:, -1:],
            keys,
            ones,
            ones.copy(),
            np.full(len(keys), PRIOR_KEPT),
            np.zeros((len(keys), 3), np.int64),
            frames,
            self.world_id,
        )
        return state.take(range(batch)) if padding else state

    def _begun(
        self, frames: int, sampling: SamplingConfig, latents: Tensor, actions: Tensor, keys: Tensor
    ) -> tuple[Tensor, ...]:
        """The last frame as it is remembered, the heads' memory, and the parts of a cache."""
        memory = self.heads.initial_state(len(latents))
        if latents.shape[1] > 1:
            _, memory = self.heads(latents[:, 1:], actions[:, 1:], memory)
        seen = self.dynamics.config.window
        remembered, cache = self._history(
            frames, sampling, latents[:, -seen:], actions[:, -seen:], keys
        )
        return remembered, memory[:, None], cache.keys, cache.values, *cache.ends

    def _history(
        self, frames: int, sampling: SamplingConfig, latents: Tensor, actions: Tensor, keys: Tensor
    ) -> tuple[Tensor, FrameCache]:
        """The last of given frames as it is remembered, and a cache with those before it."""
        batch, count = latents.shape[:2]
        first = torch.zeros_like(keys)[:, None]
        normal, _ = self._noise(keys, first, count, sampling)
        remembered = torch.lerp(latents, normal[:, :, 1], sampling.history_level)
        cache = new_cache(self.dynamics, batch, frames)
        if count > 1:
            levels = latents.new_full((batch, count - 1), sampling.history_level)
            self.dynamics.fill(cache, remembered[:, :-1], levels, actions[:, :-1])
        return remembered[:, -1:], cache

    @stepping
    def step(
        self, state: WorldState, actions: Tensor, sampling: SamplingConfig | None = None
    ) -> Transition:
        """Advance every row of ``state`` (in place) by one frame, drawing no drafts.

        Args:
            state: as ``start`` made it with ``frames`` = 1; see ``speculation`` for others.
            actions: encoded, (B, action_width).
            sampling: None for the default.
        """
        assert state.frames == 1, "a state with drafts is stepped by speculation.advance"
        state.drawn = self.draw(state, actions, 1, sampling)
        state.action = self._encoded(actions)[:, None]
        return state.drawn.transition(0)

    @stepping
    def draw(
        self,
        state: WorldState,
        actions: Tensor,
        count: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> Drawn:
        """Draw the frames that follow if each row's action is kept, all of them jointly.

        The first denoising pass commits the frames that have happened since the last one to
        ``state.cache``; all else in ``state`` stays as it is. Frame number f of a row has the same
        noise whenever it is drawn.

        Args:
            state: as ``start`` made it.
            actions: encoded, (B, action_width).
            count: n, frames to draw.
            sampling: None for the default.
        """
        sampling, cache = sampling or self.sampling, state.cache
        pending = int(state.used.max())
        counts = None if (state.used == pending).all() else state.used.tolist()
        used = pending if counts is None else torch.tensor(counts, device=self.device)
        inputs = (
            *cache.ends,
            cache.length + used,
            state.drawn.remembered[:, :pending],
            state.action.expand(-1, pending, -1),
            state.memory,
            self._encoded(actions)[:, None].expand(-1, count, -1),
            state.keys,
        )
        drawn = partial(self._drawn, cache, counts, sampling)
        if self.captures and counts is None:
            key = self.dynamics, sampling, pending, count
            made = self._captured(cache, key, drawn, *inputs)
        else:
            made = drawn(*inputs)
        cache.ends = made[0], made[1], made[2]
        return Drawn(*made[3:])

    def _drawn(
        self,
        cache: FrameCache,
        counts: Sequence[int] | None,
        sampling: SamplingConfig,
        length: Tensor,
        last: Tensor,
        last_level: Tensor,
        first: Tensor,
        pending: Tensor,
        pending_actions: Tensor,
        memory: Tensor,
        actions: Tensor,
        keys: Tensor,
    ) -> tuple[Tensor, ...]:
        """The new ends of ``cache``, and what a ``Drawn`` has.

        Args:
            cache: whose memory is used, and written to.
            counts: see ``Ahead``.
            sampling: how to draw.
            length: see ``FrameCache``.
            last: likewise.
            last_level: likewise.
            first: int64 (B,), numbers of the first new frames.
            pending: see ``Ahead``.
            pending_actions: likewise.
            memory: (B, width), the heads' state before the new frames.
            actions: (B, n, action_width), into the new frames.
            keys: int64 (B,), of the noise.
        """
        cache.ends = length, last, last_level
        ahead = Ahead(cache, pending, pending_actions, actions, counts)
        made, remembered, uniform = self._frames(ahead, first[:, None], keys, sampling)
        seen = []
        for k in range(actions.shape[1]):
            seen.append(self.heads.step(made[:, k], actions[:, k], memory))
            memory = seen[-1].state
        hazard = torch.stack([s.hazard for s in seen], 1)
        return (
            *cache.ends,
            made,
            torch.stack([s.reward for s in seen], 1),
            uniform < hazard,
            hazard,
            remembered,
            torch.stack([s.state for s in seen], 1),
        )

    def _frames(
        self, ahead: Ahead, first: Tensor, keys: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New frames: see ``_drawn``, but with ``first`` (B, 1).

        Returns:
            (B, n, C, h, w), what is remembered of them, (B, n, ...), and uniform numbers (B, n) for
            their ends.
        """
        normal, uniform = self._noise(keys, first, ahead.actions.shape[1], sampling)
        velocity = self._velocity(ahead, sampling.history_level)
        scaled = (sampling.temperature * normal).unbind(2)
        made = sampling.sample(velocity, scaled[0], scaled[2:])
        return made, torch.lerp(made, normal[:, :, 1], sampling.history_level), uniform

    def _velocity(self, ahead: Ahead, history_level: float) -> Velocity:
        """The velocity that new frames are drawn by."""
        return FusedVelocity(self.dynamics, ahead, history_level)

    def check_fits(self, state: WorldState, frames: int) -> None:
        """Check that ``state`` can be stepped by this model, with passes of ``frames`` frames.

        Raises:
            ValueError: when it is of another world, device or precision, or was made for other
                passes; says which.
        """
        if state.world_id != self.world_id:
            raise ValueError("the state is of another world; save it in an env of this one")
        if state.frames != frames:
            raise ValueError(
                f"the state was saved with speculative_frames={state.frames}, this env has "
                f"speculative_frames={frames}; use the same for both"
            )
        mine, weight = state.cache.keys, self.dynamics.embed.weight
        if (mine.device, mine.dtype) != (weight.device, weight.dtype):
            raise ValueError(
                f"the state was saved with {mine.dtype} on {mine.device}, this env has "
                f"{weight.dtype} on {weight.device}; use the same precision and device for both"
            )
        expected = new_cache(self.dynamics, 0, frames)
        last = getattr(state.cache, "last", None)  # None in states of earlier versions
        if (
            last is None
            or mine[:, :0].shape != expected.keys.shape
            or last[:0].shape != expected.last.shape
            or state.drawn.latents.shape[2:] != self.dynamics.config.latent_shape
        ):
            raise ValueError("the state is of networks of other sizes")

    @property
    def most_frames(self) -> int:
        """Most frames that one pass can draw."""
        return self.dynamics.config.window - 1

    @property
    def feature_size(self) -> int:
        """How many numbers ``features`` gives of a frame."""
        return self.heads.config.latent_size + self.heads.config.width

    @stepping
    def features(self, latents: Tensor, actions: Tensor, memory: Tensor) -> Tensor:
        """A frame, and what the heads make of all that has happened so far.

        The z and h of World Models (Ha and Schmidhuber 2018, arXiv 1803.10122).

        Args:
            latents: (B, C, h, w).
            actions: encoded, (B, action_width), into the frame; zeros before any action.
            memory: (B, width), the heads' recurrent state after the frame; that of
                ``Heads.initial_state`` where it is the first.

        Returns:
            float32 (B, ``feature_size``): the latents, flattened, and behind them the numbers that
            reward and termination are read off.
        """
        latents, actions = latents.float(), self._encoded(actions)
        seen = self.heads.features_after(latents, actions, memory)
        return torch.cat((latents.flatten(1), seen), 1)

    @stepping
    def remember(self, latents: Tensor, actions: Tensor, memory: Tensor) -> Tensor:
        """The heads' recurrent state (B, width) after a further frame; see ``features``.

        Args:
            latents: (B, C, h, w).
            actions: encoded, (B, action_width), into the frame.
            memory: (B, width), before it.
        """
        return self.heads.step(latents.float(), self._encoded(actions), memory).state

    @stepping
    def features_along(self, context: Context) -> Tensor:
        """``features`` of each of the K frames of a context, float32 (K, ``feature_size``)."""
        latents, actions = (
            part.to(self.device, torch.float32) for part in (context.latents, context.actions)
        )
        nothing = self.heads.initial_state(1)
        first = self.features(latents[:1], actions[:1], nothing)
        if len(latents) == 1:
            return first
        seen, _ = self.heads.features(latents[None, 1:], actions[None, 1:], nothing)
        return torch.cat((first, torch.cat((latents[1:].flatten(1), seen[0]), 1)))

    @stepping
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 frames (B, H, W, 3)."""
        return self.tokenizer.decode_frames(latents)

    @stepping
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, H, W, 3) -> latents (B, C, h, w)."""
        return self.tokenizer.encode_frames(frames.to(self.device))

    @stepping
    def reencoding_error(self, latents: Tensor, frames: Tensor) -> Tensor:
        """How far latents are from what the tokenizer makes of their picture.

        Args:
            latents: (B, C, h, w).
            frames: uint8 (B, H, W, 3), decoded from ``latents``.

        Returns:
            float32 (B,), the root mean square of encode(decode(z)) - z; it grows as z leaves the
            tokenizer's image of real frames.
        """
        return (self.encode(frames) - latents.float()).square().flatten(1).mean(1).sqrt()

    def _encoded(self, actions: Tensor) -> Tensor:
        return actions.to(self.device, torch.float32)

    def _moved(self, x: Tensor) -> Tensor:
        """``x`` on the device, which need not have finished what it is doing."""
        if x.device.type == "cpu" and self.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def _noise(
        self, keys: Tensor, first: Tensor, count: int, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor]:
        """What is random about frames: a function of each one's episode and number alone.

        Args:
            keys: int64 (B,), of the episodes.
            first: int64 (B, 1), number of the first frame.
            count: n, frames of each row.
            sampling: how they are drawn.

        Returns:
            Normal numbers (B, n, 2 + ``renoisings``, C, h, w): the noise that the frame is drawn
            from, its history noise, and renoisings. Uniform numbers (B, n) for the frames' ends.
        """
        shape = (2 + sampling.renoisings, *self.dynamics.config.latent_shape)
        frames = first if count == 1 else first + torch.arange(count, device=first.device)
        normal, uniform = noise(keys[:, None], frames, math.prod(shape))
        return normal.view(*frames.shape, *shape), uniform


def digest(network: nn.Module) -> str:
    """A short hash of a network's weights."""
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        made.update(name.encode())
        made.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return made.hexdigest()
