"""Small networks with all their outputs away from zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nfd_env.models.dynamics import Dynamics, DynamicsConfig

WINDOW = 4


def small_dynamics(**kwargs: Any) -> Dynamics:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "latent_channels": 2,
        "latent_height": 4,
        "latent_width": 6,
        "patch": 2,
        "action_width": 3,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "window": WINDOW,
        "local_width": 8,
        "local_blocks": 2,
        **kwargs,
    }
    network = Dynamics(DynamicsConfig(**values)).eval()
    with torch.no_grad():
        for module in (network.modulation, network.output):
            module.weight.normal_(std=0.3)
            module.bias.normal_(std=0.3)
        if network.local is not None:
            network.local.persistence.change.copy_(torch.linspace(0.2, 0.9, 2))
            for block in network.local.blocks:
                block.film.weight.normal_(std=0.3)
                block.second.weight.normal_(std=0.1)
            network.local.leave.weight.normal_(std=0.1)
    return network.requires_grad_(False)


def random_frames(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, levels and actions for ``small_dynamics``."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, count, 2, 4, 6, generator=generator),
        torch.rand(batch, count, generator=generator),
        torch.randn(batch, count, 3, generator=generator),
    )
