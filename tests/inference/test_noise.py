"""Numbers that are functions of a key."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nfd_env.inference.noise import generated, hashed, mix


def test_mix() -> None:
    triples = list(itertools.product(range(12), repeat=3))
    hashes = {mix(*t) for t in triples}
    assert len(hashes) == len(triples)
    assert all(0 <= h < 2**63 for h in hashes)
    assert mix(1, 2) != mix(2, 1)
    assert mix(2**80 + 1) >= 0
    # Neighbouring seeds give unrelated numbers: about half of the bits differ.
    distances = [(mix(0, 0, i) ^ mix(0, 0, i + 1)).bit_count() for i in range(200)]
    assert 28 < sum(distances) / 200 < 35


def from_generator(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return generated(keys, count, 0, torch.Generator())


SOURCES = pytest.mark.parametrize("source", [from_generator, hashed])


def some_keys(count: int) -> Tensor:
    return torch.tensor([mix(3, 1, frame) for frame in range(count)])


@SOURCES
def test_a_row_depends_on_its_key_alone(source) -> None:
    keys = some_keys(50)
    normal, uniform = source(keys, 21)
    assert normal.shape == (50, 21) and uniform.shape == (50,)
    torch.manual_seed(99)
    for row in (0, 7, 49):
        one, end = source(keys[row : row + 1], 21)
        torch.testing.assert_close(one[0], normal[row], rtol=1e-6, atol=1e-6)
        assert end[0] == uniform[row]


def test_more_numbers_leave_the_first_ones_alone() -> None:
    keys = some_keys(10)
    for few, many in (
        (hashed(keys, 20), hashed(keys, 64)),
        (from_generator(keys, 20), generated(keys, 20, 44, torch.Generator())),
    ):
        torch.testing.assert_close(few[0], many[0][:, :20], rtol=1e-6, atol=1e-6)
        assert torch.equal(few[1], many[1])


@SOURCES
def test_distributions(source) -> None:
    normal, uniform = source(some_keys(4000), 256)
    sigma = normal.numel() ** -0.5
    assert abs(normal.mean()) < 4 * sigma and abs(normal.var() - 1) < 4 * 2**0.5 * sigma
    for bound in (-3.0, -2.0, -1.0, 0.5, 1.5, 2.5, 3.5):
        share = float((normal < bound).double().mean())
        expected = float(torch.special.ndtr(torch.tensor(bound, dtype=torch.float64)))
        assert abs(share - expected) < 4 * (expected * (1 - expected)) ** 0.5 * sigma
    # Neither neighbouring numbers (of one pair, or of two) nor those of neighbouring keys agree.
    for a, b in (
        (normal[:, ::2], normal[:, 1::2]),
        (normal[:, 1:-1:2], normal[:, 2::2]),
        (normal[:-1], normal[1:]),
        (normal[:, :1], 3**0.5 * (2 * uniform[:, None] - 1)),
    ):
        for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
            assert abs((x * y).mean()) < 4 * float(x.std() * y.std()) * x.numel() ** -0.5
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    counts = torch.histc(uniform, 16, 0, 1)
    assert ((counts - 250).square() / 250).sum() < 40  # chi-squared, 15 degrees of freedom


def test_the_hash_is_splitmix64() -> None:
    """Against its definition in Python's integers."""
    key, bits = mix(5, 6, 7), 2**64 - 1
    state = (key + 0x9E3779B97F4A7C15) & bits
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & bits
    state = (state ^ state >> 27) * 0x94D049BB133111EB & bits
    state ^= state >> 31
    assert float(hashed(torch.tensor([key]), 2)[1]) == (state >> 40) / 2**24
