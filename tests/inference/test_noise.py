"""Numbers that are functions of a key."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nfd_env.inference.noise import fitting_seed, mix, noise

FRAMES = torch.arange(10_000)


def test_mix() -> None:
    triples = list(itertools.product(range(12), repeat=3))
    hashes = {mix(*t) for t in triples}
    assert len(hashes) == len(triples)
    assert all(0 <= h < 2**63 for h in hashes)
    assert mix(1, 2) != mix(2, 1) != mix(12)
    # Neighbouring seeds give unrelated numbers: about half of the bits differ.
    distances = [(mix(0, 0, i) ^ mix(0, 0, i + 1)).bit_count() for i in range(200)]
    assert 28 < sum(distances) / 200 < 35


def test_seeds_for_who_takes_fewer_bits() -> None:
    assert [fitting_seed(seed, 32) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    large = [2**32 + 7, 2**33 + 7, 2**64 + 7, 2**200]
    assert len({fitting_seed(seed, 32) for seed in [7, *large]}) == 5
    assert all(0 <= fitting_seed(seed, 32) < 2**32 for seed in large)


@pytest.mark.parametrize("power", [63, 64, 65, 128, 1000])
def test_all_bits_of_a_seed_count(power: int) -> None:
    seeds = [5, 5 + 2**power, 5 + 2 ** (power + 1), 5 + 3 * 2**power, -5]
    assert len({mix(seed, 0) for seed in seeds}) == len(seeds)


def some(count: int, numbers: int = 21, key: int = mix(3, 1)) -> tuple[Tensor, Tensor]:
    return noise(torch.full((count,), key), FRAMES[:count], numbers)


def test_a_row_depends_on_its_key_and_frame_alone() -> None:
    normal, uniform = some(50)
    assert normal.shape == (50, 21) and uniform.shape == (50,)
    assert normal.dtype == uniform.dtype == torch.float32
    torch.manual_seed(99)
    for row in (0, 7, 49):
        one, end = noise(torch.tensor([mix(3, 1)]), FRAMES[row : row + 1], 21)
        assert torch.equal(one[0], normal[row]) and end[0] == uniform[row]


def test_more_numbers_leave_the_first_ones_alone() -> None:
    few, many = some(10, 21), some(10, 64)
    assert torch.equal(few[0], many[0][:, :21]) and torch.equal(few[1], many[1])


def check_distributions(normal: Tensor, uniform: Tensor) -> None:
    sigma = normal.numel() ** -0.5
    assert abs(normal.mean()) < 4 * sigma and abs(normal.var() - 1) < 4 * 2**0.5 * sigma
    for bound in (-3.0, -2.0, -1.0, 0.5, 1.5, 2.5, 3.5):
        share = float((normal < bound).double().mean())
        expected = float(torch.special.ndtr(torch.tensor(bound, dtype=torch.float64)))
        assert abs(share - expected) < 4 * (expected * (1 - expected)) ** 0.5 * sigma
    # Neither neighbouring numbers (of one pair, or of two) nor those of neighbouring rows agree.
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


def test_distributions_along_an_episode() -> None:
    check_distributions(*some(4000, 256))


def test_distributions_over_seeds_and_episodes() -> None:
    keys = torch.tensor([mix(seed, episode) for seed in range(400) for episode in range(10)])
    check_distributions(*noise(keys, torch.full_like(keys, 3), 256))


def by_hand(key: int, frame: int, pairs: int) -> tuple[list[float], float]:
    """The definition, in Python's integers and floats."""
    everything = 2**64 - 1

    def bits(counter: int) -> int:
        state = (key + counter * 0x9E3779B97F4A7C15) & everything
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & everything
        state = (state ^ state >> 27) * 0x94D049BB133111EB & everything
        return state ^ state >> 31

    first = frame << 20
    normal: list[float] = []
    for pair in range(pairs):
        made = bits(first + 2 + pair)
        radius = math.sqrt(-2 * math.log(((made >> 32) + 1) / 2**32))
        angle = 2 * math.pi * (made & 0xFFFFFFFF) / 2**32
        normal += [radius * math.cos(angle), radius * math.sin(angle)]
    return normal, (bits(first + 1) >> 40) / 2**24


@pytest.mark.parametrize("frame", [0, 1, 12345, 2**31])
def test_the_numbers_are_what_is_said(frame: int) -> None:
    """The same on every device, whatever its mathematics: none is off by one rounding."""
    key = mix(5, 6)
    normal, uniform = noise(torch.tensor([key]), torch.tensor([frame]), 1536)
    expected, end = by_hand(key, frame, 768)
    assert torch.equal(normal[0], torch.tensor(expected, dtype=torch.float64).float())
    assert float(uniform) == end


class OnMetal(Tensor):
    """Integers that say that they are on a device without float64."""

    device = torch.device("mps")  # type: ignore[assignment]

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_metal_gets_the_same_numbers_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = some(20)
    moved, to = [], Tensor.to

    def stay(x: Tensor, *where: object) -> Tensor:
        if where != (torch.device("mps"),):
            return to(x, *where)
        moved.append(x.dtype)
        return x

    monkeypatch.setattr(Tensor, "to", stay)
    keys = torch.full((20,), mix(3, 1)).as_subclass(OnMetal)
    made = noise(keys, FRAMES[:20].as_subclass(OnMetal), 21)
    assert moved == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
