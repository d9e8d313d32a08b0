"""The real game as a Gymnasium env with exactly a world's observations, actions and frame rate."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import gymnasium

from nfd_env.sources.envpool_env import PREFIX, EnvPoolEnv
from nfd_env.sources.frames import FrameObservation
from nfd_env.sources.processes import GUARD
from nfd_env.sources.spec import (
    PRESENTATION,
    GameFailedError,
    SourceConfig,
    SourceError,
    is_imported,
)
from nfd_env.sources.vizdoom import OwnFolder

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
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.split(".")[0]
            raise SourceError(
                f"the real game {source.env_id} needs the package {package!r}: "
                f"pip install {package} ({error})"
            ) from None
    arguments = {**source.kwargs, **kwargs}
    if source.frames == "render":
        arguments.setdefault("render_mode", "rgb_array")
    # What is observed can be shown without the game's help.
    shows = source.frames == "observation" and arguments.get("render_mode") == "rgb_array"
    if shows:
        del arguments["render_mode"]
    with GUARD.watching():
        env = OwnFolder(_make(source.env_id, arguments))
    try:
        return FrameObservation(env, source, "rgb_array" if shows else None)
    except BaseException as error:
        with suppress(Exception, SystemExit):
            env.close()
        cause = error.__cause__ if isinstance(error, GameFailedError) else error
        if isinstance(cause, SourceError) or not isinstance(cause, Exception):
            raise
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise SourceError(f"{source.env_id} fails at its first reset: {said}") from cause


def _make(env_id: str, arguments: dict[str, Any]) -> gymnasium.Env:
    try:
        if env_id.startswith(PREFIX):
            return EnvPoolEnv(env_id.removeprefix(PREFIX), **arguments)
        return gymnasium.make(env_id, **arguments)
    # Whatever the game's own code raises; it is shown behind this with --debug.
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "render_mode" in str(error) and arguments:
            left = {k: v for k, v in arguments.items() if k != "render_mode"}
            if len(left) < len(arguments):  # it has no such argument, and may render all the same
                return _make(env_id, left)
        hint = "; see source.kwargs" if isinstance(error, TypeError) else ""
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0]}" if hint or not lines[0] else lines[0]
        raise SourceError(f"the real game {env_id} cannot be made: {said}{hint}") from error
