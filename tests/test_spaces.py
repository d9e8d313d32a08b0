from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from nfd_env.spaces import ActionCodec, CountedFromZero, space_from_dict, space_to_dict

DISCRETE = spaces.Discrete(3)
SHIFTED = spaces.Discrete(3, start=5)
MULTI_DISCRETE = spaces.MultiDiscrete([2, 3], start=[1, 0])
MULTI_BINARY = spaces.MultiBinary(4)
BOX = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
UNBOUNDED = spaces.Box(-np.inf, np.inf, (2,), np.float32)
DOUBLE = spaces.Box(-1, 1, (2,), np.float64)
NEGATIVE = spaces.Discrete(3, start=-2)
SMALL = spaces.MultiDiscrete([2, 200], dtype=np.uint8)
TENTHS = spaces.Box(np.array([-0.1, 0.1]), np.array([0.1, 0.7]), dtype=np.float64)
HALF = spaces.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, 2], np.float32))
LARGEST = spaces.Box(*(np.full(2, b, np.float32) for b in (-3.4028235e38, 3.4028235e38)))
BYTES = spaces.Box(0, 255, (2,), np.uint8)
SIGNED = spaces.Box(-128, 127, (2,), np.int8)
ALL = [
    *(DISCRETE, SHIFTED, NEGATIVE, MULTI_DISCRETE, SMALL, MULTI_BINARY),
    *(BOX, UNBOUNDED, DOUBLE, TENTHS, HALF, LARGEST, BYTES, SIGNED),
]


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


def test_an_entry_that_a_space_does_not_have() -> None:
    with pytest.raises(ValueError, match="a Discrete has no 'strat'; it may have dtype, n, start"):
        space_from_dict({"type": "Discrete", "n": 3, "strat": 1})
    with pytest.raises(ValueError, match="a MultiBinary has no 'dtype'"):
        space_from_dict({"type": "MultiBinary", "n": 3, "dtype": "int8"})


