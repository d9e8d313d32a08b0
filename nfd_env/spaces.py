"""Gymnasium action spaces as plain values, and actions as network inputs.

The four spaces that a world can have are Discrete, MultiDiscrete, MultiBinary and Box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional


def space_to_dict(space: spaces.Space) -> dict[str, Any]:
    """Plain values of ``space``, for YAML.

    Raises:
        ValueError: for a space that a world cannot have.
    """
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": np.asarray(space.start).tolist(),
        }
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return {"type": "MultiBinary", "n": int(space.shape[0])}
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return {
            "type": "Box",
            "low": space.low.tolist(),
            "high": space.high.tolist(),
            "dtype": str(space.dtype),
        }
    raise ValueError(
        f"a world's action space must be Discrete, or a one-dimensional MultiDiscrete, MultiBinary "
        f"or Box, got {space}"
    )


def space_from_dict(values: dict[str, Any]) -> spaces.Space:
    """The Gymnasium space that ``space_to_dict`` described."""
    kind = values.get("type")
    if kind == "Discrete":
        return spaces.Discrete(values["n"], start=values["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(values["nvec"], start=values["start"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(values["n"])
    if kind == "Box":
        dtype: Any = np.dtype(values.get("dtype", "float32"))
        return spaces.Box(
            np.array(values["low"], dtype), np.array(values["high"], dtype), dtype=dtype
        )
    raise ValueError(f"unknown action space type {kind!r}")


class ActionCodec:
    """Checks actions of one space and encodes them as float vectors for the networks.

    Discrete and MultiDiscrete become one-hot vectors, MultiBinary zeros and ones; Box values are
    scaled to [-1, 1] where both bounds are finite and passed through elsewhere.
    """

    def __init__(self, space: spaces.Space) -> None:
        """Prepare for ``space`` (see ``space_to_dict`` for the supported ones)."""
        space_to_dict(space)
        self.space = space
        self.shape: tuple[int, ...] = tuple(space.shape or ())
        if isinstance(space, spaces.Discrete):
            self.width = int(space.n)
        elif isinstance(space, spaces.MultiDiscrete):
            self.width = int(space.nvec.sum())
        else:
            self.width = self.shape[0]
        self.dtype = torch.float32 if isinstance(space, spaces.Box) else torch.int64

    def check(self, actions: Any, batch: int) -> Tensor:
        """A batch of actions as a tensor of shape (batch, *shape).

        Raises:
            ValueError: on a wrong shape, type or value; the message says which.
        """
        wanted = (batch, *self.shape)
        if isinstance(actions, Tensor):
            tensor = actions.detach()
        else:
            try:
                array = np.asarray(actions)
                tensor = torch.from_numpy(np.array(array))
            except (TypeError, ValueError):
                raise ValueError(
                    f"actions must be an array of shape {wanted} for {self.space}, "
                    f"got {type(actions).__name__}"
                ) from None
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"actions must have shape {wanted} for {self.space}, got {tuple(tensor.shape)}"
            )
        integral = not (tensor.is_floating_point() or tensor.is_complex())
        if self.dtype == torch.int64 and not integral:
            raise ValueError(f"actions of {self.space} must be integers, got {tensor.dtype}")
        tensor = tensor.to(self.dtype)
        self._check_values(tensor)
        return tensor

    def _check_values(self, tensor: Tensor) -> None:
        space = self.space
        if isinstance(space, spaces.Box):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"actions of {space} must be finite, got NaN or infinity")
            low = torch.from_numpy(space.low).to(tensor.device)
            high = torch.from_numpy(space.high).to(tensor.device)
        elif isinstance(space, spaces.Discrete):
            low = torch.tensor(int(space.start))
            high = low + int(space.n) - 1
        elif isinstance(space, spaces.MultiDiscrete):
            low = torch.as_tensor(space.start)
            high = low + torch.as_tensor(space.nvec) - 1
        else:
            low, high = torch.tensor(0), torch.tensor(1)
        low, high = low.to(tensor.device), high.to(tensor.device)
        wrong = (tensor < low) | (tensor > high)
        if bool(wrong.any()):
            raise ValueError(
                f"actions must lie in {space}, got {tensor[wrong].flatten()[0].item()}"
            )

    def encode(self, actions: Tensor) -> Tensor:
        """(..., *shape) actions -> float32 (..., width)."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            index = actions.long() - int(space.start)
            return functional.one_hot(index, self.width).float()
        if isinstance(space, spaces.MultiDiscrete):
            start = torch.as_tensor(space.start, device=actions.device)
            parts = (actions.long() - start).unbind(-1)
            return torch.cat(
                [functional.one_hot(p, int(n)) for p, n in zip(parts, space.nvec, strict=True)], -1
            ).float()
        if isinstance(space, spaces.Box):
            low = torch.from_numpy(space.low).to(actions.device)
            high = torch.from_numpy(space.high).to(actions.device)
            bounded = torch.isfinite(low) & torch.isfinite(high) & (high > low)
            unit = 2 * (actions - low) / (high - low).clamp_min(1e-12) - 1
            return torch.where(bounded, unit, actions).float()
        return actions.float()
