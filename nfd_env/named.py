"""Foreign code: classes that a user names as ``module:attribute``, and files that run code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any


class UntrustedError(ValueError):
    """A file could run its author's code, and nobody has said that the author is trusted."""


def look_here() -> None:
    """Let modules in the current folder be found, behind all that are installed.

    A console script does not look where it is started. At the end, so that a file that lies there
    by chance hides no installed module.
    """
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        return
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)


def import_named(name: str) -> Any:
    """What ``name``, "module:attribute", stands for.

    Modules in the current folder are found too, behind all that are installed.

    Raises:
        ValueError: when there is no such module, nothing of that name in it, or it cannot be run.
    """
    module, _, attribute = name.partition(":")
    look_here()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module's own code does
        kind = (
            "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
        )
        raise ValueError(f"{name!r} cannot be imported: {kind}{error}") from None


def described(error: BaseException) -> str:
    """An error in one line, with the place in foreign code that it comes from."""
    if type(error).__module__.startswith("nfd_env."):  # which is said for people already
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def check_trusted(path: str | os.PathLike[str], trust: bool) -> None:
    """Refuse a Stable-Baselines3 file unless its author may run code here.

    Raises:
        UntrustedError: says why, and what to do.
    """
    if trust is not True:  # nothing that only looks like consent, such as "no"
        raise UntrustedError(
            f"{os.fspath(path)}: loading a Stable-Baselines3 file runs whatever code its author "
            "put into it (it holds pickled objects). If it is your own, or you trust who made it, "
            "say so: --trust on the command line, trust=True in Python, trust: true in a policy's "
            "kwargs. Agents of nfd_env (.safetensors) hold numbers only and need no trust"
        )
