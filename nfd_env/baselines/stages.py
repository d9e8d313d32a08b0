"""Training of the token-autoregressive baseline: its discrete tokenizer, then its transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env.baselines.discrete import DiscreteTokenizer, DiscreteTokenizerConfig, Discretised
from nfd_env.baselines.transformer import (
    Schedule,
    TokenDynamics,
    TokenDynamicsConfig,
    token_loss,
)
from nfd_env.config import check_ranges, config_class
from nfd_env.inference.rollout import new_cache
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import fingerprint_of, load_weights, save_weights
from nfd_env.training.latent_stage import CONTEXT, WindowStage, WindowTrainingConfig
from nfd_env.training.loop import TrainConfig
from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig

_WINDOWS = 32  # held-out windows whose loss a validation tells


@config_class
class DiscreteTrainingConfig:
    """What to train the discrete tokenizer on, and how.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer that it goes into.
        train: the loop's settings.
        halvings: see ``DiscreteTokenizerConfig``.
        levels: see there.
        channels: see there.
        blocks: see there.
        hard_weight: see ``TokenizerTrainingConfig``.
        hard_fraction: see there.
    """

    recordings: str
    tokenizer: str
    train: TrainConfig
    halvings: int = 1
    levels: list[int] = field(default_factory=lambda: [7, 5, 5, 5, 5])
    channels: int = 96
    blocks: int = 2
    hard_weight: float = 0.5
    hard_fraction: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, halvings="[0, inf)", channels="[1, inf)", blocks="[0, inf)")
        check_ranges(self, hard_weight="[0, inf)", hard_fraction="(0, 1]")


class DiscreteTokenizerStage(TokenizerStage):
    """``TokenizerStage`` of pictures that go through tokens on their way; with the same loss."""

    def __init__(self, settings: DiscreteTrainingConfig) -> None:
        """Open the recordings, load the world's tokenizer and build the network.

        Raises:
            CheckpointError: when there is no such tokenizer; see also ``TokenizerStage``.
        """
        path = Path(settings.tokenizer).expanduser()
        tokenizer = load_weights(path, Tokenizer, TokenizerConfig)
        super().__init__(
            TokenizerTrainingConfig(
                settings.recordings,
                settings.train,
                tokenizer.config,
                settings.hard_weight,
                settings.hard_fraction,
            )
        )
        height, width, _ = self._recordings.spec.frame_shape
        factor = tokenizer.config.downsampling
        self.config = DiscreteTokenizerConfig(
            tokenizer.config.latent_channels,
            height // factor,
            width // factor,
            settings.halvings,
            settings.levels,
            settings.channels,
            settings.blocks,
            fingerprint_of(path),
        )
        torch.manual_seed(settings.train.seed)
        self.network: nn.Module = Discretised(tokenizer, DiscreteTokenizer(self.config))

    def _set_statistics(self, network: nn.Module, count: int) -> None:
        """The latents' are those of the world's tokenizer."""

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """See ``TokenizerStage.validate``; ``used``: share of all tokens found in the frames."""
        assert isinstance(network, Discretised)
        frames = self._held_out.to(self._device)
        with torch.no_grad():
            tokens = network.discrete.encode(network.tokenizer.encode_frames(frames))
        used = len(tokens.unique()) / self.config.vocabulary
        return {**super().validate(network), "used": used}

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights of the discrete part with their config."""
        assert isinstance(network, Discretised)
        save_weights(path, network.discrete, self.config)


@config_class(kw_only=True)
class TokenDynamicsTrainingConfig(WindowTrainingConfig):
    """What to train the transformer on, and how; see also ``WindowTrainingConfig``.

    Attributes:
        discrete: the finished discrete tokenizer's weights.
        width: see ``TokenDynamicsConfig``.
        layers: see there.
        heads: see there.
        window: see there.
        top_p: see there.
        diagonal_share: share of the windows that are learned in the parallel order.
    """

    discrete: str
    width: int = 256
    layers: int = 4
    heads: int = 4
    window: int = 12
    top_p: float = 0.8
    diagonal_share: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, diagonal_share="[0, 1]")


