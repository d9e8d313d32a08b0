"""Stage 1: the tokenizer learns to reconstruct recorded frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import Places
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig, float_to_frames, frames_to_float
from nfd_env.models.weights import save_weights
from nfd_env.training.loop import TrainConfig


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """The config file of ``nfd train tokenizer``.

    Attributes:
        recordings: the data-set folder.
        train: the loop's settings.
        model: the tokenizer's sizes.
        hard_weight: weight of the mean error over the hardest pixels.
        hard_fraction: which share of the pixels counts as hardest. Small moving things are a tiny
            part of a frame; without this term they come out as smears.
        edge_weight: weight of the error of horizontal and vertical differences (sharpness).
    """

    recordings: str
    train: TrainConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    hard_weight: float = 0.5
    hard_fraction: float = 0.05
    edge_weight: float = 0.5


class TokenizerStage:
    """See ``nfd_env.training.loop.Stage``."""

    def __init__(self, settings: TokenizerTrainingConfig) -> None:
        """Open the recordings and build the network."""
        self.settings = settings
        torch.manual_seed(settings.train.seed)
        self.network = Tokenizer(settings.model)
        data = RecordedDataset(settings.recordings)
        self._made_from = {"recordings": data.spec.fingerprint}
        self._train, self._validation = data.split("train"), data.split("validation")
        self._places = Places(len(e) + 1 for e in self._train)
        self._held_out = self._spread(64)
        self._device = torch.device(settings.train.device)

    def _spread(self, count: int) -> Tensor:
        """``count`` frames spread evenly over the held-out episodes, uint8 (count, H, W, 3)."""
        places = Places(len(e) + 1 for e in self._validation)
        chosen = (places.find(p) for p in np.linspace(0, len(places) - 1, count).astype(int))
        return torch.from_numpy(np.stack([self._validation[e].frames[f] for e, f in chosen]))

    def batch(self, rng: np.random.Generator, size: int) -> Tensor:
        """uint8 (size, H, W, 3): frames drawn uniformly from the training episodes."""
        chosen = (self._places.find(p) for p in rng.integers(0, len(self._places), size))
        return torch.from_numpy(np.stack([self._train[e].frames[f] for e, f in chosen]))

    def loss(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Absolute error, plus the hardest pixels', plus that of image differences."""
        target = frames_to_float(batch.to(self._device))
        output = network(target).float()
        error = (output - target).abs()
        mean = error.mean()
        smooth = functional.avg_pool2d(error.mean(1, keepdim=True), 3, 1, 1).flatten()
        hard = smooth.topk(max(1, int(self.settings.hard_fraction * len(smooth)))).values.mean()
        difference = output - target
        edge = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        loss = mean + self.settings.hard_weight * hard + self.settings.edge_weight * edge
        return loss, {"absolute": mean.detach(), "hard": hard.detach(), "edge": edge.detach()}

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """PSNR (dB) over held-out frames, and over their 5 % hardest pixels."""
        squares = []
        for chunk in self._held_out.split(16):
            target = frames_to_float(chunk.to(self._device))
            squares.append((network(target).clamp(-1, 1) - target).square().mean(1).flatten() / 4)
        square = torch.cat(squares)
        hard = square.topk(len(square) // 20).values.mean()
        return {
            "psnr": float(-10 * torch.log10(square.mean())),
            "hard_psnr": float(-10 * torch.log10(hard)),
        }

    def strip(self, network: nn.Module) -> np.ndarray:
        """Eight held-out frames, real above reconstructed."""
        real = self._held_out[::8].to(self._device)
        made = float_to_frames(network(frames_to_float(real)))
        rows = [torch.cat(list(x), 1) for x in (real, made)]
        return torch.cat(rows, 0).cpu().numpy()

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(
            path, network, self.settings.model, kind="tokenizer", made_from=self._made_from
        )
