"""Stage 2: the dynamics transformer learns the velocity of the next frame (flow matching)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.data.latents import LatentDataset, check_endings, encode_recordings
from nfd_env.data.shards import RecordedDataset
from nfd_env.flow.path import interpolate, sample_levels
from nfd_env.flow.solvers import level_grid, sample_euler
from nfd_env.inference.rollout import rollout_latents
from nfd_env.models.dynamics import Dynamics, DynamicsConfig, with_low_rank
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, fingerprint_of, load_weights, save_weights
from nfd_env.training.history import HistoryLevels
from nfd_env.training.loop import TrainConfig


@dataclass(frozen=True)
class FlowTrainingConfig:
    """The config file of ``nfd train flow``.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer's weights.
        latents: folder of the latent cache, written on first use.
        train: the loop's settings.
        model: the transformer's sizes; the latents' shape and the action width are filled in.
        frames: frames a training window.
        history: "two_copies": every noisy frame sees an almost clean copy of the frames before it,
            as when playing; "shared": one copy, an independent level a frame (arXiv 2506.01380).
        initial: weights to begin with, of the same sizes as ``model``; "" for random ones. They may
            have seen other frames (``window``), and a full adaLN projection is
            brought to ``model.modulation_rank``.
        history_levels: levels of the history copy in two-copy training.
        history_level: the history's level when playing, stored with the weights.
        level_shift: see ``nfd_env.flow.path.sample_levels``.
        ending_share: share of the windows at the end of episodes, see ``LatentDataset.windows``.
        ending_frames: see there.
    """

    recordings: str
    tokenizer: str
    latents: str
    train: TrainConfig
    model: DynamicsConfig = field(default_factory=DynamicsConfig)
    frames: int = 16
    history: str = "two_copies"
    initial: str = ""
    history_levels: HistoryLevels = field(default_factory=HistoryLevels)
    history_level: float = 0.15
    level_shift: float = 3.0
    ending_share: float = 0.0
    ending_frames: int = 0

    def __post_init__(self) -> None:
        """Check the choices."""
        check_endings(self.ending_share, self.ending_frames)
        if self.history not in ("two_copies", "shared"):
            raise ValueError(f"history must be two_copies or shared, got {self.history!r}")


class FlowStage:
    """See ``nfd_env.training.loop.Stage``."""

    def __init__(self, settings: FlowTrainingConfig) -> None:
        """Encode the recordings where that has not been done, and build the network."""
        self.settings = settings
        self._device = torch.device(settings.train.device)
        recordings = RecordedDataset(settings.recordings)
        self._made_from = {
            "tokenizer": fingerprint_of(settings.tokenizer),
            "recordings": recordings.spec.fingerprint,
        }
        encode_recordings(recordings, settings.tokenizer, settings.latents, settings.train.device)
        self._train = LatentDataset(recordings, settings.latents, "train")
        self._validation = LatentDataset(recordings, settings.latents, "validation")
        self._tokenizer = load_weights(settings.tokenizer, Tokenizer, TokenizerConfig)
        torch.manual_seed(settings.train.seed)
        self.network = Dynamics(settings.model)
        if settings.initial:
            begun = load_weights(settings.initial, Dynamics, DynamicsConfig)
            rank = settings.model.modulation_rank
            if rank and not begun.config.modulation_rank:
                begun, _ = with_low_rank(begun, self._known_actions(), rank)
            # How many frames one sees is nothing that the weights depend on.
            if begun.config != replace(settings.model, window=begun.config.window):
                raise CheckpointError(
                    f"{settings.initial}: holds {begun.config}, the config asks for "
                    f"{settings.model}"
                )
            self.network.load_state_dict(begun.state_dict())
        rng = np.random.default_rng(0)
        self._held_out = self._validation.windows(rng, 64, settings.frames)
        self._rollout = self._validation.windows(rng, 8, 4 + 32)

    def _known_actions(self) -> Tensor:
        """Encoded actions (n, action_width) of the recordings, and the one before the first."""
        first = [torch.from_numpy(e.actions[:256]) for e in self._train.episodes[:64]]
        distinct = torch.unique(torch.cat(first), dim=0)
        return torch.cat((distinct[:256], torch.zeros(1, distinct.shape[1])))

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Latents (size, frames, C, h, w) and the actions leading into them."""
        s = self.settings
        return self._train.windows(rng, size, s.frames, s.ending_share, s.ending_frames)

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean squared error of the velocity."""
        assert isinstance(network, Dynamics)
        latents, actions = (x.to(self._device) for x in batch)
        levels = sample_levels(latents.shape[:2], self.settings.level_shift, self._device)
        sample = interpolate(latents, torch.randn_like(latents), levels)
        if self.settings.history == "shared":
            velocity = network(sample.x, levels, actions)
            error = (velocity.float() - sample.velocity).square().mean((2, 3, 4))
        else:
            history_levels = self.settings.history_levels.sample(
                latents.shape[:2], self.settings.level_shift, self._device
            )
            history = interpolate(latents, torch.randn_like(latents), history_levels).x
            velocity = network.forward_two_copies(
                history, history_levels, sample.x, levels, actions
            )
            # The first frame of a window has no history to follow from.
            error = (velocity.float() - sample.velocity).square().mean((2, 3, 4))[:, 1:]
        return error.mean(), {"last_frame": error[:, -1].mean().detach()}

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """Flow loss on held-out windows, and the latents' error of a 32-frame rollout."""
        losses = [
            float(self.loss(network, (x, a))[0])
            for x, a in zip(*(t.split(16) for t in self._held_out), strict=True)
        ]
        made, real = self._generate(network)
        frozen = real[:, 3:4].expand_as(made)
        metrics = {"flow": float(np.mean(losses))}
        for horizon in (1, 8, 32):
            error = functional.mse_loss(made[:, horizon - 1], real[:, 3 + horizon])
            still = functional.mse_loss(frozen[:, horizon - 1], real[:, 3 + horizon])
            metrics[f"error_{horizon}"] = float(error)
            metrics[f"error_over_frozen_{horizon}"] = float(error / still)
        metrics["spread"] = float(made.std() / real.std())
        return metrics

    def _generate(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        assert isinstance(network, Dynamics)
        latents, actions = (x.to(self._device) for x in self._rollout)
        made = rollout_latents(
            network,
            latents[:, :4],
            actions,
            lambda velocity, noise: sample_euler(velocity, noise, level_grid(4)),
            self.settings.history_level,
            torch.Generator(self._device).manual_seed(0),
        )
        return made, latents

    def strip(self, network: nn.Module) -> np.ndarray:
        """Two held-out episodes, real above generated, at 1, 4, 8, 16, 24 and 32 frames."""
        made, real = self._generate(network)
        horizons = torch.tensor([1, 4, 8, 16, 24, 32])
        rows = []
        for episode in (0, 1, 2):
            for latents, offset in ((real, 3), (made, -1)):
                frames = self._tokenizer.decode_frames(latents[episode, horizons + offset].cpu())
                rows.append(torch.cat(list(frames), 1))
        return torch.cat(rows, 0).numpy()

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.settings.model, kind="flow", made_from=self._made_from)
