"""What players of the page do, as recordings that ``nfd train`` reads."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from pathlib import Path

from nfd_env import config
from nfd_env.files import FolderError, make_folder
from nfd_env.play.game import Game
from nfd_env.play.recorder import PlayRecorder

log = logging.getLogger(__name__)


class Saver:
    """Keeps a data set a world; every player who is there at a time has a writer in it."""

    def __init__(self, folder: str | Path, prefix: str = "") -> None:
        """Of ``folder``, which the data sets lie in, each named after its world.

        ``prefix`` of the writers' names keeps several servers apart.

        Raises:
            FolderError: when it cannot be made or written to.
        """
        self._prefix = prefix
        self._folder = make_folder(folder)
        try:
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise FolderError(f"{folder} cannot be written to: {error.strerror}") from None
        self._writing: dict[tuple[str, int], PlayRecorder] = {}
        self._lock = threading.Lock()

    def begin(self, name: str, game: Game) -> PlayRecorder:
        """Record one more player of a world.

        Raises:
            RecordingError: when the world's folder holds recordings of something else.
            FolderError: when it cannot be written to.
            FolderInUseError: when another server records there.
        """
        with self._lock:
            number = next(n for n in range(10**6) if (name, n) not in self._writing)
            source = {"env_id": game.name} if game.source is None else config.to_dict(game.source)
            recorder = PlayRecorder(
                self._folder / re.sub(r"[^\w-]", "_", name),  # it may be of a downloaded world
                game.frame_shape,
                game.keymap.space,
                source,
                game.fps,
                log.error,
                writer=f"page{self._prefix}{number}",
            )
            self._writing[name, number] = recorder
        return recorder

    def end(self, recorder: PlayRecorder) -> None:
        """Commit what a player did last."""
        recorder.close()
        with self._lock:
            self._writing = {k: r for k, r in self._writing.items() if r is not recorder}
