"""A world that steps: tokenizer, dynamics and heads behind ``start`` and ``step``.

One step is: draw the new frame's noise, denoise it in a pass that also commits the frame before it
to the key/value ring, then read reward and end off the drawn frame.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfd_env.flow.solvers import (
    level_grid,
    sample_consistency,
    sample_dpm_solver_pp,
    sample_euler,
)
from nfd_env.inference.noise import generated, hashed, mix
from nfd_env.inference.rollout import Sampler, denoise, new_cache
from nfd_env.models.cache import FrameCache
from nfd_env.models.captured import CapturedCall
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.heads import Heads
from nfd_env.models.tokenizer import Tokenizer

SAMPLERS = {"euler": sample_euler, "dpm_solver_pp": sample_dpm_solver_pp}
CONSISTENCY = "consistency"


@dataclass(frozen=True)
class SamplingConfig:
    """How a world's frames are drawn.

    Attributes:
        steps: denoising steps a frame, each one transformer pass.
        sampler: "euler" or "dpm_solver_pp"; "consistency" for distilled dynamics, whose frames hold
            from 1 step on.
        shift: > 1 spends more of the steps near the noise, see ``level_grid``.
        history_level: noise level in [0, 1) at which finished frames are remembered; more makes a
            world less certain of its past.
        temperature: > 0, scale of the noise that frames are drawn from; above 1 makes a world less
            predictable (Ha and Schmidhuber 2018).
    """

    steps: int = 4
    sampler: str = "dpm_solver_pp"
    shift: float = 1.0
    history_level: float = 0.15
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, got {self.steps}")
        known = (*SAMPLERS, CONSISTENCY)
        if self.sampler not in known:
            raise ValueError(f"sampler must be one of {', '.join(known)}, got {self.sampler!r}")
        if not 0 <= self.history_level < 1:
            raise ValueError(f"history_level must lie in [0, 1), got {self.history_level}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")

    @property
    def renoisings(self) -> int:
        """Noises that a frame needs beyond its first."""
        return self.steps - 1 if self.sampler == CONSISTENCY else 0

    def make(self, renoise: Sequence[Tensor] = ()) -> Sampler:
        """The sampler as a function of (velocity, noise).

        Args:
            renoise: ``renoisings`` further noises, each shaped like the first.
        """
        levels = level_grid(self.steps, self.shift)
        if self.sampler == CONSISTENCY:
            return lambda velocity, noise: sample_consistency(velocity, noise, levels, renoise)
        function = SAMPLERS[self.sampler]
        return lambda velocity, noise: function(velocity, noise, levels)


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


@dataclass
class WorldState:
    """Everything that the future of each row depends on.

    Attributes:
        cache: keys and values of the frames before the last one.
        remembered: (B, 1, C, h, w), the last frame at the history level, not yet committed.
        action: (B, 1, action_width), the action that led into it.
        memory: (B, width), the heads' recurrent state after it.
        seeds: one (seed, episode) pair a row; with the frame number the key of all its noise.
        frame: number of the last frame of each row, counted from the context's first.
    """

    cache: FrameCache
    remembered: Tensor
    action: Tensor
    memory: Tensor
    seeds: list[tuple[int, int]]
    frame: list[int]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.seeds)

    @property
    def speculative_frames(self) -> int:
        """Most frames that are drawn jointly."""
        return self.cache.drafts

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> WorldState:
        """An independent copy of some rows, in the given order; a row may be taken repeatedly."""
        index = torch.as_tensor(list(rows), device=self.remembered.device)
        return WorldState(
            self.cache.take(index),
            self.remembered[index],
            self.action[index],
            self.memory[index],
            [self.seeds[r] for r in rows],
            [self.frame[r] for r in rows],
        )

    def fork(self) -> WorldState:
        """An independent copy; stepping one leaves the other alone."""
        return self.take(range(self.batch))

    @torch.inference_mode()
    def put(self, rows: Sequence[int], other: WorldState) -> None:
        """Replace some rows by the rows of ``other``."""
        index = torch.as_tensor(list(rows), device=self.remembered.device)
        self.cache.put(index, other.cache)
        # Out of place, so that tensors handed out earlier keep their values.
        self.remembered = self.remembered.index_copy(0, index, other.remembered)
        self.action = self.action.index_copy(0, index, other.action)
        self.memory = self.memory.index_copy(0, index, other.memory)
        for i, row in enumerate(rows):
            self.seeds[row], self.frame[row] = other.seeds[i], other.frame[i]


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


@dataclass(frozen=True)
class Drawn:
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

    def outcome(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a ``Transition`` is made of."""
        return self.latents, self.reward, self.terminated, self.hazard, self.memory

    def map(self, function: Callable[[Tensor], Tensor]) -> Drawn:
        """Apply ``function`` to every tensor."""
        return Drawn(**{name: function(part) for name, part in vars(self).items()})


