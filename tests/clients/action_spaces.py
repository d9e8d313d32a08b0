"""One action space of every kind that a world can have, for the tests of what acts in one."""

from __future__ import annotations

import math
from typing import Any

ACTION_SPACES: dict[str, dict[str, Any]] = {
    "discrete": {"type": "Discrete", "n": 3, "start": 0},
    "discrete-from-4": {"type": "Discrete", "n": 3, "start": 4},
    "discrete-from-minus-2": {"type": "Discrete", "n": 3, "start": -2},
    "multi-discrete": {"type": "MultiDiscrete", "nvec": [3, 2], "start": [0, 0]},
    "multi-discrete-shifted": {"type": "MultiDiscrete", "nvec": [3, 2], "start": [5, -1]},
    "multi-binary": {"type": "MultiBinary", "n": 4},
    "box": {"type": "Box", "low": [-1.0, 0.0], "high": [1.0, 4.0]},
    "box-float64": {"type": "Box", "low": [-0.1, 0.1], "high": [0.1, 0.7], "dtype": "float64"},
    "box-uint8": {"type": "Box", "low": [0, 0], "high": [255, 255], "dtype": "uint8"},
    "box-infinite": {"type": "Box", "low": [-math.inf] * 2, "high": [math.inf] * 2},
    "box-half-infinite": {"type": "Box", "low": [0.0, -math.inf], "high": [math.inf, 2.0]},
}
FINITE = [name for name in ACTION_SPACES if not name.endswith("infinite")]
