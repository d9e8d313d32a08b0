"""Speculative frames: drawn before they are asked for, on the assumption that the action is kept.

Where a state has room for n ``frames``, a pass draws n of them jointly for the current action
(arXiv 2506.01380, section on speculative sampling). The first one is handed out. On the next steps,
as long as the real action is the assumed one, the others are, without any pass; at the first
difference they are dropped.

Each environment of a batch goes its own way: what it drafts follows from its own actions, and not
from its neighbours or from how long anything takes. Those that need a pass on a step share one.
Frames that were handed out since a row's last pass, 1 to n of them, are pending and are committed
to the ring in its next one; rows with fewer than others are padded, because one wide pass costs
less than up to n narrow ones.

A draft is stored beside the history and never in it: the ring moves only when a frame is committed,
so dropping a draft is forgetting it. Its noise is a function of (seed, episode, frame number), so
that a frame which is drawn again has the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfd_env.config import is_number
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Transition, WorldState
from nfd_env.inference.world_model import WorldModel
from nfd_env.precision import stepping

MEMORY = 16  # frames that the running share of kept actions remembers
FURTHER_FRAME = 0.4  # cost of one more frame in a pass, over that of a pass of one


@stepping
def advance(
    model: WorldModel,
    state: WorldState,
    actions: Tensor,
    certain: int = 1,
    active: np.ndarray | None = None,
    sampling: SamplingConfig | None = None,
    drafting: bool = True,
) -> Transition:
    """Advance rows of ``state`` (in place) by one frame, handing out drafts where there are any.

    Args:
        model: draws the frames.
        state: as ``WorldModel.start`` made it.
        actions: encoded, (B, action_width).
        certain: frames, this one included, for which the actions are certain to be kept.
        active: bool (B,), the rows to advance; what is returned for the others means nothing, and
            without drafts they advance too. None for all.
        sampling: None for the model's default.
        drafting: False to draw no more than the frames that are certain.
    """
    if state.frames == 1:
        return model.step(state, actions, sampling)
    active = np.ones(state.batch, bool) if active is None else active.copy()
    actions = actions.to(model.device, torch.float32)
    same = (actions == state.action[:, 0]).all(1).cpu().numpy()
    state.kept[active] += (same[active] - state.kept[active]) / MEMORY
    drafted = active & same & (state.used < state.ready)
    state.counts[drafted, 1] += 1
    missed = [int(row) for row in np.flatnonzero(active & ~drafted)]
    if missed:
        counts = np.full(len(missed), min(certain, state.frames))
        if drafting:
            counts = worthwhile(state.kept[missed], certain, state.frames)
        _draw(model, state, actions, missed, counts, certain, sampling)
    state.used[active] += 1
    return state.last


def _draw(
    model: WorldModel,
    state: WorldState,
    actions: Tensor,
    rows: list[int],
    counts: np.ndarray,
    certain: int,
    sampling: SamplingConfig | None,
) -> None:
    """Replace the frames of the last pass in ``rows`` by so many new ones, none of them used."""
    state.drop(rows)
    everything = len(rows) == state.batch
    part = state if everything else state.take(rows)
    chosen = actions if everything else actions[torch.tensor(rows, device=actions.device)]
    drawn = model.draw(part, chosen, int(counts.max()), sampling)
    part.drawn, part.action = drawn.padded(state.frames), chosen[:, None]
    # What would follow the end of the episode was drawn for nothing, unless it is certain that the
    # caller goes on to it.
    ended = drawn.terminated.cpu().numpy()
    until = np.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1]).clip(certain)
    part.ready, part.used = np.minimum(counts, until), np.zeros_like(part.used)
    part.counts[:, 0] += counts - 1
    part.counts[:, 2] += counts - part.ready
    if part is not state:
        state.put(rows, part)


def worthwhile(kept: np.ndarray, certain: int, frames: int) -> np.ndarray:
    """How many frames to draw in a pass, by how many of them are expected to be used.

    All ``frames`` are, unless those that are certain to be used cost less a frame. A pass is taken
    to cost 1 for its first frame and ``FURTHER_FRAME`` for each further one, on every machine, so
    that the same actions give the same rollout; ``nfd bench`` measures what it does on this one.

    Args:
        kept: (B,), each row's share of frames that kept the action before.
        certain: frames whose action is known.
        frames: n.

    Returns:
        int64 (B,), ``frames`` or the smaller ``certain``.
    """
    fewest = min(certain, frames)
    ahead = np.maximum(np.arange(frames) - certain + 1, 0)
    used = (kept[:, None] ** ahead).sum(1)
    cost, least = (1 + FURTHER_FRAME * (n - 1) for n in (frames, fewest))
    return np.where(used / cost >= fewest / least, frames, fewest)


def check_frames(frames: Any, model: WorldModel) -> None:
    """Check a number of frames that one pass of ``model`` is to draw.

    Raises:
        ValueError: when it is below 1, or beyond the window - 1 frames that a frame sees right
            before it, or the one that some dynamics draw.
    """
    most = model.most_frames
    if not is_number(frames, whole=True) or not 1 <= frames <= most:
        limit = (
            f"a whole number from 1 (no speculation) to {most}, the number of frames right before "
            "it that a frame of this world sees"
            if most > 1
            else "1: these dynamics draw one frame at a time"
        )
        raise ValueError(f"speculative_frames must be {limit}, got {frames!r}")
