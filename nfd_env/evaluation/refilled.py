"""The cache as the paper's lineage keeps it: refilled from the whole window for every new frame.

A baseline for ``nfd bench --compare``, not for playing. Each frame costs one pass over the finished
frames that it sees, at the history level, which fills the keys and values, and then one pass a
denoising step over the new frame alone. Everything else is ``WorldModel``'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nfd_env.inference.rollout import Sampler, new_cache
from nfd_env.inference.world_model import Context, Transition, WorldModel, WorldState

Following = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocities of frames behind a filled cache, of (latents, levels, actions)."""


class RefilledModel(WorldModel):
    """Steps like ``model``, without keys and values that outlive a frame.

    In its states ``remembered`` and ``action`` hold all frames back to the farthest that the next
    one can see, (B, reach - 1, ...), younger histories at the end; the cache is scratch.
    """

    def __init__(self, model: WorldModel) -> None:
        """Share the networks and the sampling of ``model``."""
        super().__init__(model.tokenizer, model.dynamics, model.heads, model.sampling)
        self.captures = False  # which frames are seen is decided in Python

    @torch.inference_mode()
    def start(
        self, contexts: Sequence[Context], seeds: Sequence[tuple[int, int]], frames: int = 1
    ) -> WorldState:
        """See ``WorldModel.start``."""
        state = super().start(contexts, seeds, frames)
        kept, level = self.dynamics.config.sight.reach - 1, self.sampling.history_level
        past = state.remembered.new_zeros((state.batch, kept, *self.dynamics.config.latent_shape))
        into = state.action.new_zeros((state.batch, kept, state.action.shape[-1]))
        for row, (context, seed) in enumerate(zip(contexts, seeds, strict=True)):
            # As ``WorldModel`` does, frames are numbered from the first that can be seen.
            latents = context.latents[-(kept + 1) :].to(past)
            noise, _ = self._noise(self._keys([seed], [range(len(latents))]))
            history = torch.lerp(latents, noise[:, 1], level)[-kept:]
            past[row, -len(history) :] = history
            into[row, -len(history) :] = context.actions[-len(history) :].to(into)
        state.remembered, state.action = past, into
        state.cache.reset(torch.ones(state.batch, dtype=torch.bool, device=self.device))
        return state

    @torch.inference_mode()
    def step(self, state: WorldState, actions: Tensor) -> Transition:
        """See ``WorldModel.step``."""
        past, into = state.remembered, state.action
        transition = super().step(state, actions)
        state.remembered = torch.cat((past[:, 1:], state.remembered), 1)
        state.action = torch.cat((into[:, 1:], state.action), 1)
        return transition

    def _denoise(
        self,
        state: WorldState,
        actions: Tensor,
        noise: Tensor,
        sampler: Sampler,
        pending_counts: Sequence[int] | None,
    ) -> Tensor:
        assert pending_counts is None, "the baseline neither drafts nor commits"
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, frame in enumerate(state.frame):
            groups[self._seen(frame + 1)].append(row)
        # Rows that see frames of other numbers have passes of their own.
        made = torch.empty_like(noise)
        for back, listed in groups.items():
            rows = slice(None) if len(groups) == 1 else torch.tensor(listed, device=noise.device)
            places = [-b for b in back]
            past, into = state.remembered[rows][:, places], state.action[rows][:, places]
            numbers = torch.tensor([back[0] - b for b in back], device=noise.device)
            levels = past.new_full(past.shape[:2], self.sampling.history_level)
            following = self._filled(past, levels, into, numbers)
            chosen = actions[rows]

            def velocity(
                x: Tensor, level: float, following: Following = following, chosen: Tensor = chosen
            ) -> Tensor:
                return following(x, x.new_full(x.shape[:2], level), chosen)

            made[rows] = sampler(velocity, noise[rows])
        return made

    def _seen(self, frame: int) -> tuple[int, ...]:
        """How far back the frames lie that frame number ``frame`` sees, the farthest first."""
        numbers = torch.arange(frame)
        seen = numbers[self.dynamics.config.sight.sees(torch.tensor(frame), numbers)]
        return tuple((frame - seen).tolist())

    def _filled(self, past: Tensor, levels: Tensor, into: Tensor, numbers: Tensor) -> Following:
        """Fill a cache with the ``past`` (B, F, C, h, w), which has the frame ``numbers`` (F,)."""
        cache = new_cache(self.dynamics, len(past))
        self.dynamics.stream(cache, past, levels, into, past.shape[1], numbers)
        return lambda x, at, actions: self.dynamics.stream(cache, x, at, actions, commit=0)
