"""How a policy network's outputs become actions of any space that a world can have.

A *raw* action is what is drawn, kept in a batch and given back to ``log_prob``; ``playable`` makes
of it an action of the space.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

_LOG_STD = -0.5  # at first: most draws then lie between the bounds -1 and 1, few beyond


def action_head(space: spaces.Space) -> Choices | Gaussian:
    """The head for ``space``: Discrete, MultiDiscrete, MultiBinary or a one-dimensional Box."""
    return Gaussian(space) if isinstance(space, spaces.Box) else Choices(space)


class Choices(nn.Module):
    """One or several choices among a few: Discrete, MultiDiscrete, MultiBinary."""

    start: Tensor

    def __init__(self, space: spaces.Space) -> None:
        """Choose in ``space``."""
        super().__init__()
        self.single = isinstance(space, spaces.Discrete)
        if isinstance(space, spaces.Discrete):
            self.sizes, start = [int(space.n)], [int(space.start)]
        elif isinstance(space, spaces.MultiDiscrete):
            self.sizes, start = space.nvec.tolist(), np.asarray(space.start).tolist()
        else:
            assert isinstance(space, spaces.MultiBinary)
            self.sizes, start = [2] * int(space.shape[0]), [0] * int(space.shape[0])
        self.outputs = sum(self.sizes)
        self.register_buffer("start", torch.tensor(start), persistent=False)

    def draw(self, outputs: Tensor, greedy: bool, generator: torch.Generator | None) -> Tensor:
        """Logits (B, all sizes) -> raw actions, int64 (B,) or (B, choices)."""
        scores = outputs
        if not greedy:
            # The largest of logits plus Gumbel noise is a sample of their softmax.
            uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device)
            scores = outputs - (-uniform.clamp_min(1e-10).log()).log()
        index = torch.stack([part.argmax(-1) for part in scores.split(self.sizes, -1)], -1)
        return index[:, 0] if self.single else index

    def log_prob(self, outputs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of raw actions, and entropy; each (B,)."""
        index = raw[:, None] if self.single else raw
        log_prob, entropy = torch.zeros_like(outputs[:, 0]), torch.zeros_like(outputs[:, 0])
        for part, chosen in zip(outputs.split(self.sizes, -1), index.unbind(-1), strict=True):
            log_softmax = functional.log_softmax(part, -1)
            log_prob = log_prob + log_softmax.gather(-1, chosen[:, None])[:, 0]
            entropy = entropy - (log_softmax.exp() * log_softmax).sum(-1)
        return log_prob, entropy

    def playable(self, raw: Tensor) -> Tensor:
        """Raw actions -> actions of the space, int64 (B, *shape)."""
        return raw + (self.start[0] if self.single else self.start)


class Gaussian(nn.Module):
    """A normal distribution of every number of a Box, with a learned deviation that sees nothing.

    Numbers with two finite bounds are drawn where these are -1 and 1, others as they are; what lies
    beyond a bound is played as the bound, and learned from as it was drawn.
    """

    def __init__(self, space: spaces.Box) -> None:
        """Draw in ``space``."""
        super().__init__()
        self.integers = bool(np.issubdtype(space.dtype, np.integer))
        # As exact as the space, so that a bound is played as exactly that bound.
        dtype = np.float32 if space.dtype == np.float32 else np.float64
        low, high = space.low.astype(dtype), space.high.astype(dtype)
        # Spaces without bounds are also written with the largest number there is, and the world's
        # networks see such numbers as they are too (see ActionCodec.encode).
        largest = np.maximum(np.abs(low), np.abs(high))
        bounded = (largest < np.finfo(np.float32).max) & (high > low)
        with np.errstate(invalid="ignore"):  # inf - inf, which is not used
            # Halved before they are added: the bounds may be the largest numbers that there are.
            middle = np.where(bounded, low / 2 + high / 2, np.clip(np.zeros_like(low), low, high))
            scale = np.where(bounded, high / 2 - low / 2, np.ones_like(low))
        # No buffers: those lose their precision where a network is turned into float32.
        self._numbers = [torch.from_numpy(value) for value in (low, high, middle, scale)]
        self.outputs = len(low)
        self.log_std = nn.Parameter(torch.full((self.outputs,), _LOG_STD))

    def draw(self, outputs: Tensor, greedy: bool, generator: torch.Generator | None) -> Tensor:
        """Means (B, n) -> raw actions, float32 (B, n)."""
        if greedy:
            return outputs.detach()
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        return (outputs + self.log_std.exp() * noise).detach()  # what was drawn is a constant

    def log_prob(self, outputs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of raw actions, and entropy; each (B,)."""
        units = (raw - outputs) * (-self.log_std).exp()
        constant = 0.5 * math.log(2 * math.pi)
        log_prob = (-0.5 * units.square() - self.log_std - constant).sum(-1)
        entropy = (self.log_std + 0.5 + constant).sum(-1).expand(len(outputs))
        return log_prob, entropy

    def playable(self, raw: Tensor) -> Tensor:
        """Raw actions -> actions of the space, (B, n), whole numbers where it has such only."""
        low, high, middle, scale = (value.to(raw.device) for value in self._numbers)
        action = torch.minimum(torch.maximum(middle + scale * raw, low), high)
        return action.round().long() if self.integers else action
