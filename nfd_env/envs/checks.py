"""Arguments, seeds, masks and recorded moments, checked before anything changes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from nfd_env.config import is_number
from nfd_env.inference.state import Context
from nfd_env.sources.spec import short
from nfd_env.worlds.load import World
from nfd_env.worlds.starts import LARGEST, load_starts

RESET_OPTIONS = ("context", "start", "reset_mask")
_ENCODED_AT_A_TIME = 64  # frames of a context
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, choices))}, got {short(value)}"
        )


def check_whole(name: str, value: Any, least: int = 1, most: int = 2**63 - 1) -> int:
    """``value`` as an int; raises ValueError unless it is a whole number in the range."""
    if not is_number(value, whole=True) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {short(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {short(value)}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """``value`` as a float; raises ValueError unless it is a real number."""
    if not is_number(value):
        raise ValueError(f"{name} must be a number, got {short(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number, got {short(value)}, too large for one"
        ) from None


def check_flag(name: str, value: Any) -> bool:
    """``value`` as a bool; raises ValueError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def check_room(name: str, value: int, size: int) -> None:
    """Raise ValueError when ``size`` bytes, needed because of ``value``, cannot be had here."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told on this system
        there = 2**40
    if size > there:
        raise ValueError(
            f"{name}={value} needs {size / 2**30:.3g} GiB for observations alone, this machine "
            f"has {there / 2**30:.3g}; use a smaller number"
        )


def as_array(name: str, value: Any) -> np.ndarray:
    """``value`` as an array; raises ValueError for what cannot be one."""
    try:
        return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except Exception:  # whatever __array__ of a foreign object raises
        raise ValueError(f"{name} must be an array, got {short(value)}") from None


def check_rows(rows: Sequence[int], num_envs: int) -> list[int]:
    """Numbers of environments as a list; raises ValueError when there is none or no such one."""
    try:
        listed = [check_whole("the number of an environment", r, 0, num_envs - 1) for r in rows]
    except TypeError:
        raise ValueError(f"rows must be numbers of environments, got {short(rows)}") from None
    if not listed:
        raise ValueError("rows must name at least one environment")
    return listed


def check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """A seed for each environment, or None where it has none.

    Raises:
        ValueError: on what is no seed, or the wrong number of them.
    """
    if isinstance(seed, Tensor | np.ndarray):
        seed = as_array("seed", seed).tolist()
    if seed is None:
        return [None] * num_envs
    if is_number(seed, whole=True):
        seeds: list[int | None] = [int(seed) + i for i in range(num_envs)]
    elif isinstance(seed, Sequence) and all(s is None or is_number(s, whole=True) for s in seed):
        seeds = [None if s is None else int(s) for s in seed]
    else:
        raise ValueError(f"a seed must be a whole number or one for each slot, got {short(seed)}")
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds were given for {num_envs} environments")
    if any(s is not None and s < 0 for s in seeds):
        raise ValueError(f"seeds must not be negative, got {short(seed)}")
    return seeds


def check_options(options: Any, known: Sequence[str]) -> Mapping[str, Any]:
    """Reset options.

    Raises:
        ValueError: when they are no mapping, or hold one that is not ``known``.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be a dict of {', '.join(known)}, got {short(options)}")
    for name in options:
        if name not in known:
            raise ValueError(f"unknown reset option {short(name)}; known: {', '.join(known)}")
    return options


def check_mask(mask: Any, num_envs: int, begun: bool) -> np.ndarray:
    """Which environments to reset, bool (num_envs,).

    Raises:
        ValueError: on anything else, or when there is none.
        gymnasium.error.ResetNeeded: when the environments have not ``begun`` and some are left out.
    """
    if mask is None:
        return np.ones(num_envs, bool)
    mask = as_array("reset_mask", mask)
    if mask.shape != (num_envs,) or mask.dtype != bool:
        raise ValueError(
            f"reset_mask must be a bool array of shape ({num_envs},), got {mask.dtype} {mask.shape}"
        )
    if not mask.any():
        raise ValueError("reset_mask selects no environment")
    if not begun and not mask.all():
        raise gymnasium.error.ResetNeeded("the first reset() must reset every environment")
    return mask.copy()


