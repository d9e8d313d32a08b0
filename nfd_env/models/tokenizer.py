"""Convolutional image tokenizer: one frame <-> a small grid of continuous latents."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env import parts
from nfd_env.config import check_ranges, config_class


@config_class
class TokenizerConfig:
    """Sizes of the tokenizer.

    Attributes:
        encoder_channels: width at each resolution, finest (half the frame's) first; n entries
            downsample by 2^n.
        decoder_channels: likewise, finest first.
        latent_channels: channels of the latent grid.
        encoder_blocks: residual blocks at each resolution of the encoder.
        decoder_blocks: residual blocks at each resolution of the decoder.
        latent_noise: largest standard deviation of the noise put on (unit-variance) latents in
            training; it makes the decoder forgive small errors of generated latents.
    """

    encoder_channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
    decoder_channels: list[int] = field(default_factory=lambda: [48, 96, 160, 256])
    latent_channels: int = 16
    encoder_blocks: int = 1
    decoder_blocks: int = 1
    latent_noise: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges, and that encoder and decoder meet at the same resolution."""
        some = "[1, inf)"
        check_ranges(self, latent_channels=some, encoder_blocks=some, decoder_blocks=some)
        check_ranges(self, latent_noise="[0, inf)")
        if min([*self.encoder_channels, *self.decoder_channels], default=1) < 1:
            raise ValueError("encoder_channels and decoder_channels must be at least 1")
        if len(self.encoder_channels) != len(self.decoder_channels) or not self.encoder_channels:
            raise ValueError("encoder_channels and decoder_channels need the same number of levels")

    @property
    def downsampling(self) -> int:
        """Frame pixels per latent, along each side."""
        return 2 ** len(self.encoder_channels)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); starts as the identity, so it needs no normalisation."""

    def __init__(self, channels: int) -> None:
        """Build for ``channels``."""
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return x + self.second(functional.silu(self.first(functional.silu(x))))


class BatchNorm(nn.BatchNorm2d):
    """Of all processes that work on a batch, on any device (torch's own SyncBatchNorm: CUDA)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape; in training of mean 0 and variance 1 over the batch."""
        if not self.training or parts.processes() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        x = input.float()
        mean = parts.mean(x.mean((0, 2, 3), keepdim=True))
        variance = parts.mean((x - mean).square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            count = parts.processes() * x.numel() / x.shape[1]
            unbiased = variance.flatten() * count / (count - 1)
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        return ((x - mean) * (variance + self.eps).rsqrt()).to(input.dtype)


class Tokenizer(nn.Module):
    """Encodes frames to latents of zero mean and unit variance per channel, and decodes them."""

    def __init__(self, config: TokenizerConfig) -> None:
        """Build from ``config``."""
        super().__init__()
        self.config = config
        encoder: list[nn.Module] = []
        before = 3
        for level, channels in enumerate(config.encoder_channels):
            kernel = 3 if level == 0 else 1
            encoder += [
                nn.PixelUnshuffle(2),
                nn.Conv2d(4 * before, channels, kernel, padding=kernel // 2),
                *(ResidualBlock(channels) for _ in range(config.encoder_blocks)),
            ]
            before = channels
        encoder.append(nn.Conv2d(before, config.latent_channels, 1))
        self.encoder = nn.Sequential(*encoder)
        # Running statistics of the data, the "stored per-channel statistics" of the latents.
        self.normalise = BatchNorm(config.latent_channels, affine=False, momentum=0.01)
        levels = config.decoder_channels[::-1]
        decoder: list[nn.Module] = [nn.Conv2d(config.latent_channels, levels[0], 3, padding=1)]
        for channels, after in zip(levels, [*levels[1:], 0], strict=True):
            decoder += [ResidualBlock(channels) for _ in range(config.decoder_blocks)]
            last = after == 0
            kernel = 3 if last else 1
            decoder += [
                nn.Conv2d(channels, 4 * (3 if last else after), kernel, padding=kernel // 2),
                nn.PixelShuffle(2),
            ]
        self.decoder = nn.Sequential(*decoder)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def begin_with(self, other: Tokenizer) -> None:
        """Take over what ``other`` has learned of another game's pictures.

        With more channels (of levels or latents) than ``other`` it computes what that does: new
        channels are left as they are, and what they do to the known ones is zero. With fewer it
        begins with the first of them.

        Raises:
            ValueError: when ``other`` has another number of levels or blocks.
        """
        mine, its = self.state_dict(), other.state_dict()
        if mine.keys() != its.keys():
            raise ValueError("has another number of levels or blocks")
        for name, tensor in mine.items():
            learned = its[name]
            # (out, in, ...). PixelUnshuffle and PixelShuffle keep what comes of a channel together,
            # so that the first channels are the same ones on both sides of them.
            both = tuple(map(slice, map(min, tensor.shape, learned.shape)))
            if tensor.ndim > 1:
                tensor[both[0], learned.shape[1] :] = 0
            tensor[both] = learned[both]

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.parameters()).dtype

    def encode(self, frames: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""
        return self.normalise(self.encoder(frames.to(self.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> frames (B, 3, h*f, w*f), about [-1, 1] but not clipped."""
        latents = latents.to(self.dtype)
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    def forward(self, frames: Tensor) -> Tensor:
        """Reconstruct float frames (B, 3, H, W); in training through noisy latents."""
        latents = self.encode(frames)
        if self.training and self.config.latent_noise > 0:
            shape = len(latents), 1, 1, 1
            strength = parts.rand(shape, "cpu", torch.float32)
            strength = strength * self.config.latent_noise
            latents = latents + strength.to(latents) * parts.randn_like(latents)
        return self.decode(latents)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 latents (B, C, h, w)."""
        return self.encode(frames_to_float(frames)).float()

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 (B, H, W, 3)."""
        return float_to_frames(self.decode(latents))


def frames_to_float(frames: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], in channels-last memory."""
    return frames.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def float_to_frames(images: Tensor) -> Tensor:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded and clipped."""
    scaled = images.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
