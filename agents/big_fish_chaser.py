"""A behaviour policy for Procgen's BigFish that sees what a player sees: the picture.

It looks for the green fish, swims after smaller ones and out of the way of larger ones. It is there
to record play that lives long enough to grow, not to play well.
"""

from __future__ import annotations

import cv2
import gymnasium
import numpy as np

# Of the first nine Procgen actions: x and y of the move, up is positive.
_MOVES = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
_STILL = 4
_OWN = (39, 174, 96)
_OTHERS = ((231, 76, 60), (255, 152, 0), (224, 152, 232))
# Sums of the channels' differences that still count. The wider one takes some of the background for
# prey, which makes it roam: it lives twice as long as with 60.
_OWN_COLOUR, _OTHER_COLOUR = 60, 70
_STEP = 6.0  # pixels that a move leads to, seen ahead
_EDIBLE = 0.9  # width of a fish that can be eaten, relative to one's own


class Chaser:
    """See ``nfd_env.data.policies.BehaviourPolicy``; for 64 x 64 frames and nine actions."""

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """Begin an episode."""
        self._rng = rng

    def act(self, observation: np.ndarray) -> int:
        """The move after which prey is nearest and danger is far."""
        frame = observation.astype(np.int16)
        own = _fish(_like(frame, _OWN, _OWN_COLOUR))
        if not len(own):
            return _STILL
        x, y, width, _ = own[own[:, 3].argmax()]
        others = np.zeros(frame.shape[:2], bool)
        for colour in _OTHERS:
            others |= _like(frame, colour, _OTHER_COLOUR)
        fish = _fish(others)
        ahead = np.array([x, y]) + _STEP * _MOVES * (1, -1)
        worth = 1e-3 * self._rng.random(len(_MOVES))
        if len(fish):
            distance = np.linalg.norm(fish[None, :, :2] - ahead[:, None], axis=-1)
            prey = fish[:, 2] < _EDIBLE * width
            worth += (prey / (distance + 3)).sum(1)
            gap = distance - (fish[:, 2] + width) / 2
            worth -= (~prey * (gap < 8) * 60 / np.maximum(1, gap + 2) ** 2).sum(1)
        worth -= 0.02 * (np.abs(ahead - 32) > 28).sum(1)  # what comes in there is seen late
        return int(worth.argmax())


def _like(frame: np.ndarray, colour: tuple[int, int, int], most: int) -> np.ndarray:
    """Pixels of about that colour, bool (H, W)."""
    return np.abs(frame - np.array(colour, np.int16)).sum(-1) < most


def _fish(pixels: np.ndarray) -> np.ndarray:
    """Centre x, centre y, width and area of each piece of more than one pixel, (n, 4)."""
    _, _, stats, centres = cv2.connectedComponentsWithStats(pixels.astype(np.uint8), connectivity=8)
    sizes = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_AREA]]
    found = np.column_stack((centres, sizes))[1:]
    return found[found[:, 3] > 1]
