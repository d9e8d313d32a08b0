"""ViZDoom writes where it runs: each game gets a temporary folder to run in."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import gymnasium

from nfd_env.files import FolderError, FolderInUseError, Ownership

_PREFIX = "nfd_game_"
_BEGUN = f".{_PREFIX}"  # not yet owned


class OwnFolder(gymnasium.Wrapper):
    """Runs a ViZDoom game in a temporary folder of its own; other environments are left alone.

    The game makes ``_vizdoom/`` and ``_vizdoom.ini`` in the folder that it is started in. There
    they are litter, and two games that make them at once fail or hang. The folder of a process is
    no setting of ViZDoom's, so the game is started through a script that changes it.

    A process that is killed cannot remove its folders: the next one that starts a game does.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Wrap ``env`` before its first reset, at which the game is started."""
        super().__init__(env)
        self._remove: weakref.finalize | None = None
        game: Any = getattr(env.unwrapped, "game", None)
        if os.name != "posix" or not hasattr(game, "set_vizdoom_path"):
            return
        _remove_left_behind()
        begun = Path(tempfile.mkdtemp(prefix=_BEGUN))
        ownership = Ownership(begun)
        # From now on others see it, and whose it is: the lock is the file's, whatever its path.
        folder = begun.rename(begun.with_name(begun.name.removeprefix(".")))
        # Also of a game that nobody closes.
        self._remove = weakref.finalize(self, _remove, folder, ownership)
        script = folder / "game"
        import vizdoom

        default = Path(vizdoom.__file__).parent / "vizdoom"
        program = shlex.quote(os.path.abspath(game.get_vizdoom_path() or default))
        script.write_text(
            f'#!/bin/sh\ncd {shlex.quote(str(folder))} && exec {program} "$@"\n',
            encoding="utf-8",
        )
        script.chmod(0o700)
        if not os.access(script, os.X_OK):  # no programs are run from this file system
            self._remove()
            return
        for kind in ("doom_game", "doom_scenario"):  # paths that are relative to this folder here
            path = getattr(game, f"get_{kind}_path")()
            if path:
                getattr(game, f"set_{kind}_path")(os.path.abspath(path))
        game.set_vizdoom_path(str(script))

    def close(self) -> None:
        """Stop the game and remove its folder."""
        super().close()
        if self._remove is not None:
            self._remove()


def _remove(folder: Path, ownership: Ownership) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    ownership.release()


def _remove_left_behind() -> None:
    """Remove this user's folders of processes that have been killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            told = folder.lstat()
            if told.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
                continue
            _remove(folder, Ownership(folder))
        except (FolderInUseError, FolderError, OSError):
            continue
