"""What the stages that train on latents share: data, device, pictures and rollouts to judge by."""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nfd_env.config import check_ranges, config_class
from nfd_env.data.latents import LatentDataset
from nfd_env.devices import resolve_device
from nfd_env.inference.rollout import rollout_latents
from nfd_env.inference.sampling import Sampler
from nfd_env.metrics import standing_out
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, fingerprint_of, load_weights
from nfd_env.parts import WHOLE, Part
from nfd_env.training.encode import check_encoded
from nfd_env.training.history import HistoryLevels
from nfd_env.training.loop import TrainConfig
from nfd_env.training.recorded import open_recordings

CONTEXT, HORIZON = 4, 32
"""Frames that a validation's rollout begins with, and frames that it goes on for, where held-out
episodes are that long."""
LEAST_HORIZON = 8
"""Frames that it must go on for at least."""
_JUDGED = (1, 8, HORIZON)  # frames after which rollouts are compared with what happened
_STANDING = (8, HORIZON)
_NEAR = 4  # frames up to each of those that are counted, so that there is something to count
_SHOWN = (1, 4, 8, 16, 24, 32)  # frames of a strip, as far as rollouts go
_CHUNK = 64  # frames decoded at a time


@config_class
class LatentTrainingConfig:
    """What the configs of all stages on latents begin with.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer's weights.
        latents: folder of the latents that ``encode`` has made of the recordings.
        train: the loop's settings.
    """

    recordings: str
    tokenizer: str
    latents: str
    train: TrainConfig


@config_class(kw_only=True)
class WindowTrainingConfig(LatentTrainingConfig):
    """What the configs of stages on windows of frames have in common.

    Attributes:
        frames: frames a training window.
        ending_share: share of the windows at the end of episodes, see ``LatentDataset.windows``.
        ending_frames: see there.
        rollouts: held-out windows that a validation continues.
    """

    frames: int = 16
    ending_share: float = 0.0
    ending_frames: int = 0
    rollouts: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, frames="[2, inf)", rollouts="[1, inf)", ending_frames="[0, inf)")
        check_ranges(self, ending_share="[0, 1]")

    def draw(
        self, data: LatentDataset, rng: np.random.Generator, size: int, part: Part
    ) -> tuple[Tensor, Tensor]:
        """``part`` of ``size`` windows of ``data``, see ``LatentDataset.windows``."""
        return data.windows(rng, size, self.frames, self.ending_share, self.ending_frames, part)


@config_class(kw_only=True)
class HistoryTrainingConfig(WindowTrainingConfig):
    """What flow and distillation add: frames follow from a noisy copy of those before.

    Attributes:
        history_levels: levels of that copy, in training.
        history_level: its level in validation's rollouts; give the world the same.
    """

    history_levels: HistoryLevels = field(default_factory=HistoryLevels)
    history_level: float = 0.15

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, history_level="[0, 1]")


def check_fit(data: LatentDataset, config: DynamicsConfig, name: str) -> None:
    """Refuse dynamics of other latents or actions than those of ``data``.

    Raises:
        CheckpointError: that says what ``name`` is for, and what the data are.
    """
    episode = data.episodes[0]
    shape, width = tuple(episode.latents.shape[1:]), episode.actions.shape[1]
    if config.latent_shape != shape or config.action_width != width:
        raise CheckpointError(
            f"{name} is for latents {config.latent_shape} and actions of width "
            f"{config.action_width}; the recordings have {shape} and {width}"
        )


