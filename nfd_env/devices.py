"""What computes: the processor or a GPU, named as a user names it."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


def resolve_device(device: str | torch.device) -> torch.device:
    """Resolve "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        DeviceError: when it is not there; there is no silent fallback.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device={str(device)!r} was asked for, but torch sees no CUDA GPU here; "
            "use device='cpu' or device='auto'"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{resolved} was asked for, there are {torch.cuda.device_count()} GPUs")
    return resolved
