"""Which number format networks compute in: decided by what the processor can do, not by a clock."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
PRECISIONS = ("auto", "fp32", "bf16")


class PrecisionError(ValueError):
    """A number format that does not exist, or that this processor cannot compute in."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of ``precision`` ("fp32" or "bf16")."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def stepping(function: _F) -> _F:
    """Compute without gradients and in the world's own number format, whatever its user has set.

    Under a caller's autocast a state would keep numbers that no later step can go on with.
    """

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return alone  # type: ignore[return-value]


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve "auto", "fp32" or "bf16" to one of the last two, always the same on one machine.

    "auto" is bf16 where the processor multiplies it in hardware: a CPU with AMX or AVX512-BF16, an
    NVIDIA GPU of compute capability 8.0 or later; fp32 anywhere else.

    Raises:
        PrecisionError: on another name, or when bf16 is asked for where there is none at all.
    """
    if precision not in PRECISIONS:
        raise PrecisionError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if precision == "bf16" and not computes_bf16(device):
        raise PrecisionError(
            f"precision='bf16' was asked for, which this machine's {device.type} processor cannot "
            "compute in; use precision='fp32', or 'auto' for what suits it"
        )
    return precision


@functools.cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for products of bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    flags = _processor_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.cache
def _processor_flags() -> frozenset[str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def computes_bf16(device: torch.device) -> bool:
    """Whether ``device`` can compute in bf16 at all, be it slowly; see also ``multiplies_bf16``."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True  # in plain code, where there is none for oneDNN to refuse
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
