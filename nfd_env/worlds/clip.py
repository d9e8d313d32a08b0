"""A recorded episode that lies in a world folder, to play along with: frames and actions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nfd_env.files import found_file
from nfd_env.models.weights import CheckpointError, save_tensors
from nfd_env.video import read_mp4, write_mp4
from nfd_env.worlds.checksums import verify

_VIDEO, _ACTIONS = "clip.mp4", "clip.safetensors"


class NoClipError(CheckpointError):
    """A world has no recording to play along with, or too short a one."""


@dataclass(frozen=True)
class Clip:
    """A held-out recording.

    Attributes:
        frames: uint8 (T + 1, H, W, 3), T >= 1.
        actions: (T, ...), ``actions[t]`` leads from ``frames[t]`` to ``frames[t + 1]``.
    """

    frames: np.ndarray
    actions: np.ndarray


def save_clip(folder: Path, clip: Clip, fps: float) -> None:
    """Write ``clip`` into a world folder; ``fps`` frames a second."""
    write_mp4(folder / _VIDEO, clip.frames, fps, crf=20, exact=True)
    save_tensors(folder / _ACTIONS, {"actions": torch.from_numpy(clip.actions.copy())})


def load_clip(folder: Path) -> Clip:
    """The clip of a world folder.

    Raises:
        NoClipError: when the world has none.
        CheckpointError: when a file is damaged, or the other one missing.
    """
    if not any([found_file(folder / name, CheckpointError) for name in (_ACTIONS, _VIDEO)]):
        raise NoClipError(f"{folder} has no {_VIDEO} to play along with")
    verify(folder, _VIDEO, _ACTIONS)
    try:
        actions = np.atleast_1d(load_file(folder / _ACTIONS, device="cpu")["actions"].numpy())
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _ACTIONS}: missing or damaged ({error})") from None
    try:
        frames = read_mp4(folder / _VIDEO, len(actions) + 1)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not 0 < len(actions) == len(frames) - 1:
        raise CheckpointError(
            f"{folder}: {_VIDEO} has {len(frames)} frames and {_ACTIONS} {len(actions)} actions"
        )
    return Clip(frames, actions)
