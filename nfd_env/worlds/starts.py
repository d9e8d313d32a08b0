"""The recorded moments that episodes start from, as a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nfd_env.files import found_file
from nfd_env.inference.state import Context
from nfd_env.models.weights import CheckpointError, neutral_torch, save_tensors

LARGEST = 65504.0  # in size, of the numbers of a start: half precision, which files are in


def load_starts(path: str | os.PathLike[str], shape: tuple[int, ...], width: int) -> list[Context]:
    """The recorded moments in a file of ``save_starts``, such as a world's starts.safetensors.

    Args:
        path: the file.
        shape: (C, h, w) of a latent of the world that is to start from them.
        width: of its encoded actions.

    Returns:
        Contexts as they are stored, in half precision.

    Raises:
        CheckpointError: when the file is missing, damaged or of another world.
    """
    path = Path(path).expanduser()
    found_file(path, CheckpointError)
    try:
        tensors = load_file(path, device="cpu")
        latents, actions = tensors["latents"], tensors["actions"]
        # Worlds written before there was a choice start at beginnings only.
        with neutral_torch():
            flags = tensors.get("beginning", torch.ones(len(latents), dtype=torch.uint8))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    fits = latents.shape[2:] == shape and actions.shape == (*latents.shape[:2], width)
    if not (fits and flags.shape == latents.shape[:1] and latents.numel()):
        raise CheckpointError(f"{path}: holds start frames of another world")
    for name, tensor in (("latents", latents), ("actions", actions)):
        if not (tensor.is_floating_point() and float(tensor.float().abs().max()) <= LARGEST):
            raise CheckpointError(
                f"{path}: {name} must be numbers from {-LARGEST:g} to {LARGEST:g}"
            )
    beginnings = flags.bool().tolist()
    return [Context(*start) for start in zip(latents, actions, beginnings, strict=True)]


def save_starts(path: str | os.PathLike[str], starts: Sequence[Context]) -> None:
    """Write contexts of equal length for ``load_starts``, in half precision.

    Raises:
        CheckpointError: when a number is NaN or infinite, or too large for half precision.
    """
    latents, actions = (
        torch.stack([getattr(s, name).cpu() for s in starts]).half().contiguous()
        for name in ("latents", "actions")
    )
    if not (torch.isfinite(latents).all() and torch.isfinite(actions).all()):
        raise CheckpointError(f"{path}: starts hold NaN or infinity")
    flags = torch.tensor([s.beginning for s in starts], dtype=torch.uint8, device="cpu")
    save_tensors(path, {"latents": latents, "actions": actions, "beginning": flags})