class LatentStage:
    """Base of the stages on latents; see ``nfd_env.training.loop.Stage``."""

    def __init__(
        self, settings: LatentTrainingConfig, train_frames: int = 2, validation_frames: int = 2
    ) -> None:
        """Check and load the data.

        Args:
            settings: of the stage.
            train_frames: frames in a row that training asks for.
            validation_frames: frames in a row that validation asks for.

        Raises:
            DeviceError: when the device is not there.
            RecordingError: when the recordings are missing or their episodes too few or too short.
            NotEncodedError: when they have not been encoded, or by another tokenizer.
            CheckpointError: when there is no such tokenizer.
        """
        self._device = resolve_device(settings.train.device)
        self._tokenizer_path = Path(settings.tokenizer).expanduser()
        latents = Path(settings.latents).expanduser()
        self._recordings = open_recordings(settings.recordings, train_frames, validation_frames)
        check_encoded(self._recordings, self._tokenizer_path, latents)
        self._train = LatentDataset(self._recordings, latents, "train")
        self._validation = LatentDataset(self._recordings, latents, "validation")
        self._made_from = {
            "tokenizer": fingerprint_of(self._tokenizer_path),
            "recordings": self._recordings.spec.fingerprint,
        }
        self._rollouts: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_weights(self._tokenizer_path, Tokenizer, TokenizerConfig).to(self._device)

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> np.ndarray:
        """Latents (..., C, h, w) -> frames, uint8 (..., H, W, 3)."""
        chunks = latents.flatten(0, -4).split(_CHUNK)
        frames = [self._tokenizer.decode_frames(c.to(self._device)).cpu() for c in chunks]
        return torch.cat(frames).unflatten(0, latents.shape[:-3]).numpy()

    def _hold_out(self, rng: np.random.Generator, count: int) -> None:
        """Choose ``count`` held-out windows to roll out from, as long as there are any."""
        self._horizon = min(HORIZON, self._longest - CONTEXT)
        self._rollouts = self._validation.windows(rng, count, CONTEXT + self._horizon)

    @property
    def _longest(self) -> int:
        """Frames of the longest held-out episode."""
        return int(self._validation.episodes.lengths.max()) + 1

    @property
    def _rollout_losses(self) -> list[str]:
        """Those of ``_judge``'s metrics of which less is better."""
        judged = [h for h in _JUDGED if h <= self._horizon]
        return [f"error{over}_{h}" for h in judged for over in ("", "_over_frozen")]

    def _generate(
        self, network: Dynamics, sampler: Sampler, history_level: float, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rollouts from the first ``count`` held-out windows, or all.

        Returns:
            The generated frames (B, n, C, h, w), and the windows (B, CONTEXT + n, ...), with n up
            to HORIZON.
        """
        assert self._rollouts is not None
        latents, actions = (x[:count] for x in self._rollouts)
        return self._continue((latents, actions), network, sampler, history_level)

    def _continue(
        self,
        windows: tuple[Tensor, Tensor],
        network: Dynamics,
        sampler: Sampler,
        history_level: float,
    ) -> tuple[Tensor, Tensor]:
        """Rollouts from the beginnings of ``windows``, see ``_generate``, to their ends."""
        latents, actions = (x.to(self._device) for x in windows)
        generator = torch.Generator(self._device).manual_seed(0)
        made = rollout_latents(
            network, latents[:, :CONTEXT], actions, sampler, history_level, generator
        )
        return made, latents

    def _judge(self, made: Tensor, latents: Tensor) -> dict[str, float]:
        """How the rollouts of ``_generate`` compare with what happened.

        ``error_N``: squared error of the latents after N frames; ``error_over_frozen_N``: over that
        of a picture that stands still. ``spread``: standard deviation of the latents over the real
        one. ``standing_N``: how much stands out from the background after N frames, over how much
        really does; below 1 things fade, above they are invented; NaN where nothing stands out. See
        ``nfd_env.metrics.standing_out``. Where held-out episodes are short, what would be further
        ahead is left out.
        """
        real, frozen = latents[:, CONTEXT:], latents[:, CONTEXT - 1]
        metrics: dict[str, float] = {}
        for horizon in (h for h in _JUDGED if h <= self._horizon):
            after = real[:, horizon - 1]
            error = functional.mse_loss(made[:, horizon - 1], after)
            metrics[f"error_{horizon}"] = float(error)
            metrics[f"error_over_frozen_{horizon}"] = float(
                error / functional.mse_loss(frozen, after)
            )
        metrics["spread"] = float(made.std() / real.std())
        background, known = self._background
        for horizon in known:
            frames = self._decode(made[:, horizon - _NEAR : horizon])
            count = int(standing_out(frames, background).sum())
            metrics[f"standing_{horizon}"] = count / known[horizon] if known[horizon] else np.nan
        return metrics

    @cached_property
    def _background(self) -> tuple[np.ndarray, dict[int, int]]:
        """The windows' median frames (B, 1, H, W, 3), and how much really stands out of them."""
        assert self._rollouts is not None
        medians: list[np.ndarray] = []
        counts: dict[int, int] = {h: 0 for h in _STANDING if h <= self._horizon}
        for window in self._rollouts[0]:
            frames = self._decode(window)
            median = np.median(frames, axis=0, keepdims=True).astype(np.uint8)
            medians.append(median)
            for horizon in counts:
                last = CONTEXT + horizon
                counts[horizon] += int(standing_out(frames[last - _NEAR : last], median).sum())
        return np.stack(medians), counts

    def _picture(self, *rollouts: Tensor) -> np.ndarray:
        """Three episodes (B, n, C, h, w) below one another, of each kind in turn."""
        shown = [frame - 1 for frame in _SHOWN if frame <= self._horizon]
        rows = [
            np.concatenate(list(self._decode(latents[episode][shown])), 1)
            for episode in range(min(3, len(rollouts[0])))
            for latents in rollouts
        ]
        return np.concatenate(rows, 0)


class WindowStage(LatentStage):
    """Base of the stages on windows of frames."""

    settings: Any

    def __init__(self, settings: WindowTrainingConfig) -> None:
        """Check and load the data, see ``LatentStage``."""
        super().__init__(settings, settings.frames, max(settings.frames, CONTEXT + LEAST_HORIZON))
        self.settings = settings

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Any:
        """Latents (rows, frames, C, h, w) and the actions leading into them."""
        return self.settings.draw(self._train, rng, size, part)
