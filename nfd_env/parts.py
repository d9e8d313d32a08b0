"""A batch that is worked on in parts: by processes side by side, or one part after another.

Each part has its own rows. What comes of them is to be what it would be in one piece. So who draws
random numbers for rows draws them for the whole batch, from a generator that is the same
everywhere, and takes those of its own rows; and who needs a mean over the batch asks the other
processes. Outside ``working_on`` everything here is what torch has under the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Part:
    """Which part of a batch: of ``count`` equal ones, ``processes`` are worked on at a time.

    Attributes:
        index: from 0 to ``count`` - 1.
        count: parts of a batch.
        processes: that take turns: process r has the parts r, r + processes, ...
    """

    index: int = 0
    count: int = 1
    processes: int = 1

    @property
    def ends_step(self) -> bool:
        """Whether it is its process's last one."""
        return self.index + self.processes >= self.count

    def rows(self, total: int) -> slice:
        """Its rows of a batch of ``total``, which ``count`` divides."""
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Part()

# Plain values, and the index a tensor: compiled code is made once for all parts.
_count, _processes, _index = 1, 1, torch.zeros((), dtype=torch.int64, device="cpu")


@contextmanager
def working_on(part: Part) -> Iterator[None]:
    """Within the block, the batch at hand is ``part`` of a larger one."""
    global _count, _processes, _index
    before = _count, _processes, _index
    _count, _processes = part.count, part.processes
    _index = torch.tensor(part.index, dtype=torch.int64, device="cpu")
    try:
        yield
    finally:
        _count, _processes, _index = before


def processes() -> int:
    """How many processes work on the batch."""
    return _processes


def rand(shape: tuple[int, ...], device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform in [0, 1), for ``shape[0]`` rows."""
    if _count == 1:
        return torch.rand(shape, device=device, dtype=dtype)
    return _own(torch.rand((_count * shape[0], *shape[1:]), device=device, dtype=dtype))


def randn(shape: tuple[int, ...], device: Any = None) -> Tensor:
    """Standard normal, for ``shape[0]`` rows."""
    if _count == 1:
        return torch.randn(shape, device=device)
    return _own(torch.randn((_count * shape[0], *shape[1:]), device=device))


def randn_like(rows: Tensor) -> Tensor:
    """Standard normal, one for each number of ``rows``."""
    if _count == 1:
        return torch.randn_like(rows)
    # Not by shape: the order in memory says which number goes where.
    return _own(torch.randn_like(torch.cat([rows.detach()] * _count)))


def _own(drawn: Tensor) -> Tensor:
    size = len(drawn) // _count
    rows = torch.arange(size, device=drawn.device) + (_index * size).to(drawn.device)
    return drawn.index_select(0, rows)


def mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes, with its gradient."""
    return value if _processes == 1 else _Mean.apply(value)  # type: ignore[no-any-return]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _averaged(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Each process's loss depends on this process's value.
        return _averaged(gradients[0])


def _averaged(value: Tensor) -> Tensor:
    value = value.contiguous().clone()
    distributed.all_reduce(value)
    return value / _processes


def mean_of_largest(values: Tensor, share: float) -> Tensor:
    """The mean of the largest ``share`` of the values (n,) of all processes, at least one.

    Each process gets its own values' contribution, times the number of processes: the mean of that
    over the processes, as losses are averaged, is the whole.
    """
    count = max(1, int(share * len(values) * _processes))
    if _processes == 1:
        return values.topk(count).values.mean()
    everybody = [torch.empty_like(values) for _ in range(_processes)]
    distributed.all_gather(everybody, values.detach().contiguous())
    places = torch.cat(everybody).topk(count).indices - distributed.get_rank() * len(values)
    own = places[(places >= 0) & (places < len(values))]
    return values[own].sum() * (_processes / count)
