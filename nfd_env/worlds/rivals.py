"""Other kinds of dynamics than a world's own, by name; nothing else in the package knows them.

A rival is a module with two functions: ``find(folder)``, its files for the world in a folder, or
none; and ``load(name, world, precision)``, a ``WorldModel`` of them that draws that world's frames.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_AUTOREGRESSIVE = "nfd_env.baselines.model"
RIVALS = {"autoregressive": _AUTOREGRESSIVE, "autoregressive_parallel": _AUTOREGRESSIVE}


def rival(name: str) -> Any:
    """The module of one of ``RIVALS``."""
    return importlib.import_module(RIVALS[name])


def rivals_of(folder: Path) -> dict[str, list[Path]]:
    """Those of ``RIVALS`` that there are for the world in ``folder``, and their files."""
    found = {name: rival(name).find(folder) for name in RIVALS}
    return {name: files for name, files in found.items() if files}