def check_starts(
    world: World, starts: Sequence[Context] | str | PathLike[str] | None
) -> Sequence[Context]:
    """Recorded moments that episodes of ``world`` can start from, independent of those given.

    Raises:
        ValueError: when they do not fit, or hold NaN, infinity or numbers beyond half precision.
        CheckpointError: when a file of them cannot be read.
    """
    if starts is None:
        return world.starts
    shape, width = world.model.dynamics.config.latent_shape, world.codec.width
    if isinstance(starts, str | PathLike):
        return load_starts(starts, shape, width)
    if not isinstance(starts, Sequence):
        raise ValueError(f"starts must be a file or a sequence of Contexts, got {short(starts)}")
    if not len(starts):
        raise ValueError("starts must hold at least one recorded moment, or be None")
    for number, start in enumerate(starts):
        if not isinstance(start, Context):
            raise ValueError(f"starts must be a file or Contexts, got {short(start)}")
        parts = start.latents, start.actions
        if not all(isinstance(part, Tensor) and part.dtype in _FLOATS for part in parts):
            raise ValueError(f"start {number} must hold tensors of floating-point numbers")
        if not all(part.layout == torch.strided for part in parts):
            raise ValueError(f"start {number} must hold dense tensors")
        mine = tuple(start.latents.shape[1:]), tuple(start.actions.shape)
        if not len(start.latents) or mine != (shape, (len(start.latents), width)):
            raise ValueError(
                f"start {number} does not fit this world: it needs latents (K, "
                f"{', '.join(map(str, shape))}) and actions (K, {width}), K >= 1, got "
                f"{tuple(start.latents.shape)} and {tuple(start.actions.shape)}"
            )
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError(f"start {number} holds NaN or infinity")
        for name, part in (("latents", start.latents), ("actions", start.actions)):
            _check_size(f"start {number}: {name}", part)
    # Copies: what their owner does with them later is nothing to the episodes.
    return [replace(s, latents=_copied(s.latents), actions=_copied(s.actions)) for s in starts]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _check_size(name: str, numbers: Tensor) -> None:
    """Raise ValueError for numbers that networks would make NaN of."""
    largest = float(numbers.detach().abs().max())
    if largest > LARGEST:
        raise ValueError(
            f"{name} must be from {-LARGEST:g} to {LARGEST:g}, got {largest:.3g} in size"
        )


def chosen_contexts(
    world: World,
    starts: Sequence[Context],
    options: Mapping[str, Any],
    rows: Sequence[int],
    num_envs: int,
) -> list[Context | None]:
    """What ``rows`` are to start from by the reset options context and start; None: by seed.

    Raises:
        ValueError: on options that cannot be used.
    """
    given, start = options.get("context"), options.get("start")
    if given is not None and start is not None:
        raise ValueError("give either the reset option context or start, not both")
    if isinstance(start, str) and start == "beginning":
        if not any(s.beginning for s in starts):
            raise ValueError("none of the starts is the beginning of an episode")
        return [None] * len(rows)
    if start is not None:
        if not (is_number(start, whole=True) and 0 <= int(start) < len(starts)):
            raise ValueError(
                f'start must be from 0 to {len(starts) - 1} or "beginning", got {short(start)}'
            )
        return [starts[int(start)]] * len(rows)
    if given is None:
        return [None] * len(rows)
    if not isinstance(given, Mapping | Sequence) or isinstance(given, str):
        raise ValueError(f"context must be a mapping or a list of them, got {short(given)}")
    if isinstance(given, Mapping):  # the same for all, encoded once
        return [encoded_context(world, given)] * len(rows)
    if len(given) != num_envs:
        raise ValueError(
            f"context needs one entry per environment, got {len(given)} for {num_envs}"
        )
    return [None if given[r] is None else encoded_context(world, given[r]) for r in rows]


def encoded_context(world: World, entry: Any) -> Context:
    """Latents and encoded actions of recorded frames.

    Args:
        world: whose tokenizer and action space it is.
        entry: {"frames": uint8 (T, H, W, 3), "actions": (T-1, ...)}, T >= 1.

    Raises:
        ValueError: on frames or actions of the wrong shape, type or number.
    """
    if not isinstance(entry, Mapping) or "frames" not in entry:
        raise ValueError('a context is {"frames": (T, H, W, 3), "actions": (T-1, ...)}')
    frames = as_array("context frames", entry["frames"])
    given = entry.get("actions")
    actions = np.atleast_1d(as_array("context actions", () if given is None else given))
    height, width = world.spec.frame_size
    if frames.ndim != 4 or frames.shape[1:] != (height, width, 3) or not len(frames):
        raise ValueError(
            f"context frames must have shape (T, {height}, {width}, 3) with T >= 1, "
            f"got {frames.shape}"
        )
    if frames.dtype != np.uint8:
        raise ValueError(f"context frames must be uint8, got {frames.dtype}")
    codec = world.codec
    if len(actions) != len(frames) - 1:
        raise ValueError(
            f"{len(frames)} context frames need {len(frames) - 1} actions, one between each "
            f"two, got {len(actions)}"
        )
    into = torch.zeros(len(frames), codec.width, dtype=torch.float32, device="cpu")
    if len(actions):
        into[1:] = codec.encode(codec.check(actions, len(actions)))
        _check_size("context actions", into)
    parts = torch.from_numpy(frames.copy()).split(_ENCODED_AT_A_TIME)
    return Context(torch.cat([world.model.encode(part) for part in parts]), into)
