"""Dataclasses that hold one entry for each row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


@dataclass(eq=False)
class Rows:
    """Tensors, arrays, lists and further ``Rows`` with one entry a row.

    Rows lie along the first axis, but in a *buffer*: a tensor whose field has the metadata
    ``{"axis": n}``, and that stays in its place in memory. Whatever else a dataclass has, such as a
    number or a name, belongs to all rows.
    """

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, those of ``Rows`` within included."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rows):
                yield from value.tensors()
            elif isinstance(value, Tensor):
                yield value

    def take(self: R, rows: Sequence[int]) -> R:
        """An independent copy of some rows, in the given order; a row may be taken repeatedly."""
        first, listed = next(self.tensors()), [int(row) for row in rows]
        with torch.inference_mode(first.is_inference()):
            index = torch.tensor(listed, dtype=torch.int64, device=first.device)
            return self._take(listed, index)

    def put(self: R, rows: Sequence[int], other: R) -> None:
        """Replace some rows by the rows of ``other``.

        Tensors are replaced by new ones, so that those handed out earlier keep their values; only
        buffers are written to.
        """
        first, listed = next(self.tensors()), [int(row) for row in rows]
        with torch.inference_mode(first.is_inference()):
            index = torch.tensor(listed, dtype=torch.int64, device=first.device)
            self._put(listed, index, other)

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
