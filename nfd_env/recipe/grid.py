"""How a frame becomes tokens: the grid of its latents, and sizes of frames that have one."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

_LATENTS = 1536  # numbers in a frame's latents that a small transformer can follow
_TOKENS = (12, 32)  # fewest and most tokens a frame


class PlanError(ValueError):
    """No training can be planned for this game and budget."""


@dataclass(frozen=True)
class Grid:
    """How a frame becomes tokens.

    Attributes:
        levels: of the tokenizer, each halving the frame.
        channels: of the latents.
        height: rows of latents.
        width: columns of latents.
        patch: latents a token along each side.
    """

    levels: int
    channels: int
    height: int
    width: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens a frame."""
        return (self.height // self.patch) * (self.width // self.patch)


def choose_grid(
    height: int,
    width: int,
    small: float,
    allowed: tuple[int, ...] = (2, 3, 4),
    patch: int = 0,
) -> Grid:
    """The grid of latents for frames of a size, in which things of side ``small`` are kept.

    A latent as large as several small things loses them, whatever the loss is: a third level lost
    Breakout's ball. Too many latents are more than a small transformer can follow.

    Args:
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        small: side in pixels of the smallest moving things; infinite for no such.
        allowed: levels to choose from.
        patch: latents a token along each side, where somebody has decided that: then there may be
            any number of tokens. 0 to choose it.

    Raises:
        PlanError: when no grid has from 12 to 32 tokens, or none has such a patch.
    """
    found = _grids(height, width, small, allowed, patch)
    if not found and patch:
        raise PlanError(
            f"frames of {height}x{width} cannot be cut into tokens of flow.model.patch {patch} at "
            f"{' or '.join(str(2**n) for n in allowed)} pixels a latent: set source.size, or leave "
            "the patch out"
        )
    if not found:
        raise PlanError(
            f"frames of {height}x{width} cannot be cut into {_TOKENS[0]} to {_TOKENS[1]} equal "
            f"tokens; set source.size to sides that 16 divides, here {fitting_size(height, width)}"
        )
    return min(found, key=lambda entry: entry[0])[1]


def _grids(
    height: int,
    width: int,
    small: float,
    allowed: tuple[int, ...] = (2, 3, 4),
    own: int = 0,
) -> list[tuple[float, Grid]]:
    """All grids with few enough tokens, or with one's own patch, and what speaks against each."""
    fewest, most = (1, sys.maxsize) if own else _TOKENS
    found = []
    for levels in allowed:
        if height % 2**levels or width % 2**levels:
            continue
        rows, columns = height >> levels, width >> levels
        channels = 16 if levels == 4 else 8
        cost = abs(math.log2(rows * columns * channels / _LATENTS))
        cost += 3 * max(0.0, levels - math.log2(max(4.0, small)))
        for patch in (own,) if own else (1, 2, 3, 4, 5, 6, 8):
            grid = Grid(levels, channels, rows, columns, patch)
            if rows % patch or columns % patch or not fewest <= grid.tokens <= most:
                continue
            found.append((cost + 0.1 * abs(math.log2(grid.tokens / 16)), grid))
    return found


def fitting_size(height: int, width: int, most: int = 96 * 128) -> list[int]:
    """The size that frames are brought to: sides that 16 divides, about the same aspect.

    Args:
        height: of the game's frame.
        width: of the game's frame.
        most: most pixels.
    """
    scale = min(1.0, math.sqrt(most / (height * width)))
    candidates = []
    for rows in range(48, 209, 16):
        for columns in range(48, 209, 16):
            if rows * columns > 1.1 * most:
                continue
            if not _grids(rows, columns, math.inf):
                continue
            aspect = abs(math.log(rows / columns) - math.log(height / width))
            area = abs(math.log(rows * columns / (height * width * scale**2)))
            candidates.append((2 * aspect + area, [rows, columns]))
    return min(candidates)[1]
