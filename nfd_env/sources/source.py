"""The real game as a Gymnasium env with exactly a world's observations, actions and frame rate."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import gymnasium

from nfd_env.named import described
from nfd_env.sources.envpool_env import PREFIX, EnvPoolEnv
from nfd_env.sources.frames import FrameObservation
from nfd_env.sources.place import OwnPlace
from nfd_env.sources.processes import GUARD
from nfd_env.sources.spec import (
    PRESENTATION,
    GameFailedError,
    SourceConfig,
    SourceError,
    is_imported,
)
from nfd_env.sources.vizdoom import OwnFolder
from nfd_env.stopping import asked_by_signal

__all__ = ["PRESENTATION", "SourceConfig", "SourceError", "make_source"]


def make_source(source: SourceConfig, **kwargs: Any) -> gymnasium.Env:
    """Make the real environment that ``source`` describes, observing uint8 RGB (H, W, 3) frames.

    Args:
        source: what to make.
        kwargs: further arguments of ``gymnasium.make``, over those in ``source.kwargs``.

    Raises:
        SourceError: when a needed package is not installed, an argument is unknown, or the
            environment has no RGB frames.
    """
    if is_imported(source.env_id):
        raise SourceError(
            f"{source.env_id} are recordings that were made elsewhere: there is no game to make"
        )
    for module in source.imports:
        _import(module, source.env_id)
    arguments = {**source.kwargs, **kwargs}
    if source.frames == "render":
        arguments.setdefault("render_mode", "rgb_array")
    # What is observed can be shown without the game's help.
    shows = source.frames == "observation" and arguments.get("render_mode") == "rgb_array"
    if shows:
        del arguments["render_mode"]
    place = OwnPlace()
    with GUARD.watching(), place.entered():
        env = OwnFolder(_make(source.env_id, arguments))
    try:
        return FrameObservation(env, source, "rgb_array" if shows else None, place)
    except BaseException as error:
        with suppress(Exception, SystemExit):
            env.close()
        cause = error.__cause__ if isinstance(error, GameFailedError) else error
        if isinstance(cause, SourceError) or not isinstance(cause, Exception):
            raise
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise SourceError(f"{source.env_id} fails at its first reset: {said}") from cause


def _import(module: str, env_id: str) -> None:
    """Import what registers the game; raises SourceError, whatever its code does."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever foreign code may raise
        if asked_by_signal(error):
            raise
        package = module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            raise SourceError(
                f"the real game {env_id} needs the package {package!r}: pip install {package}, or, "
                f"where it is a module of your own, start in the folder that it lies in ({error})"
            ) from None
        raise SourceError(
            f"the real game {env_id} needs {module!r}, which cannot be imported: {described(error)}"
        ) from error


def _make(env_id: str, arguments: dict[str, Any]) -> gymnasium.Env:
    try:
        if env_id.startswith(PREFIX):
            return EnvPoolEnv(env_id.removeprefix(PREFIX), **arguments)
        return gymnasium.make(env_id, **arguments)
    except KeyboardInterrupt:
        raise
    # Whatever the game's own code raises, Rust's too; it is shown behind this with --debug.
    except BaseException as error:
        if asked_by_signal(error):
            raise
        if isinstance(error, TypeError) and "render_mode" in str(error) and arguments:
            left = {k: v for k, v in arguments.items() if k != "render_mode"}
            if len(left) < len(arguments):  # it has no such argument, and may render all the same
                return _make(env_id, left)
        hint = "; see source.kwargs" if isinstance(error, TypeError) else ""
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0]}" if hint or not lines[0] else lines[0]
        raise SourceError(f"the real game {env_id} cannot be made: {said}{hint}") from error
