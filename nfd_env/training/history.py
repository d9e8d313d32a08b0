"""How noisy the history is that a frame is trained to follow from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nfd_env import parts
from nfd_env.config import check_ranges, config_class
from nfd_env.flow.path import sample_levels

_LONGEST = 4  # drafted frames in a row


@config_class
class HistoryLevels:
    """Levels of the history copy of windows: almost clean, with runs of frames not yet drawn.

    When frames are drawn jointly (``nfd_env.inference.speculation``), a frame sees those just
    before it as noisy as it is itself. A run is 1 to 4 frames long, each length half as frequent as
    the one before. Its level is one for the whole row: 1, where a single step begins, in half of
    the rows, and a training level in the others.

    Attributes:
        max_level: the largest level of a finished frame, in [0, 1].
        skew: > 0; finished frames' levels are ``max_level`` times u^skew with u uniform in [0, 1]:
            1 is uniform, more spends more of the training on history that is nearly clean.
        draft_share: in [0, 1], the probability that a run begins at a frame; 0 for finished frames
            only.
    """

    max_level: float = 0.4
    skew: float = 1.0
    draft_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, max_level="[0, 1]", skew="(0, inf)", draft_share="[0, 1]")

    def sample(
        self, shape: tuple[int, ...], level_shift: float, device: torch.device | None = None
    ) -> Tensor:
        """Draw float32 levels of ``shape`` (rows, frames).

        Args:
            shape: (rows, frames).
            level_shift: of the training levels, see ``nfd_env.flow.path.sample_levels``.
            device: of the result.
        """
        levels = parts.rand(shape, device) ** self.skew * self.max_level
        if not self.draft_share:
            return levels
        drafted = parts.rand(shape, device) < self.draft_share
        goes_on = parts.rand(shape, device) < 0.5
        begun = drafted
        for _ in range(_LONGEST - 1):
            begun = functional.pad(begun[:, :-1], (1, 0)) & goes_on
            drafted = drafted | begun
        row = sample_levels((shape[0], 1), level_shift, device)
        row = row.masked_fill(parts.rand((shape[0], 1), device) < 0.5, 1.0)
        return torch.where(drafted, row, levels)
