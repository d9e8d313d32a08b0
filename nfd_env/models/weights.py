"""A network's weights on disk: safetensors, with its config in the header; never pickle."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nfd_env import config

M = TypeVar("M", bound=nn.Module)

_SCALE = ".int8_scale"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: missing, damaged, or of something else."""


def save_weights(
    path: str | Path,
    network: nn.Module,
    settings: Any,
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> None:
    """Write ``network``'s state and its config dataclass ``settings``, all or nothing.

    Args:
        path: the file to write.
        network: whose state_dict is written.
        settings: the dataclass that ``network`` was built from.
        dtype: convert floating-point tensors to this type first, e.g. ``torch.float16``.
        int8: store matrices and kernels as one byte a weight and a float32 scale for each row
            (output), see ``with_int8_weights``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().cpu()
        if int8 and _is_matrix(tensor):
            tensors[name], tensors[name + _SCALE] = _to_int8(tensor)
        elif dtype is not None and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
        else:
            tensors[name] = tensor
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
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
        scales = {k: tensors.pop(k) for k in list(tensors) if k.endswith(_SCALE)}
        for name, scale in scales.items():
            plain = name.removesuffix(_SCALE)
            tensors[plain] = _from_int8(tensors[plain], scale)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: has a scale for {error}, but not its weights") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit its own config: {error}") from None
    return network.eval()


def with_int8_weights(network: M) -> M:
    """A copy of ``network`` with the weights that ``save_weights(int8=True)`` would bring back.

    Each row of a matrix, and each output of a kernel, is rounded to 255 multiples of its largest
    weight / 127, so that no weight is off by more than 1/254 of its row's largest.
    """
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in rounded.state_dict().values():
            if _is_matrix(tensor):
                tensor.copy_(_from_int8(*_to_int8(tensor)))
    return rounded


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor[0].numel() >= 16


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as int8, the same shape, and float32 scales (rows,)."""
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(1) / 127
    steps = rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8).view(tensor.shape), scale


def _from_int8(steps: Tensor, scale: Tensor) -> Tensor:
    return (steps.float().flatten(1) * scale[:, None]).view(steps.shape)
