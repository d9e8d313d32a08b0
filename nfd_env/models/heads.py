"""Reward and termination, read off the generated latents.

The heads see the frames that were actually drawn, not features of a noise-conditioned pass, which
would describe the average future. A recurrent state carries what no single frame shows, such as how
often the player has been hit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class HeadsConfig:
    """Sizes of the heads.

    Attributes:
        latent_size: numbers in one frame's latents, C * h * w.
        action_width: length of an encoded action.
        width: width of the recurrent state.
        reward_values: the rewards that can be told apart, ascending; a reward between two of them
            is represented by their mixture.
        dropout: on the frame features, in training.
        signals: numbers that training asks for beside them, see ``CollectConfig.signals``.
    """

    latent_size: int = 768
    action_width: int = 3
    width: int = 256
    reward_values: list[float] = field(default_factory=lambda: [0.0])
    dropout: float = 0.1
    signals: int = 0

    def __post_init__(self) -> None:
        """Check the reward values."""
        values = self.reward_values
        if not values or any(b <= a for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"reward_values must be strictly ascending, got {values}")


@dataclass(frozen=True)
class HeadsOutput:
    """Predictions for one transition of each row, and the state to go on from.

    Attributes:
        reward: (B,), the expected reward.
        hazard: (B,) in [0, 1], the probability that this transition ended the episode.
        state: (B, width).
    """

    reward: Tensor
    hazard: Tensor
    state: Tensor


class Heads(nn.Module):
    """A GRU over (latents, action leading into them), with a reward and a termination output."""

    def __init__(self, config: HeadsConfig) -> None:
        """Build from ``config``."""
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.latent_size + config.action_width, config.width)
        self.gru = nn.GRU(config.width, config.width, batch_first=True)
        self.hidden = nn.Linear(2 * config.width, config.width)
        self.output = nn.Linear(config.width, 1 + len(config.reward_values))
        if config.signals:
            self.signals = nn.Linear(config.width, config.signals)
        values = torch.tensor(config.reward_values, dtype=torch.float32)
        self.register_buffer("values", values, persistent=False)

    def initial_state(self, batch: int) -> Tensor:
        """The state of ``batch`` rows that have seen nothing, (B, width)."""
        return self.embed.weight.new_zeros(batch, self.config.width)

    def features(self, latents: Tensor, actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs are read off, (B, T, width), and the last state; see ``forward``."""
        x = self._embedded(latents.flatten(2), actions)
        x = functional.dropout(x, self.config.dropout, self.training)
        memory, last = self.gru(x, state[None].contiguous())
        return self._read(x, memory), last[0]

    def features_after(self, latents: Tensor, actions: Tensor, state: Tensor) -> Tensor:
        """What the outputs are read off after one transition, (B, width).

        Args:
            latents: (B, C, h, w).
            actions: (B, action_width), into them.
            state: (B, width), after them; with that from before any frame, the features of a frame
                that is the first.
        """
        return self._read(self._embedded(latents.flatten(1), actions), state)

    def _embedded(self, latents: Tensor, actions: Tensor) -> Tensor:
        return functional.silu(self.embed(torch.cat((latents, actions), -1)))

    def _read(self, x: Tensor, memory: Tensor) -> Tensor:
        return functional.silu(self.hidden(torch.cat((x, memory), -1)))

    def forward(self, latents: Tensor, actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits along sequences.

        Args:
            latents: (B, T, C, h, w).
            actions: (B, T, action_width), leading into each frame.
            state: (B, width), before the first frame.

        Returns:
            (B, T, 1 + number of reward values): the termination logit, then the reward logits;
            and the state after the last frame.
        """
        hidden, last = self.features(latents, actions, state)
        return self.output(hidden), last

    def step(self, latents: Tensor, actions: Tensor, state: Tensor) -> HeadsOutput:
        """One transition: latents (B, C, h, w) and the actions (B, action_width) into them."""
        logits, state = self(latents[:, None], actions[:, None], state)
        return HeadsOutput(self.reward(logits[:, 0]), logits[:, 0, 0].sigmoid(), state)

    def reward(self, logits: Tensor) -> Tensor:
        """Expected reward (...) from the outputs (..., 1 + number of reward values)."""
        assert isinstance(self.values, Tensor)
        return (logits[..., 1:].float().softmax(-1) * self.values).sum(-1)

    def two_hot(self, rewards: Tensor) -> Tensor:
        """Rewards (...) -> mixtures of the two neighbouring reward values (..., R)."""
        assert isinstance(self.values, Tensor)
        values = self.values
        if len(values) == 1:
            return torch.ones(*rewards.shape, 1, device=rewards.device, dtype=torch.float32)
        clipped = rewards.clamp(values[0], values[-1])
        upper = torch.searchsorted(values, clipped).clamp(1, len(values) - 1)
        low, high = values[upper - 1], values[upper]
        share = (clipped - low) / (high - low)
        shape = *rewards.shape, len(values)
        target = torch.zeros(shape, device=rewards.device, dtype=torch.float32)
        target.scatter_(-1, (upper - 1)[..., None], (1 - share)[..., None])
        return target.scatter_(-1, upper[..., None], share[..., None])
