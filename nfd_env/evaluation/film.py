"""Films of what was measured: pictures with a word above them, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nfd_env.video import caption, enlarge

_HEIGHT, _GAP = 192, 8  # pixels of a panel, and between two


def beside(panels: Sequence[tuple[np.ndarray, str]], aspect: float = 0.0) -> np.ndarray:
    """One picture of even size, uint8 (H, W, 3), of several frames with their captions.

    Args:
        panels: (frame, uint8 (h, w, 3), and text), from left to right.
        aspect: width / height at which a person should see a frame; 0 for square pixels.
    """
    shown = [caption(enlarge(frame, _HEIGHT, aspect), text) for frame, text in panels]
    gap = np.full((shown[0].shape[0], _GAP, 3), 255, np.uint8)
    joined = np.concatenate([part for one in shown for part in (one, gap)][:-1], 1)
    return joined[: joined.shape[0] // 2 * 2, : joined.shape[1] // 2 * 2]
