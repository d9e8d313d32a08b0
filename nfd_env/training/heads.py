"""Stage 4: reward and termination heads on recorded latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.config import check_ranges, config_class
from nfd_env.data.latents import LatentEpisode
from nfd_env.data.shards import RecordingError
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.weights import CheckpointError, load_weights, save_weights
from nfd_env.parts import WHOLE, Part
from nfd_env.training.initial import initial_weights
from nfd_env.training.latent_stage import LatentStage, LatentTrainingConfig
from nfd_env.training.recorded import check_rewards
from nfd_env.training.segments import SegmentSampler

# Rare ends and rewards have tiny mean losses, some hundredths: each is divided by that of always
# telling how frequent they are, but by no less than this.
_LEAST_LOSS = 0.01


@config_class
class HeadsTrainingConfig(LatentTrainingConfig):
    """What to train the heads on, and how; see also ``LatentTrainingConfig``.

    Attributes:
        width: width of the recurrent state.
        frames: transitions a training sequence.
        end_share: share of the sequences that end with an episode's end. Ends are rare; the loss
            is weighted back, so that the hazard stays calibrated.
        latent_noise: standard deviation of noise on the latents in training, because generated
            latents are not quite recorded ones.
        reward_bins: most reward values that are kept apart.
        dropout: see ``HeadsConfig``.
        nearby: see ``HeadsConfig``.
        signal_weight: weight of the loss for telling the recorded signals too; 0 for not. What ends
            an episode may have been out of the picture for long, and recorded ends are too few to
            learn from them alone what to look at and what to remember; signals say it at every
            transition. With them, ends and rewards are read off what the signals have taught, and
            the size of the weight matters to the clipping of gradients alone.
        initial: weights to begin with, a file or a world, of the same sizes; "" for random ones.
    """

    width: int = 256
    frames: int = 128
    end_share: float = 0.3
    latent_noise: float = 0.15
    reward_bins: int = 63
    dropout: float = 0.2
    nearby: int = 0
    signal_weight: float = 0.0
    initial: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, width="[1, inf)", frames="[1, inf)", reward_bins="[1, inf)")
        check_ranges(self, end_share="[0, 1)", dropout="[0, 1)")
        check_ranges(self, latent_noise="[0, inf)", signal_weight="[0, inf)")
        if self.nearby < 0 or self.nearby % 4:
            raise ValueError(f"nearby must be a multiple of 4 and not negative, got {self.nearby}")


class Sequences(NamedTuple):
    """Transitions in a row, (B, T, ...): latents after each, and how much it weighs."""

    latents: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    signals: Tensor
    weight: Tensor


class HeadsStage(LatentStage):
    """See ``nfd_env.training.loop.Stage``."""

    def __init__(self, settings: HeadsTrainingConfig) -> None:
        """Load the data and build the network.

        Raises:
            CheckpointError: when the weights to begin with do not fit the data; see also
                ``LatentStage``.
        """
        super().__init__(settings)
        self.settings = settings
        check_rewards(self._recordings)
        rewards = np.concatenate([e.rewards for e in self._train.episodes])
        episode = self._train.episodes[0]
        torch.manual_seed(settings.train.seed)
        self.config = HeadsConfig(
            latent_size=int(np.prod(episode.latents.shape[1:])),
            action_width=episode.actions.shape[1],
            width=settings.width,
            reward_values=reward_values(rewards, settings.reward_bins),
            dropout=settings.dropout,
            signals=episode.signals.shape[1] if settings.signal_weight else 0,
            latent_shape=list(episode.latents.shape[1:]) if settings.nearby else [],
            nearby=settings.nearby,
        )
        if settings.signal_weight and not self.config.signals:
            raise RecordingError(
                f"{settings.recordings} holds no signals: record with signals, or set "
                "signal_weight=0"
            )
        self.network = Heads(self.config)
        if settings.initial:
            begun = load_weights(initial_weights(settings.initial, "heads"), Heads, HeadsConfig)
            if replace(begun.config, dropout=settings.dropout) != self.config:
                raise CheckpointError(
                    f"{settings.initial}: holds {begun.config}, the recordings and the config ask "
                    f"for {self.config}"
                )
            self.network.load_state_dict(begun.state_dict())
        ends = max(0.5, sum(float(e.terminated.sum()) for e in self._train.episodes))
        self._constant = {
            "end": max(_LEAST_LOSS, _constant_loss(ends / len(rewards))),
            "reward": max(_LEAST_LOSS, self._reward_entropy(rewards)),
        }
        self._segments = SegmentSampler(self._train.episodes, settings.frames, settings.end_share)

    @property
    def lower_is_better(self) -> list[str]:
        """All of its metrics."""
        names = ["end", "end_over_constant", "reward_absolute_error", "reward_over_constant"]
        return names + ["signal"] * bool(self.config.signals)

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Sequences:
        """Sequences of ``frames`` transitions, padded at the end."""
        rows = []
        for segment in [self._segments.draw(rng) for _ in range(size)][part.rows(size)]:
            episode = self._train.episodes[segment.number]
            parts = _parts(episode, segment.start, segment.stop)
            weight = self._segments.importance(segment)
            rows.append([self._padded(x) for x in (*parts, weight)])
        return Sequences(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _reward_entropy(self, rewards: np.ndarray) -> float:
        """The log loss of always telling how frequent each reward value is."""
        shares = self.network.two_hot(torch.from_numpy(rewards).float()).mean(0)
        return float(-torch.xlogy(shares, shares).sum())

    def _padded(self, array: np.ndarray) -> Tensor:
        filled = np.zeros((self.settings.frames, *array.shape[1:]), np.float32)
        filled[: len(array)] = array
        return torch.from_numpy(filled)

    def loss(self, network: nn.Module, batch: Sequences) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy of rewards and of ends, as if transitions were drawn uniformly."""
        batch = Sequences(*(x.to(self._device) for x in batch))
        latents, weight = batch.latents, batch.weight
        latents = latents + self.settings.latent_noise * torch.randn_like(latents) * torch.rand(
            len(latents), 1, 1, 1, 1, device=self._device
        )
        end, reward, signal = self._errors(network, batch._replace(latents=latents))
        end_loss = (weight * end).sum() / weight.sum()
        reward_loss = (weight * reward).sum() / weight.sum()
        loss = end_loss / self._constant["end"] + reward_loss / self._constant["reward"]
        log = {"end": end_loss.detach(), "reward": reward_loss.detach()}
        if self.config.signals:
            signal_loss = (weight * signal).sum() / weight.sum()
            loss = loss + self.settings.signal_weight * signal_loss
            log["signal"] = signal_loss.detach()
        return loss, log

    def _errors(self, network: nn.Module, batch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Log losses of each transition: end, reward, and signals (mean of those known)."""
        latents, actions, rewards, ends, signals, _ = batch
        assert isinstance(network, Heads)
        features, _ = network.features(latents, actions, network.initial_state(len(latents)))
        # Signals alone shape the features: the few ends would soon be learned by heart.
        read = features.detach() if self.config.signals else features
        logits = network.output(read).float()
        signal = torch.zeros_like(logits[..., 0])
        if self.config.signals:
            known = ~signals.isnan()
            error = functional.binary_cross_entropy_with_logits(
                network.signals(features).float(), signals.nan_to_num(), reduction="none"
            )
            signal = (error * known).mean(-1)
        end = functional.binary_cross_entropy_with_logits(logits[..., 0], ends, reduction="none")
        reward = -(network.two_hot(rewards) * logits[..., 1:].log_softmax(-1)).sum(-1)
        return end, reward, signal

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """Log losses and errors on whole held-out episodes.

        ``end_over_constant`` is ``end`` over the loss of always predicting the true mean rate,
        ``reward_over_constant`` the rewards' squared error over that of their mean; ``signal`` is
        the mean over all signals.
        """
        assert isinstance(network, Heads)
        end_sum = reward_error = reward_square = count = ends = signal_sum = 0.0
        for episode in self._validation.episodes:
            length = len(episode.actions)
            parts = (*_parts(episode, 0, length), np.ones(length))
            # Copied: latents are read-only files.
            rows = (torch.tensor(x[None], dtype=torch.float32) for x in parts)
            batch = Sequences(*(x.to(self._device) for x in rows))
            end, _, signal = self._errors(network, batch)
            logits, _ = network(batch.latents, batch.actions, network.initial_state(1))
            signal_sum += float(signal.sum())
            off = network.reward(logits) - batch.rewards
            reward_error += float(off.abs().sum())
            reward_square += float(off.square().sum())
            end_sum += float(end.sum())
            count += end.numel()
            ends += float(batch.terminated.sum())
        over = end_sum / count / _constant_loss(max(ends, 0.5) / count)
        metrics = {
            "end": end_sum / count,
            "end_over_constant": over,
            "reward_absolute_error": reward_error / count,
        }
        rewards = np.concatenate([e.rewards for e in self._validation.episodes])
        # In fp32 the variance of what never changes is not 0.
        variance = float(rewards.astype(np.float64).var())
        if np.ptp(rewards) > 0:
            metrics["reward_over_constant"] = reward_square / count / variance
        if self.config.signals:
            metrics["signal"] = signal_sum / count
        return metrics

    def strip(self, network: nn.Module) -> None:
        """Nothing to look at."""

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.config, kind="heads", made_from=self._made_from)


def _parts(episode: LatentEpisode, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """What ``Sequences`` have of some transitions, without their weights."""
    parts = episode.actions, episode.rewards, episode.terminated, episode.signals
    return episode.latents[start + 1 : stop + 1], *(part[start:stop] for part in parts)


def _constant_loss(rate: float) -> float:
    """Log loss of always predicting ``rate`` where that is the true one."""
    return float(-(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def reward_values(rewards: np.ndarray, bins: int) -> list[float]:
    """The distinct rewards where they are few, else ``bins`` quantiles of them."""
    distinct = np.unique(rewards)
    if len(distinct) > bins:
        distinct = np.unique(np.quantile(rewards, np.linspace(0, 1, bins)))
    return [float(value) for value in distinct]
