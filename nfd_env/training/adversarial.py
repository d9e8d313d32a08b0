"""The adversarial part of distillation: a judge of samples, in the frozen teacher's features."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env import parts
from nfd_env.config import check_ranges, config_class
from nfd_env.flow.path import interpolate, sample_levels
from nfd_env.flow.trigflow import LevelVelocity
from nfd_env.models.dynamics import Dynamics


@config_class
class AdversarialConfig:
    """The adversarial term of arXiv 2506.01380: a hinge loss in the frozen teacher's features.

    Attributes:
        weight: of the student's part; 0 switches the term off.
        start: steps before it sets in; a judge of early, soft samples learns nothing of use.
        layers: the teacher's blocks whose outputs are judged.
        width: hidden width of the judging heads.
    """

    weight: float = 0.0
    start: int = 0
    layers: list[int] = field(default_factory=lambda: [3, 5, 7])
    width: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, "adversarial.", weight="[0, inf)", start="[0, inf)", width="[1, inf)")
        if self.weight and not self.layers:
            raise ValueError("the adversarial term needs at least one layer")


class Judge(nn.Module):
    """One small head a feature map; each token gets a score, high for real frames."""

    def __init__(self, maps: int, width: int, hidden: int) -> None:
        """Build for ``maps`` maps of tokens of ``width`` channels."""
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(width, eps=1e-6, elementwise_affine=False),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1),
            )
            for _ in range(maps)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """``maps`` tensors (B, T, P, width) -> scores (maps, B, T, P)."""
        pairs = zip(self.heads, features, strict=True)
        return torch.stack([head(x)[..., 0] for head, x in pairs]).float()


class TeacherFeatures:
    """The outputs of some of a teacher's blocks."""

    def __init__(self, teacher: Dynamics, layers: list[int]) -> None:
        """Listen to the blocks ``layers`` of ``teacher``.

        Raises:
            ValueError: when there are no such blocks.
        """
        count = teacher.config.layers
        if not all(0 <= layer < count for layer in layers):
            raise ValueError(f"adversarial layers must be from 0 to {count - 1}, got {layers}")
        self._kept: list[Tensor] | None = None
        for layer in sorted(set(layers)):
            teacher.blocks[layer].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        if self._kept is not None:
            self._kept.append(output)

    def __call__(self, teacher: LevelVelocity, x: Tensor, levels: Tensor) -> list[Tensor]:
        """The features (B, T - 1, P, width) of noisy frames (B, T, C, h, w) that follow history.

        Args:
            teacher: the velocity given history, of [history | noisy] copies.
            x: noisy frames.
            levels: theirs, (B, T).
        """
        kept = self._kept = []
        teacher(x, levels)
        self._kept = None  # or it would keep the graph alive
        # Of [history | noisy] only the noisy half, without the frame that has no history.
        return [each[:, 1 - x.shape[1] :] for each in kept]


def hinge(
    judge: Judge, features: TeacherFeatures, teacher: LevelVelocity, real: Tensor, made: Tensor
) -> tuple[Tensor, Tensor]:
    """The student's loss, which leaves the judge alone, and the judge's, vice versa.

    Args:
        judge: of features.
        features: of the teacher.
        teacher: the velocity given history.
        real: frames (B, T, C, h, w).
        made: the student's, with its gradient.
    """
    levels = sample_levels(real.shape[:2], 1.0, real.device)
    with torch.no_grad():
        noisy = interpolate(real, parts.randn_like(real), levels).x
        of_real = features(teacher, noisy, levels)
    noisy = interpolate(made, parts.randn_like(made), levels).x
    of_made = features(teacher, noisy, levels)
    frozen = {name: p.detach() for name, p in judge.named_parameters()}
    scores = torch.func.functional_call(judge, frozen, (of_made,))
    judging = functional.relu(1 - judge(of_real)).mean()
    judging = judging + functional.relu(1 + judge([x.detach() for x in of_made])).mean()
    return -scores.mean(), judging
