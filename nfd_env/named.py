"""Classes and functions that a user names as ``module:attribute``."""

from __future__ import annotations

import importlib
from typing import Any


def import_named(name: str) -> Any:
    """What ``name``, "module:attribute", stands for.

    Raises:
        ValueError: when there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
