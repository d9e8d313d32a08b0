"""Stage 3: reward and termination heads on recorded latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.data.latents import LatentDataset, LatentEpisode, encode_recordings
from nfd_env.data.shards import RecordedDataset
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.weights import save_weights
from nfd_env.training.loop import TrainConfig


@dataclass(frozen=True)
class HeadsTrainingConfig:
    """The config file of ``nfd train heads``.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer's weights.
        latents: folder of the latent cache.
        train: the loop's settings.
        width: width of the recurrent state.
        frames: transitions a training sequence.
        end_share: share of the sequences that end with an episode's end. Ends are rare; the loss
            is weighted back, so that the hazard stays calibrated.
        latent_noise: standard deviation of noise on the latents in training, because generated
            latents are not quite recorded ones.
        reward_bins: most reward values that are kept apart.
        dropout: see ``HeadsConfig``.
    """

    recordings: str
    tokenizer: str
    latents: str
    train: TrainConfig
    width: int = 256
    frames: int = 128
    end_share: float = 0.3
    latent_noise: float = 0.15
    reward_bins: int = 63
    dropout: float = 0.2


class HeadsStage:
    """See ``nfd_env.training.loop.Stage``."""

    def __init__(self, settings: HeadsTrainingConfig) -> None:
        """Encode the recordings where that has not been done, and build the network."""
        self.settings = settings
        self._device = torch.device(settings.train.device)
        recordings = RecordedDataset(settings.recordings)
        encode_recordings(recordings, settings.tokenizer, settings.latents, settings.train.device)
        self._train = LatentDataset(recordings, settings.latents, "train")
        self._validation = LatentDataset(recordings, settings.latents, "validation")
        rewards = np.concatenate([e.rewards for e in self._train.episodes])
        episode = self._train.episodes[0]
        torch.manual_seed(settings.train.seed)
        self.config = HeadsConfig(
            latent_size=int(np.prod(episode.latents.shape[1:])),
            action_width=episode.actions.shape[1],
            width=settings.width,
            reward_values=reward_values(rewards, settings.reward_bins),
            dropout=settings.dropout,
        )
        self.network = Heads(self.config)
        self._ends = [i for i, e in enumerate(self._train.episodes) if e.terminated[-1]]
        # A sequence may begin up to frames - 1 transitions before an episode does, which cuts it
        # short: only so is every transition in equally many sequences.
        lengths = np.array([len(e.actions) for e in self._train.episodes])
        self._places = np.cumsum(lengths + settings.frames - 1)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, ...]:
        """Sequences of ``frames`` transitions, padded at the end; see ``_sequence``."""
        rows = []
        total, frames = int(self._places[-1]), self.settings.frames
        for _ in range(size):
            if self._ends and rng.random() < self.settings.end_share:
                number = self._ends[rng.integers(len(self._ends))]
                start = len(self._train.episodes[number].actions) - int(rng.integers(1, frames + 1))
            else:
                index = int(rng.integers(total))
                number = int(np.searchsorted(self._places, index, side="right"))
                # The last place of an episode is the one that holds its last transition only.
                last = len(self._train.episodes[number].actions) - 1
                start = last - (int(self._places[number]) - 1 - index)
            rows.append(self._sequence(self._train.episodes[number], start))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _sequence(self, episode: LatentEpisode, start: int) -> tuple[Tensor, ...]:
        """Latents after each transition, actions, rewards, terminated, and importance weights.

        ``start`` may be negative: the sequence then begins with the episode, and is shorter.
        """
        count = self.settings.frames
        stop = min(len(episode.actions), start + count)
        start = max(0, start)
        size = stop - start

        def pad(array: np.ndarray) -> Tensor:
            filled = np.zeros((count, *array.shape[1:]), np.float32)
            filled[:size] = array
            return torch.from_numpy(filled)

        return (
            pad(episode.latents[start + 1 : stop + 1]),
            pad(episode.actions[start:stop]),
            pad(episode.rewards[start:stop]),
            pad(episode.terminated[start:stop]),
            pad(self._importance(episode, start, stop)),
        )

    def _importance(self, episode: LatentEpisode, start: int, stop: int) -> np.ndarray:
        """How much rarer each transition is in the recordings than in the batches."""
        share, frames, total = self.settings.end_share, self.settings.frames, self._places[-1]
        uniform = np.full(stop - start, frames / total)
        if not self._ends:
            return np.ones_like(uniform)
        drawn = (1 - share) * uniform
        if episode.terminated[-1]:
            before_end = len(episode.actions) - 1 - np.arange(start, stop)
            drawn += share / len(self._ends) * np.clip(1 - before_end / frames, 0, None)
        return uniform / drawn

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, ...]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy of rewards and of ends, as if transitions were drawn uniformly."""
        latents, actions, rewards, terminated, weight = (x.to(self._device) for x in batch)
        latents = latents + self.settings.latent_noise * torch.randn_like(latents) * torch.rand(
            len(latents), 1, 1, 1, 1, device=self._device
        )
        end, reward = self._errors(network, latents, actions, rewards, terminated)
        end_loss = (weight * end).sum() / weight.sum()
        reward_loss = (weight * reward).sum() / weight.sum()
        # Ends are rare events with a tiny mean loss; scale it to the size of a common one.
        loss = 30 * end_loss + reward_loss
        return loss, {"end": end_loss.detach(), "reward": reward_loss.detach()}

    def _errors(
        self, network: nn.Module, latents: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(network, Heads)
        logits, _ = network(latents, actions, network.initial_state(len(latents)))
        logits = logits.float()
        end = functional.binary_cross_entropy_with_logits(logits[..., 0], ends, reduction="none")
        reward = -(network.two_hot(rewards) * logits[..., 1:].log_softmax(-1)).sum(-1)
        return end, reward

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """Log losses on whole held-out episodes; ``end`` is to be compared with ``end_constant``.

        ``end_constant`` is the loss of always predicting the true mean rate.
        """
        assert isinstance(network, Heads)
        end_sum = reward_error = count = ends = 0.0
        for episode in self._validation.episodes:
            latents = torch.from_numpy(episode.latents[1:]).float()[None].to(self._device)
            actions = torch.from_numpy(episode.actions)[None].to(self._device)
            rewards = torch.from_numpy(episode.rewards)[None].to(self._device)
            terminated = torch.from_numpy(episode.terminated)[None].float().to(self._device)
            end, _ = self._errors(network, latents, actions, rewards, terminated)
            logits, _ = network(latents, actions, network.initial_state(1))
            reward_error += float((network.reward(logits) - rewards).abs().sum())
            end_sum += float(end.sum())
            count += end.numel()
            ends += float(terminated.sum())
        rate = max(ends, 0.5) / count
        constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        return {
            "end": end_sum / count,
            "end_over_constant": end_sum / count / constant,
            "reward_absolute_error": reward_error / count,
        }

    def strip(self, network: nn.Module) -> None:
        """Nothing to look at."""

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.config)


def reward_values(rewards: np.ndarray, bins: int) -> list[float]:
    """The distinct rewards where they are few, else ``bins`` quantiles of them."""
    distinct = np.unique(rewards)
    if len(distinct) > bins:
        distinct = np.unique(np.quantile(rewards, np.linspace(0, 1, bins)))
    return [float(value) for value in distinct]
