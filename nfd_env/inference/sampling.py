"""How a world's frames are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nfd_env.config import check_ranges, config_class
from nfd_env.flow.solvers import (
    Velocity,
    level_grid,
    sample_consistency,
    sample_dpm_solver_pp,
    sample_euler,
)

SAMPLERS = {"euler": sample_euler, "dpm_solver_pp": sample_dpm_solver_pp}
CONSISTENCY = "consistency"

Sampler = Callable[[Velocity, Tensor], Tensor]
"""Turns (velocity, noise (B, n, C, h, w)) into data of the same shape."""


@config_class
class SamplingConfig:
    """How a world's frames are drawn.

    Attributes:
        steps: denoising steps a frame, each one transformer pass.
        sampler: "euler" or "dpm_solver_pp"; "consistency" for distilled dynamics, whose frames hold
            from 1 step on.
        shift: > 1 spends more of the steps near the noise, see ``level_grid``.
        history_level: noise level in [0, 1) at which finished frames are remembered; more makes a
            world less certain of its past.
        temperature: > 0, scale of the noise that frames are drawn from; above 1 makes a world less
            predictable (Ha and Schmidhuber 2018).
    """

    steps: int = 4
    sampler: str = "dpm_solver_pp"
    shift: float = 1.0
    history_level: float = 0.15
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, "sampling_", steps="[1, inf)")
        # Beyond these bounds numbers overflow, or all levels are one.
        check_ranges(self, history_level="[0, 1)", temperature="(0, 100]", shift="[0.001, 1000]")
        known = (*SAMPLERS, CONSISTENCY)
        if self.sampler not in known:
            raise ValueError(f"sampler must be one of {', '.join(known)}, got {self.sampler!r}")

    @property
    def renoisings(self) -> int:
        """Noises that a frame needs beyond its first."""
        return self.steps - 1 if self.sampler == CONSISTENCY else 0

    def sample(self, velocity: Velocity, noise: Tensor, renoise: Sequence[Tensor] = ()) -> Tensor:
        """Data (B, n, C, h, w) from ``noise`` of that shape.

        Args:
            velocity: the network.
            noise: that the data is drawn from.
            renoise: ``renoisings`` further noises, each shaped like the first.
        """
        levels = level_grid(self.steps, self.shift)
        if self.sampler == CONSISTENCY:
            return sample_consistency(velocity, noise, levels, renoise)
        return SAMPLERS[self.sampler](velocity, noise, levels)
