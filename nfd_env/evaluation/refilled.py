"""The cache as the paper's lineage keeps it: refilled from the whole window for every new frame.

A baseline for ``nfd bench --compare``, not for playing. Each frame costs one pass over the finished
frames that it sees, at the history level, which fills the keys and values, and then one pass a
denoising step over the new frame alone. Everything else is ``WorldModel``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nfd_env.flow.solvers import Velocity
from nfd_env.inference.rollout import Ahead, new_cache
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context, Drawn, Transition, WorldState
from nfd_env.inference.world_model import WorldModel

Following = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocities of frames behind a filled cache, of (latents, levels, actions)."""


class RefilledModel(WorldModel):
    """Steps like ``model``, without keys and values that outlive a frame.

    In its states ``drawn.remembered`` and ``action`` hold all frames that the next one can see, (B,
    window - 1, ...), younger histories at the end; of the cache only the lengths are used.
    """

    def __init__(self, model: WorldModel) -> None:
        """Share the networks and the sampling of ``model``."""
        super().__init__(
            model.tokenizer, model.dynamics, model.heads, model.sampling, model.world_id
        )
        self.captures = False  # how many frames are seen is decided in Python
        self._kept = self.dynamics.config.window - 1

    @torch.inference_mode()
    def start(
        self,
        contexts: Sequence[Context],
        seeds: Sequence[tuple[int, int]],
        frames: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> WorldState:
        """See ``WorldModel.start``."""
        assert frames == 1, "the baseline draws no drafts"
        sampling = sampling or self.sampling
        state = super().start(contexts, seeds, frames, sampling)
        shape = state.batch, self._kept
        past = state.drawn.latents.new_zeros(*shape, *self.dynamics.config.latent_shape)
        into = state.action.new_zeros(*shape, state.action.shape[-1])
        for row, context in enumerate(contexts):
            # As ``WorldModel`` does, frames are numbered from the first that can be seen.
            latents = context.latents[-(self._kept + 1) :].to(past)
            first = torch.zeros_like(state.keys[:1])[:, None]
            noise, _ = self._noise(state.keys[row : row + 1], first, len(latents), sampling)
            history = torch.lerp(latents, noise[0, :, 1], sampling.history_level)[-self._kept :]
            past[row, -len(history) :] = history
            into[row, -len(history) :] = context.actions[-len(history) :].to(into)
        state.drawn.remembered, state.action = past, into
        return state

    @torch.inference_mode()
    def step(
        self, state: WorldState, actions: Tensor, sampling: SamplingConfig | None = None
    ) -> Transition:
        """See ``WorldModel.step``."""
        past, into = state.drawn.remembered, state.action
        transition = super().step(state, actions, sampling)
        state.drawn.remembered = torch.cat((past[:, 1:], state.drawn.remembered), 1)
        state.action = torch.cat((into[:, 1:], state.action), 1)
        return transition

    def draw(
        self,
        state: WorldState,
        actions: Tensor,
        count: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> Drawn:
        """See ``WorldModel.draw``."""
        assert count == 1, "the baseline draws no drafts"
        cache = state.cache
        made = self._drawn(
            cache,
            None,
            sampling or self.sampling,
            *cache.ends,
            cache.length + 1,
            state.drawn.remembered,
            state.action,
            state.memory,
            self._encoded(actions)[:, None],
            state.keys,
        )
        cache.length = made[0]
        return Drawn(*made[3:])

    def _velocity(self, ahead: Ahead, history_level: float) -> Velocity:
        """Rows that see other numbers of frames have passes of their own."""
        cache, pending, pending_actions, actions, _ = ahead
        cache.length = cache.length + 1
        seen = cache.length.clamp(max=self._kept).tolist()
        groups = []
        for count in sorted(set(seen)):
            rows = [row for row, mine in enumerate(seen) if mine == count]
            past, into = pending[rows, -count:], pending_actions[rows, -count:]
            levels = past.new_full(past.shape[:2], history_level)
            groups.append((rows, actions[rows], self._filled(past, levels, into)))

        def velocity(x: Tensor, level: float) -> Tensor:
            made = torch.empty_like(x)
            for rows, into, following in groups:
                made[rows] = following(x[rows], x.new_full((len(rows), x.shape[1]), level), into)
            return made

        return velocity

    def _filled(self, past: Tensor, levels: Tensor, into: Tensor) -> Following:
        """Fill a cache with the ``past`` (B, F, C, h, w)."""
        cache = new_cache(self.dynamics, len(past))
        self.dynamics.fill(cache, past, levels, into)
        return lambda x, at, actions: self.dynamics.stream(cache, x, at, actions, commit=0)
