"""Stage 1: the tokenizer learns to reconstruct recorded frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env import parts
from nfd_env.config import check_ranges, config_class
from nfd_env.data.episodes import Episodes
from nfd_env.data.shards import RecordingError
from nfd_env.data.windows import RUN, Places
from nfd_env.devices import resolve_device
from nfd_env.metrics import gradient_correlation, moving_pixels, psnr, sharpness
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig, float_to_frames, frames_to_float
from nfd_env.models.weights import save_weights
from nfd_env.parts import WHOLE, Part
from nfd_env.training.initial import begin_tokenizer
from nfd_env.training.loop import TrainConfig
from nfd_env.training.recorded import open_recordings

_HELD_OUT = 64  # frames of a validation
_CHUNK = 16  # frames that are encoded or decoded at a time
# Frames whose latents the stored statistics are of: 1,024 frames of 16 x 16 latents are a quarter
# of a million values a channel. A validation makes do with fewer.
_STATISTICS, _STATISTICS_OF_VALIDATION = 1024, 128


@config_class
class TokenizerTrainingConfig:
    """What to train the tokenizer on, and how.

    Attributes:
        recordings: the data-set folder.
        train: the loop's settings.
        model: the tokenizer's sizes.
        hard_weight: weight of the mean error over the hardest pixels.
        hard_fraction: which share of the pixels counts as hardest. Small moving things are a tiny
            part of a frame; without this term they come out as smears.
        edge_weight: weight of the error of horizontal and vertical differences (sharpness).
        initial: weights to begin with, a file or a world, of as many levels and blocks as
            ``model``; see ``Tokenizer.begin_with``. "" for random ones.
    """

    recordings: str
    train: TrainConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    hard_weight: float = 0.5
    hard_fraction: float = 0.05
    edge_weight: float = 0.5
    initial: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        weight = "[0, inf)"
        check_ranges(self, hard_fraction="(0, 1]", hard_weight=weight, edge_weight=weight)


class TokenizerStage:
    """See ``nfd_env.training.loop.Stage``."""

    lower_is_better = ()  # more is, of all metrics

    def __init__(self, settings: TokenizerTrainingConfig) -> None:
        """Open the recordings and build the network.

        Raises:
            DeviceError: when the device is not there.
            RecordingError: when the recordings are missing, too few, or of a size that does not
                divide by the tokenizer's downsampling.
            CheckpointError: when the weights to begin with are missing or of other sizes.
        """
        self.settings = settings
        self._device = resolve_device(settings.train.device)
        self._recordings = open_recordings(settings.recordings)
        height, width, _ = self._recordings.spec.frame_shape
        factor = settings.model.downsampling
        if height % factor or width % factor:
            raise RecordingError(
                f"frames of {height} x {width} do not divide by {factor}, as "
                f"{len(settings.model.encoder_channels)} encoder_channels ask for: record them in "
                "another size, or give fewer channels"
            )
        torch.manual_seed(settings.train.seed)
        self.network = Tokenizer(settings.model)
        if settings.initial:
            begin_tokenizer(self.network, settings.initial)
        self._train = self._recordings.split("train")
        self._places = Places(self._train.lengths + 1)
        self._before, self._held_out = self._pairs(self._recordings.split("validation"), _HELD_OUT)

    def _pairs(self, episodes: Episodes, count: int) -> tuple[Tensor, Tensor]:
        """``count`` pairs of consecutive frames, evenly spread: two uint8 (count, H, W, 3)."""
        places = Places(episodes.lengths + 1, 2)
        chosen = [places.find(p) for p in np.linspace(0, len(places) - 1, count).astype(int)]
        pairs = np.stack([episodes[e].frames[f : f + 2] for e, f in chosen])
        return torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Tensor:
        """uint8 (rows, H, W, 3): frames drawn uniformly from the training episodes."""
        run = RUN if self._recordings.spec.in_videos else 1
        return self._frames(self._places.draw(rng, size, run)[part.rows(size)])

    def _frames(self, places: np.ndarray) -> Tensor:
        chosen = (self._places.find(int(place)) for place in places)
        return torch.from_numpy(np.stack([self._train[e].frames[f] for e, f in chosen]))

    @torch.no_grad()
    def _set_statistics(self, network: nn.Module, count: int) -> None:
        """Make the latents of ``count`` training frames have mean 0 and deviation 1.

        What batch norm gathers while training lags behind the encoder: after 60 steps the latents'
        deviation was 0.2, after 2,500 it was 0.89.
        """
        assert isinstance(network, Tokenizer)
        channels = network.config.latent_channels
        mean, square = torch.zeros(2, channels, dtype=torch.float64, device="cpu")
        places = np.linspace(0, len(self._places) - 1, min(count, len(self._places))).astype(int)
        for part in np.array_split(places, -(-len(places) // _CHUNK)):
            frames = frames_to_float(self._frames(part).to(self._device))
            latents = network.encoder(frames).float()
            mean += latents.mean((2, 3)).sum(0).cpu() / len(places)
            square += latents.square().mean((2, 3)).sum(0).cpu() / len(places)
        statistics = network.normalise
        assert statistics.running_mean is not None and statistics.running_var is not None
        statistics.running_mean.copy_(mean)
        statistics.running_var.copy_(square - mean.square())

    def loss(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Absolute error, plus the hardest pixels', plus that of image differences."""
        target = frames_to_float(batch.to(self._device))
        output = network(target).float()
        error = (output - target).abs()
        mean = error.mean()
        smooth = functional.avg_pool2d(error.mean(1, keepdim=True), 3, 1, 1).flatten()
        hard = parts.mean_of_largest(smooth, self.settings.hard_fraction)
        difference = output - target
        edge = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        loss = mean + self.settings.hard_weight * hard + self.settings.edge_weight * edge
        return loss, {"absolute": mean.detach(), "hard": hard.detach(), "edge": edge.detach()}

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """How well held-out frames come back.

        ``psnr``: in dB over all pixels; ``hard_psnr``: over the 5 % worst; ``moving_psnr``: over
        those that changed since the frame before, NaN where none did; ``moving_psnr_frozen``: what
        that frame has there. ``sharpness``: gradients over the real ones,
        ``gradient_correlation``: whether they are at the same places.
        """
        self._set_statistics(network, _STATISTICS_OF_VALIDATION)
        made = self._reconstruct(network, self._held_out)
        real = self._held_out.numpy()
        square = ((made.astype(np.float32) - real) ** 2).mean(-1)
        hard = np.partition(square.ravel(), -(square.size // 20))[-(square.size // 20) :]
        before = self._before.numpy()
        moved = moving_pixels(before, real)
        frozen = ((before.astype(np.float32) - real) ** 2).mean(-1)

        def over_moved(squares: np.ndarray) -> float:
            return psnr(float(squares[moved].mean())) if moved.any() else float("nan")

        return {
            "psnr": psnr(float(square.mean())),
            "hard_psnr": psnr(float(hard.mean())),
            "moving_psnr": over_moved(square),
            "moving_psnr_frozen": over_moved(frozen),
            "sharpness": sharpness(made) / max(sharpness(real), 1e-6),
            "gradient_correlation": gradient_correlation(real, made),
        }

    @torch.no_grad()
    def _reconstruct(self, network: nn.Module, frames: Tensor) -> np.ndarray:
        chunks = (frames_to_float(c.to(self._device)) for c in frames.split(_CHUNK))
        return torch.cat([float_to_frames(network(c)).cpu() for c in chunks]).numpy()

    def strip(self, network: nn.Module) -> np.ndarray:
        """Eight held-out frames, real above reconstructed."""
        real = self._held_out[:: _HELD_OUT // 8]
        made = self._reconstruct(network, real)
        rows = [np.concatenate(list(frames), 1) for frames in (real.numpy(), made)]
        return np.concatenate(rows, 0)

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config, and with statistics of the training data."""
        self._set_statistics(network, _STATISTICS)
        made_from = {"recordings": self._recordings.spec.fingerprint}
        save_weights(path, network, self.settings.model, kind="tokenizer", made_from=made_from)