class WorldModel:
    """Steps batches of worlds; holds no state of any of them.

    Attributes:
        sampling: how frames are drawn.
        captures: replay steps as CUDA graphs, see ``CapturedCall``; True on a GPU.
    """

    def __init__(
        self, tokenizer: Tokenizer, dynamics: Dynamics, heads: Heads, sampling: SamplingConfig
    ) -> None:
        """Put the networks together; they must be on one device and in eval mode."""
        self.tokenizer, self.dynamics, self.heads = tokenizer, dynamics, heads
        self.sampling = sampling
        self.captures = self.device.type == "cuda"
        self._generator = torch.Generator()
        self._starts: dict[Hashable, CapturedCall] = {}

    def with_sampling(self, sampling: SamplingConfig) -> WorldModel:
        """The same networks under another sampling configuration."""
        model = copy.copy(self)
        model.sampling = sampling
        model._generator, model._starts = torch.Generator(), {}
        return model

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.dynamics.embed.weight.device

    @property
    def precision(self) -> str:
        """The number format of tokenizer and dynamics, "fp32" or "bf16"."""
        return "bf16" if self.dynamics.embed.weight.dtype == torch.bfloat16 else "fp32"

    @torch.inference_mode()
    def start(
        self, contexts: Sequence[Context], seeds: Sequence[tuple[int, int]], frames: int = 1
    ) -> WorldState:
        """States whose last frame is each context's last frame.

        Args:
            contexts: one a row; rows may have different numbers of frames. The heads see all of
                them, the dynamics model as many as it looks back.
            seeds: one (environment seed, episode number) a row, both >= 0.
            frames: most frames that are drawn or pending at a time, see ``draw``.
        """
        keep = self.dynamics.config.sight.reach
        groups: dict[int, list[int]] = {}  # rows with equally many frames share one pass
        for row, context in enumerate(contexts):
            groups.setdefault(len(context.latents), []).append(row)
        parts = [
            self._start_group(
                [contexts[r] for r in rows], [seeds[r] for r in rows], min(count, keep), frames
            )
            for count, rows in groups.items()
        ]
        if len(parts) == 1:
            return parts[0]
        state = WorldState(
            new_cache(self.dynamics, len(contexts), frames, frames),
            torch.cat([p.remembered for p in parts]),
            torch.cat([p.action for p in parts]),
            torch.cat([p.memory for p in parts]),
            [seed for p in parts for seed in p.seeds],
            [frame for p in parts for frame in p.frame],
        )
        for part, rows in zip(parts, groups.values(), strict=True):
            state.put(rows, part)
        return state

    def _start_group(
        self,
        contexts: Sequence[Context],
        seeds: Sequence[tuple[int, int]],
        count: int,
        frames: int,
    ) -> WorldState:
        """``start`` from equally long contexts, the last ``count`` frames of them for dynamics."""
        batch, seeds = len(contexts), list(seeds)
        # A power of two where it is captured, so that there are few sizes.
        padding = (1 << (batch - 1).bit_length()) - batch if self.captures else 0
        contexts = [*contexts, *[contexts[0]] * padding]

        def fill(latents: Tensor, actions: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            memory = self.heads.initial_state(len(latents))
            if latents.shape[1] > 1:
                _, memory = self.heads(latents[:, 1:], actions[:, 1:], memory)
            latents, actions = latents[:, -count:], actions[:, -count:]
            level = self.sampling.history_level
            noise, _ = self._noise(keys)
            remembered = torch.lerp(latents, noise[:, 1].view_as(latents), level)
            filled = new_cache(self.dynamics, len(latents), frames, frames)
            if count > 1:
                levels = latents.new_full((len(latents), count - 1), level)
                self.dynamics.stream(
                    filled, remembered[:, :-1], levels, actions[:, :-1], commit=count - 1
                )
            parts = remembered[:, -1:], actions[:, -1:], memory
            return *parts, filled.length, filled.keys, filled.values

        inputs = (
            self._moved(torch.stack([c.latents for c in contexts]).float()),
            self._moved(torch.stack([c.actions for c in contexts]).float()),
            self._keys([*seeds, *[seeds[0]] * padding], [range(count)] * len(contexts)),
        )
        if self.captures:
            key = len(contexts), len(contexts[0].latents), frames
            made = self._starts.setdefault(key, CapturedCall())(fill, *inputs)
        else:
            made = fill(*inputs)
        cache = new_cache(self.dynamics, 0, frames, frames)
        cache.keys, cache.values = (part[:, :batch] for part in made[4:])
        remembered, action, memory, cache.length = (part[:batch] for part in made[:4])
        return WorldState(cache, remembered, action, memory, seeds, [count - 1] * batch)

    @torch.inference_mode()
    def step(self, state: WorldState, actions: Tensor) -> Transition:
        """Advance every row of ``state`` (in place) by one frame.

        Args:
            state: as ``start`` made it.
            actions: encoded, (B, action_width).
        """
        drawn = self.draw(state, actions)
        state.remembered, state.memory = drawn.remembered, drawn.memory[:, 0]
        state.action = actions[:, None].to(self.device, torch.float32)
        state.frame = [frame + 1 for frame in state.frame]
        return Transition(*(part[:, 0] for part in drawn.outcome()))

    @torch.inference_mode()
    def draw(
        self,
        state: WorldState,
        actions: Tensor,
        count: int = 1,
        pending_counts: Sequence[int] | None = None,
    ) -> Drawn:
        """Draw the frames that follow if each row's action is kept, all of them jointly.

        The first denoising pass commits what is pending to ``state.cache``; all else in ``state``
        stays as it is. Frame number f of a row has the same noise whenever it is drawn.

        Args:
            state: with c >= 1 pending frames: ``remembered`` (B, c, C, h, w) and ``action``
                (B, c, action_width); ``memory`` is after the last one.
            actions: encoded, (B, action_width).
            count: n, frames to draw.
            pending_counts: see ``denoise``.
        """
        cache, pending = state.cache, state.remembered.shape[1]
        counts = None if pending_counts is None else list(pending_counts)
        even = counts is None or min(counts) == pending

        def call(
            length: Tensor,
            remembered: Tensor,
            into: Tensor,
            memory: Tensor,
            action: Tensor,
            keys: Tensor,
        ) -> tuple[Tensor, ...]:
            cache.length = length
            here = replace(state, remembered=remembered, action=into, memory=memory)
            drawn = self._drawn(here, action, keys, None if even else counts)
            return cache.length, *vars(drawn).values()

        inputs = (
            cache.length,
            state.remembered,
            state.action,
            state.memory,
            actions[:, None].to(self.device, torch.float32).expand(-1, count, -1),
            self._keys(state.seeds, [range(f + 1, f + 1 + count) for f in state.frame]),
        )
        if self.captures and even:
            captured = cache.captured.setdefault((self, pending, count), CapturedCall())
            cache.length, *parts = captured(call, *inputs)
        else:
            _, *parts = call(*inputs)
        return Drawn(*parts)

    def _drawn(
        self,
        state: WorldState,
        actions: Tensor,
        keys: Tensor,
        pending_counts: Sequence[int] | None,
    ) -> Drawn:
        """``draw``, given (B, n, action_width) and the keys of its noise."""
        noise, uniform = (part.unflatten(0, actions.shape[:2]) for part in self._noise(keys))
        level, temperature = self.sampling.history_level, self.sampling.temperature
        sampler = self.sampling.make((temperature * noise[:, :, 2:]).unbind(2))
        made = self._denoise(state, actions, temperature * noise[:, :, 0], sampler, pending_counts)
        memory, seen = state.memory, []
        for k in range(actions.shape[1]):
            seen.append(self.heads.step(made[:, k], actions[:, k], memory))
            memory = seen[-1].state
        hazard = torch.stack([s.hazard for s in seen], 1)
        return Drawn(
            made,
            torch.stack([s.reward for s in seen], 1),
            uniform < hazard,
            hazard,
            torch.lerp(made, noise[:, :, 1], level),
            torch.stack([s.state for s in seen], 1),
        )

    def _denoise(
        self,
        state: WorldState,
        actions: Tensor,
        noise: Tensor,
        sampler: Sampler,
        pending_counts: Sequence[int] | None,
    ) -> Tensor:
        return denoise(
            self.dynamics,
            state.cache,
            state.remembered,
            state.action,
            actions,
            noise,
            sampler,
            self.sampling.history_level,
            pending_counts,
        )

    @property
    def feature_size(self) -> int:
        """How many numbers ``features`` gives of a frame."""
        return self.heads.config.latent_size + self.heads.config.width

    @torch.inference_mode()
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
        latents, actions = latents.float(), actions.to(self.device, torch.float32)
        seen = self.heads.features_after(latents, actions, memory)
        return torch.cat((latents.flatten(1), seen), 1)

    @torch.inference_mode()
    def remember(self, latents: Tensor, actions: Tensor, memory: Tensor) -> Tensor:
        """The heads' recurrent state (B, width) after a further frame; see ``features``.

        Args:
            latents: (B, C, h, w).
            actions: encoded, (B, action_width), into the frame.
            memory: (B, width), before it.
        """
        return self.heads.step(latents.float(), actions.to(self.device), memory).state

    @torch.inference_mode()
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

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 frames (B, H, W, 3)."""
        return self.tokenizer.decode_frames(latents)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, H, W, 3) -> latents (B, C, h, w)."""
        return self.tokenizer.encode_frames(frames.to(self.device))

    @torch.inference_mode()
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

    def _keys(self, seeds: Sequence[tuple[int, int]], frames: Sequence[range]) -> Tensor:
        """Keys of all noise of each seed's frames, int64 (number of seeds * frames of each,)."""
        keys = [mix(*seed, k) for seed, numbers in zip(seeds, frames, strict=True) for k in numbers]
        return self._moved(torch.tensor(keys))

    def _moved(self, x: Tensor) -> Tensor:
        """``x`` on the device, which need not have finished what it is doing."""
        if x.device.type == "cpu" and self.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def _noise(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What is random about frames: a function of each one's key alone.

        Not of the row or of how many rows there are; but a GPU has other numbers than a CPU.

        Args:
            keys: (N,), see ``_keys``.

        Returns:
            Normal numbers (N, 2 + ``renoisings``, C, h, w): the noise that the frame is drawn from,
            its history noise, and renoisings. Uniform numbers (N,) for the frames' ends.
        """
        shape, more = self.dynamics.config.latent_shape, self.sampling.renoisings
        size = math.prod(shape)
        if self.device.type == "cuda":
            normal, uniform = hashed(keys, (2 + more) * size)
        else:
            normal, uniform = generated(keys, 2 * size, more * size, self._generator)
        return normal.unflatten(1, (2 + more, *shape)), uniform
