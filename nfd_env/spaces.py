"""Gymnasium action spaces as plain values, and actions as network inputs.

The four spaces that a world can have are Discrete, MultiDiscrete, MultiBinary and Box.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:  # who records actions has no use for torch, which takes seconds to be imported
    from torch import Tensor

_MOST_ACTIONS = 4096  # each is a number of the networks' input


def space_to_dict(space: spaces.Space) -> dict[str, Any]:
    """Plain values of ``space``, for YAML.

    Raises:
        ValueError: for a space that a world cannot have.
    """
    # An integer type is told where it is not the usual one, which older worlds leave out too.
    dtype = {} if space.dtype in (None, np.int64) else {"dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), **dtype}
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": np.asarray(space.start).tolist(),
            **dtype,
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
        f"or Box, got {' '.join(str(space).split())}; flatten it with a wrapper, e.g. "
        "gymnasium.wrappers.TransformAction"
    )


_DESCRIBED = {
    "Discrete": {"n", "start", "dtype"},
    "MultiDiscrete": {"nvec", "start", "dtype"},
    "MultiBinary": {"n"},
    "Box": {"low", "high", "dtype"},
}


def space_from_dict(values: dict[str, Any]) -> spaces.Space:
    """The Gymnasium space that ``space_to_dict`` described.

    Raises:
        ValueError: for another type, or an entry that it does not have.
        TypeError, KeyError, AssertionError, OverflowError: for entries that are none.
    """
    kind = values.get("type")
    known = _DESCRIBED.get(str(kind), set(values))
    if unknown := sorted(set(map(str, values)) - known - {"type"}):
        raise ValueError(f"a {kind} has no {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    dtypes: dict[str, Any] = {}
    if "dtype" in values:
        dtypes["dtype"] = np.dtype(values["dtype"]).type
    if kind == "Discrete":
        return spaces.Discrete(values["n"], start=values.get("start", 0), **dtypes)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(values["nvec"], start=values.get("start"), **dtypes)
    if kind == "MultiBinary":
        return spaces.MultiBinary(values["n"])
    if kind == "Box":
        dtype: Any = np.dtype(values.get("dtype", "float32"))
        low, high = (np.array(values[bound], dtype) for bound in ("low", "high"))
        return spaces.Box(low, high, dtype=dtype)
    raise ValueError(f"unknown action space type {kind!r}")


def check_described(values: dict[str, Any]) -> None:
    """Raise ValueError unless ``values``, perhaps a stranger's, are of a space with a codec."""
    try:
        ActionCodec(space_from_dict(values))
    except (ValueError, TypeError, KeyError, AssertionError, OverflowError) as error:
        raise ValueError(f"action_space: {error!r:.200}") from None


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
        self._integral = np.issubdtype(space.dtype, np.integer)
        if isinstance(space, spaces.Box):
            if space.dtype.kind not in "uif":
                raise ValueError(f"a Box of actions must hold numbers, got {space}")
            self.width = self.shape[0]
            # Networks see float32: there, 0.1 lies above the float64 0.1, and 127 - -128 has a
            # place, which it does not have in int8.
            low, high = np.float32(space.low), np.float32(space.high)
        elif isinstance(space, spaces.MultiBinary):
            self.width = self.shape[0]
            low, high = np.int64(0), np.int64(1)
        else:
            assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
            low = np.asarray(space.start, np.int64)
            counts = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            if any(int(a) + int(n) > 2**63 for a, n in np.nditer([low, counts])):
                raise ValueError(f"the actions of {space} lie beyond 64-bit integers")
            high = low + counts.astype(np.int64) - 1
            self.width = int(counts.sum(dtype=object))
            if self.width > _MOST_ACTIONS:
                raise ValueError(
                    f"{' '.join(str(space).split())} has {self.width} actions to tell apart, and a "
                    f"world at most {_MOST_ACTIONS}: give the game fewer by a wrapper, or choose "
                    "some of a Discrete space's by source.actions"
                )
            self._counts = counts.reshape(-1).tolist()
        self._low, self._high = np.array(low), np.array(high)

    def check(self, actions: Any, batch: int) -> Tensor:
        """A batch of actions as a new tensor of shape (batch, *shape): float32 for Box, else int64.

        Raises:
            ValueError: on a wrong shape, type or value; the message says which.
        """
        import torch

        if not isinstance(actions, torch.Tensor):
            return torch.from_numpy(self.check_values(actions, batch))
        if actions.is_meta or actions.layout is not torch.strided:
            raise ValueError(f"actions of {self.space} must be a dense tensor with values")
        # numpy has no bf16 and nothing smaller than float16.
        small = actions.is_floating_point() and actions.itemsize <= 2
        values = (actions.float() if small else actions).numpy(force=True)
        return torch.from_numpy(self.check_values(values, batch)).to(actions.device)

    def check_values(self, actions: Any, batch: int) -> np.ndarray:
        """As ``check``, of anything but a tensor, to a numpy array; for those who need no torch.

        Raises:
            ValueError: likewise.
        """
        wanted = (batch, *self.shape)
        try:
            values = np.asarray(actions)
            if values.dtype.kind not in "buifc":
                raise TypeError(f"an array of {values.dtype}")
        except Exception as error:  # __array__ of anything at all may have been called
            raise ValueError(
                f"actions must be an array of numbers of shape {wanted} for {self.space}, "
                f"got {type(actions).__name__} ({error})"
            ) from None
        if values.shape != wanted:
            raise ValueError(
                f"actions must have shape {wanted} for {self.space}, got {values.shape}"
            )
        kind, binary = values.dtype.kind, isinstance(self.space, spaces.MultiBinary)
        if kind == "c" or (kind == "b" and not binary):
            raise ValueError(f"actions of {self.space} cannot be {values.dtype}")
        if self._integral and kind == "f":
            raise ValueError(f"actions of {self.space} must be integers, got {values.dtype}")
        with np.errstate(over="ignore"):
            checked = values.astype(np.float32 if isinstance(self.space, spaces.Box) else np.int64)
        if not self._integral and not np.isfinite(checked).all():
            raise ValueError(
                f"actions of {self.space} must be finite float32 numbers, got NaN or infinity"
            )
        wrong = (checked < self._low) | (checked > self._high)
        if kind == "u" and checked.dtype == np.int64:  # what is too large has become negative
            wrong |= values > np.iinfo(np.int64).max
        if wrong.any():
            raise ValueError(f"actions must lie in {self.space}, got {values[wrong].flat[0]}")
        return checked

    def native(self, actions: Any) -> np.ndarray:
        """A batch of checked actions as the space itself has them: of its type, within its bounds.

        ``check`` looks at float32, where 0.1 lies above the float64 0.1.

        Args:
            actions: as they were given to ``check``, which turns Box values into float32.
        """
        if _is_tensor(actions):
            actions = actions.detach().cpu()
            actions = actions.double() if actions.is_floating_point() else actions  # from bf16 too
        values = np.asarray(actions)
        if isinstance(self.space, spaces.Box):
            values = values.clip(self.space.low, self.space.high)
        return values.astype(self.space.dtype)

    def encode(self, actions: Tensor) -> Tensor:
        """(..., *shape) actions, of whatever type they are stored in -> float32 (..., width)."""
        import torch
        from torch.nn import functional

        low, high = (torch.as_tensor(b, device=actions.device) for b in (self._low, self._high))
        if isinstance(self.space, spaces.Box):
            values = actions.to(torch.float32)
            # Spaces without bounds are also written with the largest number there is.
            finite = low.abs().maximum(high.abs()) < torch.finfo(torch.float32).max
            bounded = finite & (high > low)
            unit = 2 * (values - low) / (high - low).clamp_min(1e-12) - 1
            return torch.where(bounded, unit, values)
        if isinstance(self.space, spaces.MultiBinary):
            return actions.to(torch.float32)
        index = actions.long() - low
        parts = index.reshape(*index.shape[: index.ndim - len(self.shape)], -1).unbind(-1)
        hot = [functional.one_hot(p, n) for p, n in zip(parts, self._counts, strict=True)]
        return torch.cat(hot, -1).to(torch.float32)


