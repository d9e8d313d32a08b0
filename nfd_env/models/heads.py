"""Reward and termination, read off the generated latents.

The heads see the frames that were actually drawn, not features of a noise-conditioned pass, which
would describe the average future. A recurrent state carries what no single frame shows, such as how
often the player has been hit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.config import check_ranges, config_class


@config_class
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
        latent_shape: [C, h, w], where ``nearby`` is not 0.
        nearby: channels of the convolutions that look at each frame, see ``Nearby``; 0 for a linear
            layer of its latents, which learns every place in the picture by itself.
    """

    latent_size: int = 768
    action_width: int = 3
    width: int = 256
    reward_values: list[float] = field(default_factory=lambda: [0.0])
    dropout: float = 0.1
    signals: int = 0
    latent_shape: list[int] = field(default_factory=list)
    nearby: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and that the latents' shape is known where it is needed."""
        some = "[1, inf)"
        check_ranges(self, latent_size=some, action_width=some, width=some)
        check_ranges(self, dropout="[0, 1)", signals="[0, inf)")
        if self.nearby < 0 or self.nearby % 4:
            raise ValueError(f"nearby must be a multiple of 4 and not negative, got {self.nearby}")
        if self.nearby and (
            len(self.latent_shape) != 3
            or min(self.latent_shape) < 1
            or math.prod(self.latent_shape) != self.latent_size
        ):
            raise ValueError(
                f"latent_shape must be of {self.latent_size} numbers, got {self.latent_shape}"
            )
        values = self.reward_values
        if not values or any(b <= a for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"reward_values must be strictly ascending, got {values}")


@dataclass(frozen=True)
class HeadsOutput:
    """Predictions for one transition of each row, and the state to go on from.

    Attributes:
        reward: (B,), the expected reward.
        hazard: (B,) in [0, 1], the probability that this transition ended the episode.
        state: (B, ``Heads.memory_size``).
    """

    reward: Tensor
    hazard: Tensor
    state: Tensor


class Nearby(nn.Module):
    """What stands beside what, in a frame and the one before it.

    What ends an episode or is worth something, such as touching, looks alike wherever it happens.
    The strongest response of each channel is told, whatever its place, and roughly where it was.
    """

    def __init__(self, shape: Sequence[int], channels: int) -> None:
        """Of frames (C, h, w) = ``shape``."""
        super().__init__()
        latents, height, width = shape
        self.first = nn.Conv2d(2 * latents, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.third = nn.Conv2d(channels, channels, 3, padding=1)
        sides = -(-height // 2), -(-width // 2)
        self._placed = channels // 4
        self._cells = max(1, sides[0] // 4), max(1, sides[1] // 4)
        fields = math.prod(side // cell for side, cell in zip(sides, self._cells, strict=True))
        self.outputs = channels + self._placed * fields

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """(n, C, h, w), twice -> (n, ``outputs``)."""
        h = functional.silu(self.first(torch.cat((frames, before), 1)))
        h = functional.silu(self.second(h))
        h = functional.silu(self.third(h))
        placed = functional.max_pool2d(h[:, : self._placed], self._cells)
        return torch.cat((h.amax((2, 3)), placed.flatten(1)), 1)


class Heads(nn.Module):
    """A GRU over (latents, action leading into them), with a reward and a termination output.

    Its state holds, behind the GRU's, the last two frames where the config has ``nearby``.
    """

    def __init__(self, config: HeadsConfig) -> None:
        """Build from ``config``."""
        super().__init__()
        self.config = config
        seen = config.latent_size
        self.nearby = None
        if config.nearby:
            self.nearby = Nearby(config.latent_shape, config.nearby)
            seen = self.nearby.outputs
        self.embed = nn.Linear(seen + config.action_width, config.width)
        self.gru = nn.GRU(config.width, config.width, batch_first=True)
        self.hidden = nn.Linear(2 * config.width, config.width)
        self.output = nn.Linear(config.width, 1 + len(config.reward_values))
        if config.signals:
            self.signals = nn.Linear(config.width, config.signals)
        values = torch.tensor(config.reward_values, dtype=torch.float32)
        self.register_buffer("values", values, persistent=False)

    @property
    def memory_size(self) -> int:
        """Numbers in the state of a row."""
        frames = 2 * self.config.latent_size if self.config.nearby else 0
        return self.config.width + frames

    def initial_state(self, batch: int) -> Tensor:
        """The state of ``batch`` rows that have seen nothing, (B, ``memory_size``)."""
        return self.embed.weight.new_zeros(batch, self.memory_size)

    def features(self, latents: Tensor, actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs are read off, (B, T, width), and the last state; see ``forward``."""
        state, last, _ = self._split(state)
        seen = latents.flatten(2)
        before = torch.cat((last[:, None], seen[:, :-1]), 1) if self.nearby else seen
        x = self._embedded(seen, before, actions)
        x = functional.dropout(x, self.config.dropout, self.training)
        memory, after = self.gru(x, state[None].contiguous())
        after = after[0]
        if self.nearby:
            after = torch.cat((after, seen[:, -1], before[:, -1]), 1)
        return self._read(x, memory), after

    def features_after(self, latents: Tensor, actions: Tensor, state: Tensor) -> Tensor:
        """What the outputs are read off after one transition, (B, width).

        Args:
            latents: (B, C, h, w).
            actions: (B, action_width), into them.
            state: (B, ``memory_size``), after them; with that from before any frame, the features
                of a frame that is the first.
        """
        memory, _, before = self._split(state)
        return self._read(self._embedded(latents.flatten(1), before, actions), memory)

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The GRU's part, the last frame, the one before it; both empty without ``nearby``."""
        width = self.config.width
        frames = (state.shape[-1] - width) // 2
        parts = state.split([width, frames, frames], -1)
        return parts[0], parts[1], parts[2]

    def _embedded(self, latents: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """Of flat latents (..., latent_size)."""
        if self.nearby is not None:
            shape = self.config.latent_shape
            frames = (x.reshape(-1, *shape) for x in (latents, before))
            latents = self.nearby(*frames).unflatten(0, latents.shape[:-1])
        return functional.silu(self.embed(torch.cat((latents, actions), -1)))

    def _read(self, x: Tensor, memory: Tensor) -> Tensor:
        return functional.silu(self.hidden(torch.cat((x, memory), -1)))

    def forward(self, latents: Tensor, actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits along sequences.

        Args:
            latents: (B, T, C, h, w).
            actions: (B, T, action_width), leading into each frame.
            state: (B, ``memory_size``), before the first frame.

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
