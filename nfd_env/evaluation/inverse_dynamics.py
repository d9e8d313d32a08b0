"""Do keys do what they say? A small net reads the action back from frames.

It is trained on real play (an inverse dynamics model, Baker et al. 2022, arXiv 2206.11795), then
asked for the actions of frames that a world drew under recorded actions, as MineWorld does
(arXiv 2504.08388), see ``nfd_env.evaluation.clips``. As it has to see how things move, the features
that it looks at also tell how far the clips of a world are from those of the game.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.config import check_ranges, config_class
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.data.windows import RUN, Places
from nfd_env.devices import resolve_device
from nfd_env.files import found_file
from nfd_env.models.weights import CheckpointError, load_weights, save_weights
from nfd_env.parts import WHOLE, Part
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.training.loop import TrainConfig
from nfd_env.worlds.load import World

_CHUNK = 256  # windows that are read together
SHOWN = 4  # frames that a world is shown first, at least


@config_class
class InverseDynamicsConfig:
    """Sizes of the net.

    Attributes:
        action_space: see ``nfd_env.spaces.space_to_dict``.
        frame_size: [H, W].
        window: frames that it looks at, at most 64; it reads the action that was taken at the
            middle one, and what a key does often shows only some frames later.
        channels: of the first convolution.
    """

    action_space: dict[str, Any]
    frame_size: list[int]
    window: int = 6
    channels: int = 16

    def __post_init__(self) -> None:
        """Check that there is a frame before the action and one after it."""
        check_ranges(self, window="[2, 64]", channels="[1, inf)")

    @property
    def asked(self) -> int:
        """Number in the window of the frame at which the action was taken."""
        return (self.window - 1) // 2


class InverseDynamics(nn.Module):
    """Consecutive frames -> the action, encoded as ``ActionCodec`` does it (logits of choices)."""

    def __init__(self, config: InverseDynamicsConfig) -> None:
        """Build from ``config``."""
        super().__init__()
        self.config = config
        self.space = space_from_dict(config.action_space)
        self.codec = ActionCodec(self.space)
        layers: list[nn.Module] = []
        # One frame and what changes from each to the next: small movements are found sooner so.
        before = 3 * config.window
        for stride, times in ((2, 1), (2, 2), (1, 2), (1, 4)):
            channels = times * config.channels
            layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.GroupNorm(1, channels)]
            layers.append(nn.SiLU())
            before = channels
        self.layers = nn.Sequential(*layers)
        self.hidden = nn.Linear(2 * before, 128)
        self.output = nn.Linear(128, self.codec.width)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (B, window, H, W, 3) -> (B, action_width)."""
        return self.output(functional.silu(self.hidden(self.features(frames))))

    def features(self, frames: Tensor) -> Tensor:
        """What the windows show, uint8 (B, window, H, W, 3) -> (B, 8 * channels)."""
        pictures = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        asked = pictures[:, self.config.asked, None]
        seen = self.layers(torch.cat((asked, 2 * pictures.diff(dim=1)), 1).flatten(1, 2))
        # In a mean over all places the one small thing that keys move is lost, in the largest not.
        return torch.cat((seen.amax((2, 3)), seen.mean((2, 3))), 1)

    def parts(self, encoded: Tensor) -> tuple[Tensor, ...]:
        """The choices of Discrete and MultiDiscrete in encoded actions or logits (B, width)."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            return (encoded,)
        assert isinstance(space, spaces.MultiDiscrete)
        return encoded.split(space.nvec.tolist(), -1)

    def read(self, frames: Tensor) -> Tensor:
        """The actions of windows, uint8 (B, window, H, W, 3), in the form that ``score`` takes."""
        return self.labels(self._of_parts(self, frames))

    def see(self, clips: Tensor) -> Tensor:
        """``features`` of all windows of clips, uint8 (n, F, H, W, 3) -> (n, F - window + 1, d)."""
        window = self.config.window
        firsts = range(clips.shape[1] - window + 1)
        seen = [self._of_parts(self.features, clips[:, f : f + window]) for f in firsts]
        return torch.stack(seen, 1)

    @torch.no_grad()
    def _of_parts(self, function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        device = self.output.weight.device
        return torch.cat([function(p.to(device)).float().cpu() for p in frames.split(_CHUNK)])

    def labels(self, encoded: Tensor) -> Tensor:
        """What ``score`` compares: choices int64 (B, parts), keys 0 or 1 (B, n), or numbers."""
        if isinstance(self.space, spaces.Box):
            return encoded
        if isinstance(self.space, spaces.MultiBinary):
            return (encoded > 0).long()
        return torch.stack([part.argmax(-1) for part in self.parts(encoded)], -1)


def scores(space: spaces.Space, taken: Tensor, read: Tensor) -> list[float]:
    """F1 of choices and keys, R² of numbers, of each part of the actions; 1 is perfect.

    Args:
        space: the action space.
        taken: labels (B, n) of the actions that were taken, see ``InverseDynamics.labels``.
        read: of those that were read.

    Returns:
        For each of the n parts: of choices, the mean F1 of the values that were taken (macro F1);
        of keys, the F1 of being held; of numbers, R². NaN of keys that were never held and of
        numbers that do not vary.
    """
    figures = []
    for mine, other in zip(taken.unbind(-1), read.unbind(-1), strict=True):
        if isinstance(space, spaces.Box):
            spread = float((mine - mine.mean()).square().sum())
            left = float((mine - other).square().sum())
            figures.append(1 - left / spread if spread > 0 else math.nan)
            continue
        values = [1] if isinstance(space, spaces.MultiBinary) else mine.unique().tolist()
        each = [_f1(mine == value, other == value) for value in values if (mine == value).any()]
        figures.append(float(np.mean(each)) if each else math.nan)
    return figures


def score(space: spaces.Space, taken: Tensor, read: Tensor) -> float:
    """The mean of ``scores`` over the parts that have one; NaN without any."""
    known = [figure for figure in scores(space, taken, read) if not math.isnan(figure)]
    return float(np.mean(known)) if known else math.nan


def _f1(taken: Tensor, read: Tensor) -> float:
    return 2 * float((taken & read).sum()) / float(taken.sum() + read.sum())


# ------------------------------------------------------------------------------------- training


@config_class
class InverseDynamicsTrainingConfig:
    """A training of the net.

    Attributes:
        recordings: the data-set folder.
        train: the loop's settings.
        window: see ``InverseDynamicsConfig``.
        channels: see there.
        validation_windows: held-out windows that each validation reads.
    """

    recordings: str
    train: TrainConfig
    window: int = 6
    channels: int = 16
    validation_windows: int = 2048

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, window="[2, 64]", channels="[1, inf)", validation_windows="[1, inf)")


class InverseDynamicsStage:
    """See ``nfd_env.training.loop.Stage``."""

    lower_is_better = ()  # of its score, more is

    def __init__(self, settings: InverseDynamicsTrainingConfig) -> None:
        """Open the recordings and build the net.

        Raises:
            RecordingError: when the episodes of a split are too short to ask a world.
        """
        self.settings = settings
        data = RecordedDataset(settings.recordings)
        height, width, _ = data.spec.frame_shape
        self.config = InverseDynamicsConfig(
            data.spec.action_space, [height, width], settings.window, settings.channels
        )
        torch.manual_seed(settings.train.seed)
        self.network = InverseDynamics(self.config)
        self._device = resolve_device(settings.train.device)
        self._in_videos = data.spec.in_videos
        self._episodes = {name: data.split(name) for name in ("train", "validation")}
        self._places = {
            # The last frame was perhaps not shown.
            name: Places(episodes.lengths, settings.window)
            for name, episodes in self._episodes.items()
        }
        least = SHOWN + settings.window  # so that worlds can be asked too
        for name, episodes in self._episodes.items():
            if episodes.lengths.max(initial=0) < least:
                raise RecordingError(
                    f"{settings.recordings}: no {name} episode has {least + 1} frames: record "
                    "longer ones, or lower inverse_dynamics.window"
                )
        count = min(settings.validation_windows, len(self._places["validation"]))
        spread = np.linspace(0, len(self._places["validation"]) - 1, count).astype(int)
        self._held_out = self._windows("validation", spread)

    def _windows(self, split: str, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows of frames and the encoded actions to read."""
        found = [self._places[split].find(int(place)) for place in places]
        episodes, config = self._episodes[split], self.config
        frames = np.stack([episodes[e].frames[first : first + config.window] for e, first in found])
        actions = np.stack([episodes[e].actions[first + config.asked] for e, first in found])
        return torch.from_numpy(frames), self.network.codec.encode(torch.from_numpy(actions))

    def batch(
        self, rng: np.random.Generator, size: int, part: Part = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """Windows drawn uniformly from the training episodes."""
        run = RUN if self._in_videos else 1
        places = self._places["train"].draw(rng, size, run)
        return self._windows("train", places[part.rows(size)])

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy of choices and keys, squared error of numbers."""
        frames, target = (part.to(self._device) for part in batch)
        output = network(frames).float()
        if isinstance(self.network.space, spaces.Box):
            loss = functional.mse_loss(output, target)
        elif isinstance(self.network.space, spaces.MultiBinary):
            loss = functional.binary_cross_entropy_with_logits(output, target)
        else:
            pairs = zip(self.network.parts(output), self.network.parts(target), strict=True)
            loss = torch.stack([functional.cross_entropy(*pair) for pair in pairs]).mean()
        return loss, {}

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """``score`` of held-out windows, as "f1" or "r2"."""
        assert isinstance(network, InverseDynamics)
        frames, target = self._held_out
        value = score(network.space, network.labels(target), network.read(frames))
        return {"r2" if isinstance(network.space, spaces.Box) else "f1": value}

    def strip(self, network: nn.Module) -> np.ndarray | None:
        """There is nothing to see."""
        return None

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.config)


def load_inverse_dynamics(path: str | Path, world: World) -> InverseDynamics:
    """The net in a file of ``InverseDynamicsStage``, ready to read the frames of ``world``.

    Raises:
        CheckpointError: when the file is missing, damaged, or for other frames or actions.
    """
    network = load_weights(Path(path), InverseDynamics, InverseDynamicsConfig)
    size, space = network.config.frame_size, network.space
    if size != list(world.spec.frame_size) or space != world.action_space:
        raise CheckpointError(
            f"{path} reads {space} from frames of {size[0]}x{size[1]}, {world.spec.name} has "
            f"{world.action_space} and {tuple(world.spec.frame_size)}: train it on recordings of "
            "this world's game"
        )
    return network.to(world.model.device).eval()


def find_inverse_dynamics(world: World) -> Path | None:
    """The net in the run that the world is of: ``inverse_dynamics/model.safetensors`` beside it."""
    path = world.folder.parent / "inverse_dynamics" / "model.safetensors"
    return path if found_file(path, CheckpointError) else None
