"""A world whose frames are drawn token by token: ``dynamics="autoregressive"`` and ``.._parallel``.

Tokens are decoded to latents of the world's own tokenizer, from which it shows pictures and its
heads read rewards and ends, as from those that its own dynamics draw.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from nfd_env.baselines.discrete import DiscreteTokenizer, DiscreteTokenizerConfig
from nfd_env.baselines.transformer import (
    Schedule,
    TokenDynamics,
    TokenDynamicsConfig,
    uniform_of,
)
from nfd_env.config import check_ranges, config_class
from nfd_env.files import found_file
from nfd_env.inference.noise import noise
from nfd_env.inference.packing import pack_convolutions, pack_linears
from nfd_env.inference.rollout import Ahead, new_cache
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import WorldState
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.cache import FrameCache
from nfd_env.models.weights import CheckpointError, fingerprint_of, load_weights
from nfd_env.worlds.checksums import verify
from nfd_env.worlds.load import World

FOLDER = "autoregressive"
PARTS = ("tokenizer", "dynamics")


@config_class
class TokenSampling(SamplingConfig):
    """How a frame's tokens are drawn; of the attributes of its base only ``temperature`` is free.

    Attributes:
        top_p: see ``TokenDynamicsConfig``.
        passes: of the transformer for each frame, which is what ``steps`` says too.
    """

    top_p: float = 0.8
    passes: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps != self.passes:
            raise ValueError(
                f"sampling_steps is nothing that can be chosen here: a frame's tokens take "
                f"{self.passes} passes; leave it out, got {self.steps}"
            )
        if self.history_level:
            raise ValueError(
                "history_level is noise on past frames, and tokens have none: leave it out, got "
                f"{self.history_level}"
            )
        check_ranges(self, temperature="(0, inf)")


class AutoregressiveModel(WorldModel):
    """Steps like ``WorldModel``; in its states ``drawn.remembered`` holds tokens, int64 (B, 1, n).

    All that is random about a frame is again a function of its episode and number.
    """

    dynamics: TokenDynamics  # type: ignore[assignment]
    sampling: TokenSampling  # type: ignore[assignment]

    def __init__(
        self,
        model: WorldModel,
        discrete: DiscreteTokenizer,
        dynamics: TokenDynamics,
        schedule: Schedule,
    ) -> None:
        """Share tokenizer and heads with ``model``; ``schedule`` is one of the dynamics'."""
        passes = len(schedule.passes)
        sampling = TokenSampling(
            passes, "top_p", history_level=0.0, top_p=dynamics.config.top_p, passes=passes
        )
        super().__init__(model.tokenizer, dynamics, model.heads, sampling, model.world_id)  # type: ignore[arg-type]
        self.discrete, self.schedule = discrete, schedule

    @property
    def most_frames(self) -> int:
        """One: the next frame's tokens wait for this one's."""
        return 1

    def check_fits(self, state: WorldState, frames: int) -> None:
        """See ``WorldModel.check_fits``."""
        super().check_fits(state, frames)
        if state.drawn.remembered.dtype != torch.int64:
            raise ValueError("the state is of dynamics of another kind")

    def _history(
        self, frames: int, sampling: SamplingConfig, latents: Tensor, actions: Tensor, keys: Tensor
    ) -> tuple[Tensor, FrameCache]:
        tokens = self.discrete.encode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        cache = new_cache(self.dynamics, len(latents), frames)  # type: ignore[arg-type]
        self.dynamics.fill(cache, tokens, actions, self.schedule)
        return tokens[:, -1:], cache

    def _frames(
        self, ahead: Ahead, first: Tensor, keys: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(sampling, TokenSampling)
        normal, ends = noise(keys[:, None], first, self.dynamics.config.drawn)
        tokens = self.dynamics.draw(
            ahead.cache,
            ahead.pending[:, 0],
            ahead.actions[:, 0],
            uniform_of(normal[:, 0]),
            self.schedule,
            sampling.temperature,
            sampling.top_p,
        )
        return self.discrete.decode(tokens)[:, None], tokens[:, None], ends


def find(folder: Path) -> list[Path]:
    """The files of ``PARTS`` in a world's folder, or in the run that it is of; none without."""
    inside = [folder / FOLDER / f"{part}.safetensors" for part in PARTS]
    beside = [folder.parent / FOLDER / part / "model.safetensors" for part in PARTS]
    whole = (
        files
        for files in (inside, beside)
        if all(found_file(file, CheckpointError) for file in files)
    )
    return next(whole, [])


def load(name: str, world: World, precision: str) -> AutoregressiveModel:
    """The model called ``name`` for a loaded world.

    Raises:
        CheckpointError: when there is none, or it is damaged or was trained for another world.
        ImportError: without the extra that has the quantiser.
    """
    files = find(world.folder)
    if not files:
        raise CheckpointError(f"{world.folder}: has no {name} dynamics; nfd train-baseline")
    if files[0].is_relative_to(world.folder):
        verify(world.folder, *(file.relative_to(world.folder).as_posix() for file in files))
    discrete = load_weights(files[0], DiscreteTokenizer, DiscreteTokenizerConfig)
    dynamics = load_weights(files[1], TokenDynamics, TokenDynamicsConfig)
    _check_fit(world, discrete.config, dynamics.config, files)
    device = world.model.device
    for network in (discrete, dynamics):
        network.to(device).requires_grad_(False)
    if precision == "bf16":
        dynamics.to(torch.bfloat16)
    pack_convolutions(discrete, math.inf)
    pack_linears(dynamics, rows=2)
    schedule = dynamics.one_by_one if name == "autoregressive" else dynamics.diagonal
    return AutoregressiveModel(world.model, discrete, dynamics, schedule)


def _check_fit(
    world: World,
    discrete: DiscreteTokenizerConfig,
    dynamics: TokenDynamicsConfig,
    files: list[Path],
) -> None:
    made_with = fingerprint_of(world.folder / "tokenizer.safetensors")
    shape = world.model.dynamics.config.latent_shape
    latents = (discrete.latent_channels, discrete.latent_height, discrete.latent_width)
    if discrete.made_with != made_with or latents != shape:
        raise CheckpointError(
            f"{files[0]}: was trained for another tokenizer than {world.spec.name} has; "
            "nfd train-baseline makes one for it"
        )
    tokens = (*discrete.grid, discrete.vocabulary)
    if (
        dynamics.made_with != fingerprint_of(files[0])
        or (dynamics.rows, dynamics.columns, dynamics.vocabulary) != tokens
        or dynamics.latent_shape != shape
        or dynamics.action_width != world.codec.width
    ):
        raise CheckpointError(f"{files[1]}: was trained for other tokens than {files[0]} makes")