class CountedFromZero:
    """An action space as most agents know it: whole numbers counted from 0, Boxes of floats.

    Stable-Baselines3, TorchRL and others overlook ``start`` of Discrete and MultiDiscrete, hand
    out MultiBinary actions as floats, and treat a Box of integers as if it were one of floats.

    Attributes:
        env_space: the space of the environment.
        space: the space for the agent.
    """

    def __init__(self, space: spaces.Space) -> None:
        """Prepare for ``space`` of one environment (see ``space_to_dict`` for those supported)."""
        self.env_space = self.space = space
        self._start = np.int64(0)
        if isinstance(space, spaces.Discrete):
            self._start = np.int64(space.start)
            self.space = spaces.Discrete(int(space.n))
        elif isinstance(space, spaces.MultiDiscrete):
            self._start = np.asarray(space.start, np.int64)
            self.space = spaces.MultiDiscrete(space.nvec.astype(np.int64))
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
            low, high = (bound.astype(np.float32) for bound in (space.low, space.high))
            self.space = spaces.Box(low, high, dtype=np.float32)

    def to_env(self, actions: Any) -> Any:
        """What the environment takes for ``actions``, (..., *shape), of the agent.

        What is no whole number is rounded for a Box of integers, and left for the environment to
        refuse elsewhere. Tensors become tensors, all else numpy arrays.
        """
        if isinstance(self.env_space, spaces.Box) and self.space is self.env_space:
            return actions
        tensor = _is_tensor(actions)
        actions = actions if tensor else np.asarray(actions)
        floats = actions.is_floating_point() if tensor else actions.dtype.kind == "f"
        if floats:
            rounded = actions.round()
            rounds = isinstance(self.env_space, spaces.Box) and (rounded - rounded == 0).all()
            if not (rounds or (rounded == actions).all()):  # infinite, NaN, or no whole number
                return actions
            actions = rounded.long() if tensor else rounded.astype(np.int64)
        if np.any(self._start) and (tensor or actions.dtype.kind in "iu"):
            start = actions.new_tensor(self._start) if tensor else self._start
            actions = actions + start
        return actions

    def from_env(self, actions: Any) -> Any:
        """The agent's name for ``actions`` of the environment."""
        return (np.asarray(actions) - self._start).astype(self.space.dtype)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