class TokenDynamicsStage(WindowStage):
    """See ``nfd_env.training.loop.Stage``."""

    settings: TokenDynamicsTrainingConfig

    def __init__(self, settings: TokenDynamicsTrainingConfig) -> None:
        """Load the data and build the network.

        Raises:
            CheckpointError: when there is no such tokenizer; see also ``LatentStage``.
        """
        super().__init__(settings)
        path = Path(settings.discrete).expanduser()
        discrete = load_weights(path, DiscreteTokenizer, DiscreteTokenizerConfig)
        self._discrete = discrete.to(self._device).requires_grad_(False)
        c = discrete.config
        self.config = TokenDynamicsConfig(
            c.latent_channels,
            c.latent_height,
            c.latent_width,
            *c.grid,
            c.vocabulary,
            self._train.episodes[0].actions.shape[1],
            settings.width,
            settings.layers,
            settings.heads,
            settings.window,
            settings.top_p,
            fingerprint_of(path),
        )
        torch.manual_seed(settings.train.seed)
        self.network = TokenDynamics(self.config)
        rng = np.random.default_rng(0)
        self._held_out = self._validation.windows(rng, _WINDOWS, settings.frames)
        self._hold_out(rng, settings.rollouts)

    @property
    def lower_is_better(self) -> list[str]:
        """The losses and the errors of rollouts."""
        return ["nats", "nats_parallel", *self._rollout_losses]

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy of the next tokens, of some windows in either order."""
        assert isinstance(network, TokenDynamics)
        tokens, actions = self._tokens(batch[0]), batch[1].to(self._device)
        # Of a batch of one, which is tried for its speed, the order that takes as long as both.
        count = round(self.settings.diagonal_share * len(tokens))
        parts = {}
        for name, schedule, rows in (
            ("parallel", network.diagonal, slice(0, count)),
            ("one_by_one", network.one_by_one, slice(count, None)),
        ):
            if len(tokens[rows]):
                logits = network(tokens[rows], actions[rows], schedule)
                parts[name] = token_loss(logits, tokens[rows, 1:]), len(tokens[rows])
        loss = torch.stack([value * size for value, size in parts.values()]).sum() / len(tokens)
        return loss, {name: value.detach() for name, (value, _) in parts.items()}

    @torch.no_grad()
    def _tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, T, C, h, w) -> tokens int64 (B, T, n)."""
        frames = latents.to(self._device).flatten(0, 1)
        with torch.autocast(self._device.type, enabled=False):
            return self._discrete.encode(frames).unflatten(0, latents.shape[:2])

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """``nats``: the loss of a token, ``nats_parallel``: in the parallel order; see ``_judge``.

        Rollouts are drawn one token after the other.
        """
        assert isinstance(network, TokenDynamics)
        losses = {}
        for name, schedule in (("nats", network.one_by_one), ("nats_parallel", network.diagonal)):
            each = []
            for latents, actions in zip(*(x.split(4) for x in self._held_out), strict=True):
                tokens = self._tokens(latents)
                logits = network(tokens, actions.to(self._device), schedule)
                each.append(float(token_loss(logits, tokens[:, 1:])))
            losses[name] = float(np.mean(each))
        return {**losses, **self._judge(*self._roll_out(network, network.one_by_one))}

    @torch.inference_mode()
    def _roll_out(
        self, network: TokenDynamics, schedule: Schedule, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rollouts from the first ``count`` held-out windows, or all, as ``_generate`` makes."""
        assert self._rollouts is not None
        latents, actions = (x[:count].to(self._device) for x in self._rollouts)
        cache = new_cache(network, len(latents))  # type: ignore[arg-type]
        seen = min(CONTEXT, self.config.window)
        begun = slice(CONTEXT - seen, CONTEXT)
        tokens = self._tokens(latents[:, begun])
        network.fill(cache, tokens, actions[:, begun], schedule)
        generator = torch.Generator(self._device).manual_seed(0)
        last, made = tokens[:, -1], []
        for step in range(CONTEXT, actions.shape[1]):
            uniform = torch.rand(last.shape, generator=generator, device=self._device)
            last = network.draw(cache, last, actions[:, step], uniform, schedule)
            made.append(self._discrete.decode(last))
        return torch.stack(made, 1), latents

    def strip(self, network: nn.Module) -> np.ndarray:
        """Three held-out episodes, real above generated one by one, above generated in parallel."""
        assert isinstance(network, TokenDynamics)
        made, real = self._roll_out(network, network.one_by_one, 3)
        parallel, _ = self._roll_out(network, network.diagonal, 3)
        return self._picture(real[:, CONTEXT:], made, parallel)

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.config)
