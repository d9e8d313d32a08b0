"""What the pictures of ``nfd demo`` say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.evaluation import demo

AXES = spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("action", "space", "names", "expected"),
    [
        (1, spaces.Discrete(2), ["l", "r"], "r"),
        (np.int64(-1), spaces.Discrete(2, start=-1), ["l", "r"], "l"),
        (6, spaces.Discrete(2, start=5), ["l", "r"], "r"),
        (2, spaces.Discrete(3), ["l", "r"], "2"),  # not all of them have a name
        (1, spaces.Discrete(2), [], "1"),
        (np.array([0.25, -1], np.float32), AXES, ["left", "right"], "[ 0.2 -1. ]"),
    ],
)
def test_an_action_is_called_by_its_name(
    action: Any, space: spaces.Space, names: list[str], expected: str
) -> None:
    assert demo._name(action, space, names) == expected
