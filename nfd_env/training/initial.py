"""Weights that a training begins with, by their file or by the world that has them."""

from __future__ import annotations

from pathlib import Path

from nfd_env.files import found_file
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, load_weights
from nfd_env.worlds.load import UnknownWorldError, find_world

_PARTS = {"flow": "dynamics", "distill": "dynamics"}  # of a world, where not called as the stage


def initial_weights(named: str, stage: str) -> Path:
    """The file of the weights.

    Args:
        named: a file, or a world as ``find_world`` takes it.
        stage: that begins with them, "tokenizer", "flow", "heads" or "distill".

    Raises:
        CheckpointError: when there is neither such a file nor such a world.
    """
    path = Path(named).expanduser()
    if not path.is_dir() and found_file(path, CheckpointError):
        return path
    try:
        return find_world(named) / f"{_PARTS.get(stage, stage)}.safetensors"
    except UnknownWorldError:
        raise CheckpointError(f"{named}: no such checkpoint, and no such world") from None


def begin_tokenizer(network: Tokenizer, named: str) -> None:
    """Begin with another's weights, see ``Tokenizer.begin_with``.

    Raises:
        CheckpointError: when there are none, or they do not fit.
    """
    learned = load_weights(initial_weights(named, "tokenizer"), Tokenizer, TokenizerConfig)
    try:
        network.begin_with(learned)
    except ValueError as error:
        raise CheckpointError(f"{named} {error}") from None


def begin_motion(network: Dynamics, named: str) -> None:
    """Begin with another's convolutions, see ``LocalMotion.begin_with``.

    Raises:
        CheckpointError: when there are none, or they do not fit.
    """
    learned = load_weights(initial_weights(named, "flow"), Dynamics, DynamicsConfig)
    if network.local is None or learned.local is None:
        none = named if learned.local is None else "model.recent 0"
        raise CheckpointError(f"{none} has no convolutions")
    try:
        network.local.begin_with(learned.local)
    except ValueError as error:
        raise CheckpointError(f"{named} {error}") from None
