"""Which number format a machine computes fastest in."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of ``precision`` ("fp32" or "bf16")."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@functools.cache
def fastest_precision(device: torch.device, advantage: float = 1.2) -> str:
    """Return "bf16" if bf16 products are ``advantage`` times as fast as fp32, else "fp32".

    Measured once a process on this machine.
    """
    rows, width = (1024, 512) if device.type == "cpu" else (8192, 8192)  # a GPU wants to be filled
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(rows, width, device=device, dtype=dtype)
        b = torch.randn(width, rows, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            (a @ b).sum().item()
            times.append(time.perf_counter() - begin)
        rates[name] = 1 / min(times)
    return "bf16" if rates["bf16"] > advantage * rates["fp32"] else "fp32"
