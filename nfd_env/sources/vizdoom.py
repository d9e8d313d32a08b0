"""ViZDoom writes where it runs: each game gets a temporary folder to run in."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import gymnasium


class OwnFolder(gymnasium.Wrapper):
    """Runs a ViZDoom game in a temporary folder of its own; other environments are left alone.

    The game makes ``_vizdoom/`` and ``_vizdoom.ini`` in the folder that it is started in. There
    they are litter, and two games that make them at once fail or hang. The folder of a process is
    no setting of ViZDoom's, so the game is started through a script that changes it.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Wrap ``env`` before its first reset, at which the game is started."""
        super().__init__(env)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        game: Any = getattr(env.unwrapped, "game", None)
        if os.name != "posix" or not hasattr(game, "set_vizdoom_path"):
            return
        self._folder = tempfile.TemporaryDirectory(
            prefix="nfd_vizdoom_", ignore_cleanup_errors=True
        )
        script = Path(self._folder.name) / "game"
        import vizdoom

        default = Path(vizdoom.__file__).parent / "vizdoom"
        program = shlex.quote(os.path.abspath(game.get_vizdoom_path() or default))
        script.write_text(
            f'#!/bin/sh\ncd {shlex.quote(self._folder.name)} && exec {program} "$@"\n',
            encoding="utf-8",
        )
        script.chmod(0o700)
        if not os.access(script, os.X_OK):  # no programs are run from this file system
            self._folder.cleanup()
            return
        for kind in ("doom_game", "doom_scenario"):  # paths that are relative to this folder here
            path = getattr(game, f"get_{kind}_path")()
            if path:
                getattr(game, f"set_{kind}_path")(os.path.abspath(path))
        game.set_vizdoom_path(str(script))

    def close(self) -> None:
        """Stop the game and remove its folder."""
        super().close()
        if self._folder is not None:
            self._folder.cleanup()
