"""Weights that a training begins with, by their file or by the world that has them."""

from __future__ import annotations

from pathlib import Path

from nfd_env.files import found_file
from nfd_env.models.weights import CheckpointError
from nfd_env.worlds.load import UnknownWorldError, find_world


def initial_weights(named: str, part: str) -> Path:
    """The file of the weights.

    Args:
        named: a file, or a world as ``find_world`` takes it.
        part: of the world, "tokenizer", "dynamics" or "heads".

    Raises:
        CheckpointError: when there is neither such a file nor such a world.
    """
    path = Path(named).expanduser()
    if not path.is_dir() and found_file(path, CheckpointError):
        return path
    try:
        return find_world(named) / f"{part}.safetensors"
    except UnknownWorldError:
        raise CheckpointError(f"{named}: no such checkpoint, and no such world") from None