@pytest.mark.parametrize(
    ("space", "actions", "expected"),
    [
        (DISCRETE, [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (SHIFTED, [5, 7], [[1, 0, 0], [0, 0, 1]]),
        (MULTI_DISCRETE, [[1, 2], [2, 0]], [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]),
        (MULTI_BINARY, [[1, 0, 0, 1], [0, 0, 0, 0]], [[1, 0, 0, 1], [0, 0, 0, 0]]),
        (BOX, [[-1.0, 4.0], [0.5, 1.0]], [[-1, 1], [0.5, -0.5]]),
        (UNBOUNDED, [[-30.0, 4.0], [0.5, 1.0]], [[-30, 4], [0.5, 1]]),
        (NEGATIVE, [-2, 0], [[1, 0, 0], [0, 0, 1]]),
        (TENTHS, [[-0.1, 0.7], [0.1, 0.1]], [[-1, 1], [1, -1]]),
        (HALF, [[30.0, -4.0], [0.5, 2.0]], [[30, -4], [0.5, 2]]),
        (LARGEST, [[30.0, -4.0], [0.5, 2.0]], [[30, -4], [0.5, 2]]),
        (BYTES, [[0, 255], [51, 204]], [[-1, 1], [-0.6, 0.6]]),
        (SIGNED, [[-128, 127], [-77, 76]], [[-1, 1], [-0.6, 0.6]]),
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
    # As a recording stores them, and as a policy in float32 hands them out.
    assert torch.equal(codec.encode(torch.from_numpy(batch)), encoded)
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        assert torch.equal(codec.encode(codec.check(batch.astype(np.float32), 16)), encoded)
    for form in (batch.tolist(), torch.from_numpy(batch), list(batch)):
        assert torch.equal(codec.encode(codec.check(form, 16)), encoded)
    distinct = np.unique(batch, axis=0)
    assert len(torch.unique(encoded, dim=0)) == len(distinct)
    # A sequence is encoded like a batch, also where torch was told other defaults.
    checked = codec.check(batch, 16)
    assert torch.equal(codec.encode(checked.unflatten(0, (4, 4))).flatten(0, 1), encoded)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_checked_batch_is_independent_of_the_array_it_came_from(make: Any) -> None:
    array = make([0, 1, 2])
    checked = ActionCodec(DISCRETE).check(array, 3)
    array[:] = 2
    assert checked.tolist() == [0, 1, 2]


@pytest.mark.parametrize("space", ALL, ids=str)
def test_the_defaults_of_torch_do_not_matter(space: spaces.Space) -> None:
    space.seed(0)
    batch = np.stack([space.sample() for _ in range(4)])
    codec = ActionCodec(space)
    expected = codec.encode(codec.check(batch, 4))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        for each in (codec, ActionCodec(space)):
            assert torch.equal(each.encode(each.check(batch, 4)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


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
        (DISCRETE, torch.tensor([0.0, 1.0]), "integers, got float32"),
        (DISCRETE, torch.tensor([0.0, 1.0], dtype=torch.bfloat16), "integers"),
        (BOX, torch.tensor([[1j, 0], [0, 0]]).conj(), "complex"),
        (MULTI_DISCRETE, [[1.0, 0.0], [1.0, 0.0]], "integers"),
        (MULTI_BINARY, np.ones((2, 4)), "integers"),
        (DISCRETE, ["left", "right"], "array"),
        (DISCRETE, None, "array"),
        (DISCRETE, [[0], [0, 1]], "array"),
        (BOX, "up", "array"),
        (BOX, [[1j, 0], [0, 0]], "complex"),
        (BOX, [[True, False], [True, False]], "bool"),
        (DISCRETE, [True, False], "bool"),
        (DISCRETE, np.array([1, 2], object), "array"),
        (DISCRETE, [1, 2**70], "array"),
        (BYTES, [[0.5, 1.0], [2.0, 3.0]], "integers"),
        (SIGNED, [[-129, 0], [0, 0]], "got -129"),
        (BYTES, [[0, 256], [0, 0]], "got 256"),
        (NEGATIVE, [-3, 0], "got -3"),
        (NEGATIVE, [0, 1], "got 1"),
        (SMALL, [[0, 200], [0, 0]], "got 200"),
        (TENTHS, [[0.11, 0.1], [0.1, 0.1]], "got 0.11"),
        (HALF, [[-1.0, 0.0], [0.0, 0.0]], "got -1"),
        (spaces.Box(-np.inf, np.inf, (1,), np.float64), [[1e300], [0.0]], "finite"),
        (MULTI_BINARY, np.full((2, 4), -1, np.int8), "got -1"),
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


class Awkward:
    """What cannot be made into an array, and says so in its own way."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no")


def test_an_object_that_will_not_be_an_array() -> None:
    with pytest.raises(ValueError, match="array of numbers .* got Awkward"):
        ActionCodec(DISCRETE).check(Awkward(), 1)


def test_a_multi_binary_action_may_be_bools() -> None:
    codec = ActionCodec(MULTI_BINARY)
    assert codec.check([[True, False, True, False]], 1).tolist() == [[1, 0, 1, 0]]


JUNK = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.lists(st.one_of(st.integers(-300, 300), st.floats(), st.none(), st.booleans()), max_size=4),
    arrays(
        st.one_of(scalar_dtypes(), st.just(np.dtype(object))),
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
)


@pytest.mark.parametrize("space", ALL, ids=str)
@given(actions=st.one_of(JUNK, st.lists(JUNK, min_size=2, max_size=2)))
def test_anything_is_taken_whole_or_refused(space: spaces.Space, actions: Any) -> None:
    codec = ActionCodec(space)
    try:
        checked = codec.check(actions, 2)
    except ValueError as error:
        assert str(error).startswith("actions ")
        return
    stored = torch.float32 if isinstance(space, spaces.Box) else torch.int64
    assert checked.shape == (2, *codec.shape) and checked.dtype == stored
    for row, given_row in zip(checked.numpy(), np.asarray(actions), strict=True):
        assert space.contains(row.astype(space.dtype))
        assert np.array_equal(row, np.asarray(given_row).astype(row.dtype))
    encoded = codec.encode(checked)
    assert encoded.shape == (2, codec.width) and torch.isfinite(encoded).all()


def test_what_is_too_large_for_64_bits_does_not_turn_round() -> None:
    largest = np.array([2**64 - 1], np.uint64)  # -1 as it is stored
    for given_row in (largest, torch.from_numpy(largest)):
        with pytest.raises(ValueError, match="must lie in .* got 18446744073709551615"):
            ActionCodec(NEGATIVE).check(given_row, 1)
    boundless = spaces.Box(-np.inf, np.inf, (1,))
    assert ActionCodec(boundless).check(largest[None], 1).item() == 2.0**64


@pytest.mark.parametrize("space", ALL, ids=str)
def test_counted_from_zero(space: spaces.Space) -> None:
    counted = CountedFromZero(space)
    assert not np.any(getattr(counted.space, "start", 0))
    counted.space.seed(0)
    codec = ActionCodec(space)
    for _ in range(8):
        action = counted.space.sample()
        inside = counted.to_env(action)
        checked = codec.check(inside[None], 1)
        tensor = counted.to_env(torch.as_tensor(action))
        assert torch.equal(codec.check(tensor[None], 1), checked)
        again = counted.from_env(inside)
        assert again.dtype == counted.space.dtype
        assert np.allclose(again, action, rtol=0, atol=0.5 if space.dtype.kind in "iu" else 0)
        # As floats, the way Stable-Baselines3 has its MultiBinary and Box actions.
        assert np.array_equal(counted.to_env(np.asarray(action, np.float32)), inside) or (
            space.dtype == np.float64
        )


def test_counted_from_zero_hides_no_nonsense() -> None:
    for space, action in ((BYTES, [np.nan, 0]), (BYTES, [300.0, 0]), (SHIFTED, 0.5)):
        inside = CountedFromZero(space).to_env(np.array(action, np.float32))
        with pytest.raises(ValueError, match="actions"):
            ActionCodec(space).check(inside[None], 1)
