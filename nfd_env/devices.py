"""What computes: the processor or a GPU, named as a user names it."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


def resolve_device(device: str | torch.device) -> torch.device:
    """Resolve "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    "mps" is Apple's Metal. It is accepted, but nobody has measured it: "auto" does not choose it.

    Raises:
        DeviceError: when it is not there; there is no silent fallback.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:N or mps")
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if resolved.type in present and not present[resolved.type]():
        kind = {"cuda": "CUDA", "mps": "Metal"}[resolved.type]
        raise DeviceError(
            f"device={str(device)!r} was asked for, but torch sees no {kind} GPU here; "
            "use device='cpu' or device='auto'"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{resolved} was asked for, there are {torch.cuda.device_count()} GPUs")
    return resolved
