"""The validation part of distillation: few-step samples of the student, and its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nfd_env.flow.path import interpolate
from nfd_env.flow.solvers import Velocity, level_grid, sample_consistency, sample_dpm_solver_pp
from nfd_env.inference.sampling import Sampler
from nfd_env.metrics import frechet_distance
from nfd_env.models.dynamics import Dynamics
from nfd_env.training.latent_stage import CONTEXT

_DIMENSIONS = 64  # principal components of frames that distances are told in
_LAST = 8  # frames that a long rollout's end is judged by
STEPS = (1, 2, 4)
"""Numbers of sampling steps that a student is validated with."""


def few_steps(steps: int, shift: float, device: torch.device) -> Sampler:
    """A student's sampler with ``steps`` levels, see ``level_grid``; the same noise every time."""
    levels = level_grid(steps, shift)
    generator = torch.Generator(device).manual_seed(1)

    def sample(velocity: Velocity, noise: Tensor) -> Tensor:
        further = [
            torch.randn(noise.shape, generator=generator, device=device) for _ in range(steps - 1)
        ]
        return sample_consistency(velocity, noise, levels, further)

    return sample


def many_steps(steps: int) -> Sampler:
    """A teacher's sampler."""
    return lambda velocity, noise: sample_dpm_solver_pp(velocity, noise, level_grid(steps))


@torch.inference_mode()
def follow(
    network: Dynamics, sampler: Sampler, latents: Tensor, actions: Tensor, history_level: float
) -> tuple[Tensor, Tensor]:
    """Real frames of windows, and frames drawn after real history: two tensors (B, n, C, h, w)."""
    generator = torch.Generator(latents.device).manual_seed(2)
    fresh, noise = torch.randn((2, *latents.shape), generator=generator, device=latents.device)
    level = latents.new_full(latents.shape[:2], history_level)
    history = interpolate(latents, fresh, level).x

    def velocity(x: Tensor, now: float) -> Tensor:
        return network.forward_two_copies(history, level, x, torch.full_like(level, now), actions)

    # Not the first frames, which have hardly any history.
    known = min(CONTEXT, latents.shape[1] - 1)
    return latents[:, known:], sampler(velocity, noise)[:, known:]


def frechet(real: Tensor, made: Tensor) -> float:
    """Fréchet distance of latent frames (B, T, C, h, w)."""
    first, second = (x.flatten(2).flatten(0, 1).cpu() for x in (real, made))
    # A Gaussian in as many dimensions as there are samples is none.
    return frechet_distance(first, second, min(_DIMENSIONS, len(first) // 2))


def texture(real: Tensor, made: Tensor) -> float:
    """Fréchet distance of the 2 x 2 patches of latent frames (B, T, C, h, w)."""
    return frechet_distance(_patches(real), _patches(made))


def energy(real: Tensor, made: Tensor) -> float:
    """Mean square of the last latent frames (B, T, C, h, w), generated over real."""
    first, second = (x[:, -_LAST:].square().mean() for x in (real, made))
    return float(second / first)


def _patches(latents: Tensor) -> Tensor:
    """(B, T, C, h, w) -> every 2 x 2 patch, (n, 4 C)."""
    return functional.unfold(latents.flatten(0, 1), 2, stride=2).mT.flatten(0, 1).cpu()
