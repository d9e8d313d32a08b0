"""How noisy the history is that a frame is trained to follow from."""

from __future__ import annotations

import torch
from torch import Tensor

from nfd_env.flow.path import sample_levels

_LONGEST = 4  # drafted frames in a row


def sample_history_levels(
    shape: tuple[int, ...],
    max_level: float,
    skew: float,
    draft_share: float,
    level_shift: float,
    device: torch.device | None = None,
) -> Tensor:
    """Levels of the history copy of windows: almost clean, with runs of frames not yet drawn.

    When frames are drawn jointly (``nfd_env.speculation``), a frame sees those just before it as
    noisy as it is itself. A run begins at a frame with probability ``draft_share`` and is 1 to 4
    frames long, each length half as frequent as the one before. Its level is one for the whole row:
    1, where a single step begins, in half of the rows, and a training level in the others.

    Args:
        shape: (rows, frames).
        max_level: the largest level of a finished frame.
        skew: finished frames' levels are ``max_level`` times u^skew with u uniform in [0, 1]: 1 is
            uniform, more spends more of the training on history that is nearly clean.
        draft_share: in [0, 1]; 0 for finished frames only.
        level_shift: of the training levels, see ``nfd_env.flow.path.sample_levels``.
        device: of the result.

    Returns:
        float32 (rows, frames).
    """
    levels = torch.rand(shape, device=device) ** skew * max_level
    if not draft_share:
        return levels
    drafted = torch.rand(shape, device=device) < draft_share
    goes_on = torch.rand(shape, device=device) < 0.5
    begun = drafted
    for _ in range(_LONGEST - 1):
        begun = torch.nn.functional.pad(begun[:, :-1], (1, 0)) & goes_on
        drafted = drafted | begun
    row = sample_levels((shape[0], 1), level_shift, device)
    row = torch.where(torch.rand((shape[0], 1), device=device) < 0.5, torch.ones_like(row), row)
    return torch.where(drafted, row, levels)
