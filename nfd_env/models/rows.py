"""Dataclasses that hold one entry for each row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


def buffer(axis: int) -> Any:
    """A tensor field whose rows lie along ``axis``, and whose memory stays its own in ``put``."""
    return dataclasses.field(metadata={"axis": axis})


@dataclass(eq=False)
class Rows:
    """Tensors, arrays, lists and further ``Rows`` with one entry a row.

    Rows lie along the first axis, except in a ``buffer``. Whatever else a dataclass has, such as a
    number or a name, belongs to all rows.
    """

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Rows):
                return value.device
        raise TypeError(f"{type(self).__name__} holds no tensor")

    def take(self: R, rows: Sequence[int]) -> R:
        """An independent copy of some rows, in the given order; a row may be taken repeatedly."""
        rows = [int(row) for row in rows]
        return self._take(rows, torch.tensor(rows, dtype=torch.int64, device=self.device))

    def put(self: R, rows: Sequence[int], other: R) -> None:
        """Replace some rows by the rows of ``other``.

        Tensors are replaced by new ones, so that those handed out earlier keep their values; only a
        ``buffer`` is written to.
        """
        rows = [int(row) for row in rows]
        self._put(rows, torch.tensor(rows, dtype=torch.int64, device=self.device), other)

    def _take(self: R, rows: list[int], index: Tensor) -> R:
        taken: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rows):
                value = value._take(rows, index)
            elif isinstance(value, Tensor):
                value = value.index_select(field.metadata.get("axis", 0), index)
            elif isinstance(value, np.ndarray):
                value = value[rows]
            elif isinstance(value, list):
                value = [value[row] for row in rows]
            taken[field.name] = value
        return type(self)(**taken)

    def _put(self: R, rows: list[int], index: Tensor, other: R) -> None:
        for field in dataclasses.fields(self):
            value, new = getattr(self, field.name), getattr(other, field.name)
            if isinstance(value, Rows):
                value._put(rows, index, new)
            elif isinstance(value, Tensor) and "axis" in field.metadata:
                value.index_copy_(field.metadata["axis"], index, new)
            elif isinstance(value, Tensor):
                setattr(self, field.name, value.index_copy(0, index, new))
            elif isinstance(value, np.ndarray):
                value[rows] = new
            elif isinstance(value, list):
                for row, entry in zip(rows, new, strict=True):
                    value[row] = entry
