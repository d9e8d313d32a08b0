"""A discrete tokenizer: a frame's latents <-> a small grid of whole numbers (FSQ).

It stands between the encoder and the decoder of the world's tokenizer, which stay as they are: the
rival's frames have the same heads, decoder and metrics as the world's own, and all that differs is
how the next one is drawn.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from nfd_env.config import check_ranges, config_class
from nfd_env.models.tokenizer import ResidualBlock, Tokenizer


@config_class
class DiscreteTokenizerConfig:
    """Sizes of the discrete tokenizer.

    Attributes:
        latent_channels: channels of the world's latents.
        latent_height: rows of them.
        latent_width: columns of them.
        halvings: how often the grid is halved along each side; a token stands for 4^n latents.
        levels: of each of the numbers that a token consists of (arXiv 2309.15505, table 1).
        channels: width of the convolutions.
        blocks: residual blocks on each side of the quantiser, at either resolution.
        made_with: fingerprint of the tokenizer whose latents these are.
    """

    latent_channels: int
    latent_height: int
    latent_width: int
    halvings: int = 1
    levels: list[int] = field(default_factory=lambda: [7, 5, 5, 5, 5])
    channels: int = 96
    blocks: int = 2
    made_with: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        factor = 2**self.halvings if 0 <= self.halvings < 8 else 0
        if not factor or self.latent_height % factor or self.latent_width % factor:
            raise ValueError(
                f"{self.latent_height}x{self.latent_width} latents cannot be halved "
                f"{self.halvings} times"
            )
        if not self.levels or min(self.levels) < 3 or math.prod(self.levels) > 2**16:
            raise ValueError(
                f"levels must be at least 3 each and make at most 65,536 tokens, got {self.levels}"
            )
        check_ranges(self, latent_channels="[1, inf)", channels="[1, inf)", blocks="[0, inf)")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        return self.latent_height >> self.halvings, self.latent_width >> self.halvings

    @property
    def vocabulary(self) -> int:
        """Different tokens that there are."""
        return math.prod(self.levels)


class DiscreteTokenizer(nn.Module):
    """Convolutions around a finite scalar quantiser (Mentzer et al. 2023, arXiv 2309.15505)."""

    def __init__(self, config: DiscreteTokenizerConfig) -> None:
        """Build from ``config``.

        Raises:
            ImportError: without the extra that has the quantiser.
        """
        super().__init__()
        self.config = config
        channels, blocks = config.channels, config.blocks

        def residual() -> list[nn.Module]:
            return [ResidualBlock(channels) for _ in range(blocks)]

        encoder = [nn.Conv2d(config.latent_channels, channels, 3, padding=1), *residual()]
        decoder: list[nn.Module] = [
            nn.Conv2d(len(config.levels), channels, 3, padding=1),
            *residual(),
        ]
        for _ in range(config.halvings):
            encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, channels, 1), *residual()]
            decoder += [nn.Conv2d(channels, 4 * channels, 1), nn.PixelShuffle(2), *residual()]
        encoder.append(nn.Conv2d(channels, len(config.levels), 1))
        decoder.append(nn.Conv2d(channels, config.latent_channels, 3, padding=1))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.quantiser = _finite_scalar_quantiser(config.levels)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> the same through tokens, straight through for gradients."""
        return self.decoder(self.quantiser(self.encoder(latents).float())[0]).float()

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> tokens int64 (B, rows * columns), row after row."""
        return self.quantiser(self.encoder(latents).float())[1].flatten(1).long()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, rows * columns) -> float32 latents (B, C, h, w)."""
        return self.decoder(self.quantiser.indices_to_codes(tokens.unflatten(1, self.config.grid)))


def _finite_scalar_quantiser(levels: list[int]) -> Any:
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError as error:
        raise ImportError(
            "the token-autoregressive baseline needs the extra autoregressive: "
            f"pip install 'nfd-env[autoregressive]' ({error})"
        ) from None
    return FSQ(list(levels))


class Discretised(nn.Module):
    """The world's tokenizer with the discrete one inside, which alone is trained."""

    tokenizer: Tokenizer
    discrete: DiscreteTokenizer

    def __init__(self, tokenizer: Tokenizer, discrete: DiscreteTokenizer) -> None:
        """Freeze ``tokenizer``."""
        super().__init__()
        self.tokenizer, self.discrete = tokenizer.requires_grad_(False), discrete

    def train(self, mode: bool = True) -> Discretised:
        """The frozen part never is: its statistics would change."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Reconstruct float frames (B, 3, H, W)."""
        with torch.no_grad():
            latents = self.tokenizer.encode(frames)
        return self.tokenizer.decode(self.discrete(latents))
