"""All randomness of a world: numbers that are functions of a key, whatever else is drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*numbers: int) -> int:
    """A 63-bit hash of non-negative integers (rounds of SplitMix64)."""
    state = _GAMMA
    for number in numbers:
        state = (state ^ number) * _FACTORS[0] & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * _FACTORS[1] & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def generated(
    keys: Tensor, count: int, more: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise from torch's generator, seeded with each key: fast for few keys on a CPU.

    Args:
        keys: int64 (N,) on the CPU.
        count: normal numbers for each.
        more: further normal numbers; they leave the others as they are.
        generator: scratch.

    Returns:
        Normal numbers (N, ``count`` + ``more``) and uniform numbers (N,) in [0, 1), float32.
    """
    normal, uniform = torch.empty(len(keys), count + more), torch.empty(len(keys))
    for row, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        normal[row, :count].normal_(generator=generator)
        uniform[row : row + 1].uniform_(generator=generator)
        normal[row, count:].normal_(generator=generator)
    return normal, uniform


def hashed(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Noise computed for all keys at once, for a GPU: Box and Muller's of each key's SplitMix64.

    Args:
        keys: int64 (N,), the states that the generators begin with.
        count: normal numbers for each; more leave the first ones as they are.

    Returns:
        As ``generated``, but other numbers.
    """
    steps = torch.arange(1, 2 + (count + 1) // 2, device=keys.device)
    bits = keys[:, None] + steps * _signed(_GAMMA)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FACTORS[0])
    bits = (bits ^ _shifted(bits, 27)) * _signed(_FACTORS[1])
    bits = bits ^ _shifted(bits, 31)
    uniform = _shifted(bits[:, 0], 40).float() * 2.0**-24
    high, low = _shifted(bits[:, 1:], 32), bits[:, 1:] & 0xFFFFFFFF
    radius = ((high.float() + 1) * 2.0**-32).log().mul(-2).sqrt()
    angle = low.float() * (2 * math.pi * 2.0**-32)
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
    return normal[:, :count], uniform


def _signed(number: int) -> int:
    """The 64-bit integer of the same bits; torch's arithmetic wraps around like unsigned."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: Tensor, places: int) -> Tensor:
    """Bits moved to the right, zeros moving in: torch's own shift keeps the sign."""
    return (x >> places) & (2 ** (64 - places) - 1)
