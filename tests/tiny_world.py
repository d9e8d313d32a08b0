"""A world of tiny, randomly initialised networks: everything works, nothing looks like a game."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from nfd_env.inference.noise import mix
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.sources.source import SourceConfig
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.worlds.format import WorldSpec, save_world

DISCRETE = {"type": "Discrete", "n": 3, "start": 0}


def make_tiny_world(
    folder: Path,
    action_space: dict[str, Any] | None = None,
    hazard_bias: float = -3.0,
    window: int = 5,
    starts: int = 6,
    seed: int = 0,
    distilled: bool = False,
    recent: int = 2,
) -> Path:
    """Write a world of 32 x 48 frames; about one step in 20 ends an episode by default.

    A ``distilled`` one has a student of one consistency step and a teacher of three Euler steps.
    """
    torch.manual_seed(seed)
    action_space = action_space or DISCRETE
    width = ActionCodec(space_from_dict(action_space)).width
    tokenizer = Tokenizer(
        TokenizerConfig(encoder_channels=[8, 8, 8], decoder_channels=[8, 8, 8], latent_channels=4)
    ).eval()
    dynamics = Dynamics(
        DynamicsConfig(
            latent_channels=4,
            latent_height=4,
            latent_width=6,
            patch=2,
            action_width=width,
            width=32,
            layers=2,
            heads=2,
            window=window,
            recent=recent,
            stillness=0.01,
            local_width=8,
            local_blocks=1,
        )
    ).eval()
    heads = Heads(
        HeadsConfig(
            latent_size=96,
            action_width=width,
            width=16,
            reward_values=[-1.0, 0.0, 1.0],
            latent_shape=[4, 4, 6] if recent else [],
            nearby=4 if recent else 0,
        )
    ).eval()
    with torch.no_grad():
        if dynamics.local is not None:
            dynamics.local.persistence.change.copy_(torch.linspace(0.2, 0.7, 4))
            dynamics.local.leave.weight.normal_(std=0.1)
        for module in (dynamics.modulation, dynamics.output):  # these start at zero
            module.weight.normal_(std=0.1)
            module.bias.normal_(std=0.1)
    teacher = copy.deepcopy(dynamics) if distilled else None
    with torch.no_grad():
        if distilled:
            dynamics.output.weight.add_(0.05 * torch.randn_like(dynamics.output.weight))
        heads.output.weight.mul_(3)
        heads.output.bias[0] = hazard_bias
    contexts = [Context(torch.randn(3, 4, 4, 6), torch.zeros(3, width)) for _ in range(starts)]
    spec = WorldSpec(
        name="Tiny",
        frame_size=[32, 48],
        fps=35.0,
        action_space=action_space,
        source=SourceConfig(
            env_id="CartPole-v1",
            frames="render",
            size=[32, 48],
            action_names=["noop", "right", "left"],
            keys={"right": ["right", "d"], "left": ["left", "a"]},
        ),
        sampling=SamplingConfig(1, "consistency") if distilled else SamplingConfig(steps=2),
        teacher=SamplingConfig(3, "euler") if distilled else None,
    )
    made = {"made_by": "tests"}
    save_world(folder, spec, tokenizer, dynamics, heads, contexts, made, teacher)
    return folder


def noise_of(model: WorldModel, seed: tuple[int, int], frame: int) -> tuple[torch.Tensor, ...]:
    """A frame's first noise, its history noise, its uniform number, and its renoisings."""
    key, number = torch.tensor([mix(*seed)]), torch.tensor([[frame]])
    normal, uniform = model._noise(key, number, 1, model.sampling)
    return normal[0, 0, 0], normal[0, 0, 1], uniform[0, 0], normal[0, 0, 2:]
