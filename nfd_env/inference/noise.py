"""All randomness of a world: numbers that are functions of a key, whatever else is drawn.

The same integers come out on every device. The normal numbers made of them are computed in float64
and then rounded, so that devices whose logarithms and cosines differ in the last bits give the same
float32 numbers all the same, but for about one in a hundred million.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor

from nfd_env.config import is_number

# Of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*numbers: int) -> int:
    """A 63-bit hash of whole numbers, however large; all of their bits count."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def fitting_seed(seed: int, bits: int) -> int:
    """``seed`` for who takes ``bits`` of it: itself where it has no more, else a hash of it.

    Raises:
        ValueError: when it is no whole number of at least 0.
    """
    if not is_number(seed, whole=True) or seed < 0:
        raise ValueError(f"a seed must be a whole number of at least 0, got {str(seed)[:80]!r}")
    seed = int(seed)
    return seed if seed < 2**bits else mix(seed) % 2**bits


def noise(keys: Tensor, frames: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What is random about frames: SplitMix64 as a hash of a counter, and Box and Muller's of it.

    Args:
        keys: int64 (...), one an episode: ``mix`` of its seed and number.
        frames: int64, frame numbers, each below 2**44; broadcast against ``keys``.
        count: normal numbers for each, fewer than 2**21; more leave the first ones as they are.

    Returns:
        Normal numbers (..., ``count``) and uniform numbers (...) in [0, 1), float32.
    """
    device = keys.device
    if device.type == "mps":  # Metal has no float64
        normal, uniform = noise(keys.cpu(), frames.cpu(), count)
        return normal.to(device), uniform.to(device)
    # Frame number f has the counters from f * 2**20 on.
    first = keys + frames * _signed(_GAMMA << 20)
    bits = first[..., None] + _steps(1 + (count + 1) // 2, device)
    bits = (bits ^ _shifted(bits, 30)).mul_(_signed(_FACTORS[0]))
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(_signed(_FACTORS[1]))
    bits = bits.bitwise_xor_(_shifted(bits, 31))
    uniform = _shifted(bits[..., 0], 40).float() * 2.0**-24
    bits = bits[..., 1:]
    high, low = _shifted(bits, 32).double(), bits.bitwise_and_(0xFFFFFFFF).double()
    radius = high.add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = low.mul_(2 * math.pi * 2.0**-32)
    normal = torch.view_as_real(torch.polar(radius, angle)).float().flatten(-2)
    return normal[..., :count], uniform


@functools.lru_cache(maxsize=64)
def _steps(count: int, device: torch.device) -> Tensor:
    """The counters 1 to ``count``, times the odd constant that spreads them."""
    return torch.arange(1, 1 + count, device=device) * _signed(_GAMMA)


def _signed(number: int) -> int:
    """The 64-bit integer of the same lowest bits; torch's arithmetic wraps around."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: Tensor, places: int) -> Tensor:
    """Bits moved to the right, zeros moving in: torch's own shift keeps the sign."""
    return (x >> places).bitwise_and_(2 ** (64 - places) - 1)
