"""A network's weights on disk: safetensors, with its config in the header; never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nfd_env import config

M = TypeVar("M", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint cannot be used: missing, damaged, or of something else."""


def save_weights(
    path: str | Path, network: nn.Module, settings: Any, dtype: torch.dtype | None = None
) -> None:
    """Write ``network``'s state and its config dataclass ``settings``, all or nothing.

    Args:
        path: the file to write.
        network: whose state_dict is written.
        settings: the dataclass that ``network`` was built from.
        dtype: convert floating-point tensors to this type first, e.g. ``torch.float16``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t)
        .detach()
        .cpu()
        .contiguous()
        for name, t in network.state_dict().items()
    }
    header = {"class": type(network).__name__, "config": json.dumps(config.to_dict(settings))}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, path)


def load_weights(path: str | Path, network_type: type[M], config_type: type) -> M:
    """Build a ``network_type`` from the file's own config and load its weights as float32.

    Raises:
        CheckpointError: when the file is missing, damaged, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    if header.get("class") != network_type.__name__:
        raise CheckpointError(
            f"{path}: holds a {header.get('class', 'foreign checkpoint')}, "
            f"not a {network_type.__name__}"
        )
    try:
        settings = config.from_mapping(config_type, json.loads(header["config"]), "its config")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no usable config: {error}") from None
    network = network_type(settings)
    try:
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit its own config: {error}") from None
    return network.eval()
