"""Classes and functions that a user names as ``module:attribute``."""

from __future__ import annotations

import importlib
from typing import Any


def import_named(name: str) -> Any:
    """What ``name``, "module:attribute", stands for.

    Raises:
        ValueError: when there is no such module, nothing of that name in it, or it cannot be run.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module's own code does
        kind = (
            "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
        )
        raise ValueError(f"{name!r} cannot be imported: {kind}{error}") from None
