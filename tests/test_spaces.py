from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces

from nfd_env.spaces import ActionCodec, space_from_dict, space_to_dict

DISCRETE = spaces.Discrete(3)
SHIFTED = spaces.Discrete(3, start=5)
MULTI_DISCRETE = spaces.MultiDiscrete([2, 3], start=[1, 0])
MULTI_BINARY = spaces.MultiBinary(4)
BOX = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
UNBOUNDED = spaces.Box(-np.inf, np.inf, (2,), np.float32)
DOUBLE = spaces.Box(-1, 1, (2,), np.float64)
ALL = [DISCRETE, SHIFTED, MULTI_DISCRETE, MULTI_BINARY, BOX, UNBOUNDED, DOUBLE]


@pytest.mark.parametrize("space", ALL, ids=str)
def test_round_trip_through_yaml(space: spaces.Space) -> None:
    text = yaml.safe_dump(space_to_dict(space))
    assert space_from_dict(yaml.safe_load(text)) == space


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Dict({"a": DISCRETE}),
        spaces.Box(0, 1, (2, 2)),
        spaces.MultiBinary([2, 2]),
        spaces.MultiDiscrete([[2, 2]]),
    ],
    ids=str,
)
def test_other_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="action space must be"):
        ActionCodec(space)


def test_unknown_type() -> None:
    with pytest.raises(ValueError, match="Tuple"):
        space_from_dict({"type": "Tuple"})


@pytest.mark.parametrize(
    ("space", "actions", "expected"),
    [
        (DISCRETE, [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (SHIFTED, [5, 7], [[1, 0, 0], [0, 0, 1]]),
        (MULTI_DISCRETE, [[1, 2], [2, 0]], [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]),
        (MULTI_BINARY, [[1, 0, 0, 1], [0, 0, 0, 0]], [[1, 0, 0, 1], [0, 0, 0, 0]]),
        (BOX, [[-1.0, 4.0], [0.5, 1.0]], [[-1, 1], [0.5, -0.5]]),
        (UNBOUNDED, [[-30.0, 4.0], [0.5, 1.0]], [[-30, 4], [0.5, 1]]),
    ],
    ids=str,
)
def test_encode(space: spaces.Space, actions: Any, expected: Any) -> None:
    codec = ActionCodec(space)
    encoded = codec.encode(codec.check(actions, 2))
    assert encoded.dtype == torch.float32
    assert encoded.shape == (2, codec.width)
    torch.testing.assert_close(encoded, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("space", ALL, ids=str)
def test_samples_are_accepted_in_every_form_and_encoded_without_loss(space: spaces.Space) -> None:
    space.seed(0)
    codec = ActionCodec(space)
    batch = np.stack([space.sample() for _ in range(16)])
    encoded = codec.encode(codec.check(batch, 16))
    for form in (batch.tolist(), torch.from_numpy(batch), list(batch)):
        assert torch.equal(codec.encode(codec.check(form, 16)), encoded)
    distinct = np.unique(batch, axis=0)
    assert len(torch.unique(encoded, dim=0)) == len(distinct)
    # A sequence is encoded like a batch.
    checked = codec.check(batch, 16)
    assert torch.equal(codec.encode(checked.unflatten(0, (4, 4))).flatten(0, 1), encoded)


def test_a_checked_batch_is_independent_of_the_array_it_came_from() -> None:
    array = np.array([0, 1, 2])
    checked = ActionCodec(DISCRETE).check(array, 3)
    array[:] = 2
    assert checked.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        # shape
        (DISCRETE, [0], "shape"),
        (DISCRETE, [[0], [1]], "shape"),
        (DISCRETE, 1, "shape"),
        (MULTI_DISCRETE, [1, 0], "shape"),
        (MULTI_DISCRETE, [[1, 0, 0], [1, 0, 0]], "shape"),
        (MULTI_BINARY, [[1, 0], [0, 1]], "shape"),
        (BOX, [[0.0], [1.0]], "shape"),
        # type
        (DISCRETE, [0.0, 1.0], "integers"),
        (DISCRETE, torch.tensor([0.0, 1.0]), "integers"),
        (MULTI_DISCRETE, [[1.0, 0.0], [1.0, 0.0]], "integers"),
        (MULTI_BINARY, np.ones((2, 4)), "integers"),
        (DISCRETE, ["left", "right"], "array"),
        (DISCRETE, None, "array"),
        (DISCRETE, [[0], [0, 1]], "array"),
        (BOX, "up", "array"),
        # value
        (DISCRETE, [0, 3], "got 3"),
        (DISCRETE, [-1, 0], "got -1"),
        (SHIFTED, [4, 5], "got 4"),
        (SHIFTED, [5, 8], "got 8"),
        (MULTI_DISCRETE, [[0, 0], [1, 0]], "got 0"),
        (MULTI_DISCRETE, [[1, 0], [1, 3]], "got 3"),
        (MULTI_BINARY, [[0, 0, 0, 2], [0, 0, 0, 0]], "got 2"),
        (BOX, [[0.0, 4.5], [0.0, 0.0]], "got 4.5"),
        (BOX, [[-1.5, 0.0], [0.0, 0.0]], "got -1.5"),
        (BOX, [[np.nan, 0.0], [0.0, 0.0]], "finite"),
        (UNBOUNDED, [[np.nan, 0.0], [0.0, 0.0]], "finite"),
        (UNBOUNDED, [[np.inf, 0.0], [0.0, 0.0]], "finite"),
    ],
)
def test_wrong_actions(space: spaces.Space, actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionCodec(space).check(actions, 2)
