"""A moment of a batch of environments: what the future of each depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfd_env.config import is_number
from nfd_env.inference.rollout import new_cache
from nfd_env.inference.state import Drawn, WorldState
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.cache import FrameCache
from nfd_env.models.rows import Rows
from nfd_env.sources.spec import short


@dataclass(eq=False)
class EnvState(Rows):
    """A moment of a vector env, see ``NFDVectorEnv.save_state``.

    Attributes:
        world: what the next frames depend on.
        shown: (B, C, h, w), latents of the frames that are observed. Where an episode has ended
            within a ``frame_skip``, the world may have gone on; this and ``memory`` have not.
        memory: (B, width), the heads' recurrent state after these frames.
        frames: int64 (B,), that the running episodes have gone on for.
        ended: bool (B,), episodes that have ended and wait for a reset.
        seeds: of each environment.
        episodes: number of the episode of its seed that each is in.
    """

    world: WorldState
    shown: Tensor
    memory: Tensor
    frames: np.ndarray
    ended: np.ndarray
    seeds: list[int]
    episodes: list[int]

    def __len__(self) -> int:
        """Number of environments."""
        return len(self.seeds)


def check_state(state: Any, model: WorldModel, frames: int, width: int) -> None:
    """Check every part of a state, which may come from a file, before any of it is used.

    Args:
        state: to go on from.
        model: that is to step it.
        frames: n, most frames of a pass.
        width: of an encoded action.

    Raises:
        ValueError: on a part that is missing, of another shape, type or device, not finite or out
            of range, or a state that does not fit the model.
    """
    if not isinstance(state, EnvState):
        raise ValueError(f"a state is what save_state() returned, got {short(state)}")
    world = getattr(state, "world", None)
    cache, drawn = getattr(world, "cache", None), getattr(world, "drawn", None)
    kinds = ((world, WorldState), (cache, FrameCache), (drawn, Drawn))
    if not all(isinstance(part, kind) for part, kind in kinds):
        raise _damaged("world", "is not what save_state() wrote")
    assert world is not None and cache is not None and drawn is not None
    for name in ("seeds", "episodes"):
        listed = getattr(state, name, None)
        if not isinstance(listed, list) or not all(is_number(x, True) and x >= 0 for x in listed):
            raise _damaged(name, f"must be whole numbers of at least 0, got {short(listed)}")
    rows = len(state.seeds)
    if not rows or len(state.episodes) != rows:
        raise _damaged("episodes", f"has {len(state.episodes)} entries for {rows} seeds")
    # So far that the model can be asked whether it is of its kind, which tells more.
    for name, part, axes in (("keys", cache.keys, 6), ("last", getattr(cache, "last", None), 5)):
        if part is not None and not (isinstance(part, Tensor) and part.ndim == axes):
            raise _damaged(name, f"must be a tensor of {axes} axes")
    for name in ("latents", "remembered"):
        if not isinstance(getattr(drawn, name, None), Tensor):
            raise _damaged(name, "must be a tensor")
    model.check_fits(world, frames)
    _check_tensors(state, model, frames, width)
    _check_arrays(state, frames)


def _check_tensors(state: EnvState, model: WorldModel, frames: int, width: int) -> None:
    """The part of ``check_state`` that is about tensors."""
    world, rows, latent = state.world, len(state.seeds), model.dynamics.config.latent_shape
    cache, drawn, fresh = world.cache, world.drawn, new_cache(model.dynamics, 0, frames)
    if (cache.window, cache.room) != (fresh.window, fresh.room):
        raise _damaged("window", "is not that of this world")
    number, memory = torch.float32, model.heads.initial_state(0)
    ring = (fresh.keys.shape[0], rows, *fresh.keys.shape[2:])
    tokens = hasattr(model, "discrete")  # those of the autoregressive baseline; see its check_fits
    kept = drawn.remembered
    seen = (rows, frames, *(tuple(kept.shape[2:]) if tokens and kept.ndim == 3 else latent))
    expected: list[tuple[str, Any, tuple[int, ...], torch.dtype]] = [
        ("shown", state.shown, (rows, *latent), number),
        ("memory", state.memory, (rows, *memory.shape[1:]), memory.dtype),
        ("action", world.action, (rows, 1, width), number),
        ("keys of noise", world.keys, (rows,), torch.int64),
        ("keys", cache.keys, ring, fresh.keys.dtype),
        ("values", cache.values, ring, fresh.values.dtype),
        ("length", cache.length, (rows,), torch.int64),
        ("last", cache.last, (rows, *fresh.last.shape[1:]), number),
        ("last_level", cache.last_level, (rows, *fresh.last_level.shape[1:]), number),
        ("latents", drawn.latents, (rows, frames, *latent), number),
        ("reward", drawn.reward, (rows, frames), number),
        ("terminated", drawn.terminated, (rows, frames), torch.bool),
        ("hazard", drawn.hazard, (rows, frames), number),
        ("remembered", kept, seen, torch.int64 if tokens else number),
        ("memory of drafts", drawn.memory, (rows, frames, *memory.shape[1:]), memory.dtype),
    ]
    for name, part, shape, dtype in expected:
        right = isinstance(part, Tensor) and part.layout is torch.strided
        if not right or (tuple(part.shape), part.dtype, part.device) != (
            shape,
            dtype,
            model.device,
        ):
            got = f"{part.dtype} {tuple(part.shape)} on {part.device}" if right else short(part)
            raise _damaged(name, f"must be {dtype} {shape} on {model.device}, got {got}")
    # Sums show NaN and infinity in one pass over the memory; a GPU is waited for once.
    floats = [(name, part) for name, part, *_ in expected if part.is_floating_point()]
    finite = torch.stack([part.sum(dtype=torch.float32) for _, part in floats]).isfinite()
    for (name, _), fine in zip(floats, finite.tolist(), strict=True):
        if not fine:
            raise _damaged(name, "holds NaN or infinity, or numbers near it")
    if int(cache.length.min()) < 0:
        raise _damaged("length", "must not be negative")


def _check_arrays(state: EnvState, frames: int) -> None:
    """The part of ``check_state`` that is about arrays."""
    world, rows = state.world, len(state.seeds)
    most = np.iinfo(np.int64).max
    expected: list[tuple[str, Any, tuple[int, ...], type, float, float]] = [
        ("frames", state.frames, (rows,), np.int64, 0, most // 2),  # more are counted
        ("ended", state.ended, (rows,), np.bool_, 0, 1),
        ("used", world.used, (rows,), np.int64, 1, frames),
        ("ready", world.ready, (rows,), np.int64, 1, frames),
        ("kept", world.kept, (rows,), np.float64, 0, 1),
        ("counts", world.counts, (rows, 3), np.int64, 0, most),
    ]
    for name, part, shape, dtype, least, largest in expected:
        if not isinstance(part, np.ndarray) or (part.shape, part.dtype) != (shape, dtype):
            got = f"{part.dtype} {part.shape}" if isinstance(part, np.ndarray) else short(part)
            raise _damaged(name, f"must be an array {np.dtype(dtype)} {shape}, got {got}")
        if not ((part >= least) & (part <= largest)).all():  # NaN is not either
            raise _damaged(name, f"must be from {least} to {largest}, got {short(part)}")
    if (world.used > world.ready).any():
        raise _damaged("used", "is more than is ready")


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"the state is damaged: {name} {what}")
