"""What the window keeps of a play: a film, and recordings for ``nfd train``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env.files import FolderError, FolderInUseError, atomic_write
from nfd_env.play.drift import save_trail
from nfd_env.play.game import Game
from nfd_env.play.recorder import PlayRecorder
from nfd_env.play.recording import VideoFile, display_size
from nfd_env.play.session import Session


class Files:
    """Starts and ends films and recordings."""

    def __init__(
        self,
        game: Game,
        session: Session,
        source: dict[str, Any],
        folder: str | Path | None,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is kept yet.

        Args:
            game: what is played.
            session: whose play is kept.
            source: source section of the data set, plain values.
            folder: of the data set; None for one that is named after the game.
            say: told what happens.
        """
        self._game, self._session, self._source, self._say = game, session, source, say
        self._folder = Path(folder or f"recordings-{game.name}")
        self._video: VideoFile | None = None
        self._video_path = Path()
        self._recorder: PlayRecorder | None = None

    @property
    def filming(self) -> bool:
        """Whether an MP4 is being recorded."""
        return self._video is not None

    @property
    def saving(self) -> bool:
        """Whether the play is appended to a data set."""
        return self._recorder is not None and not self._recorder.ended

    def add(self, frame: np.ndarray) -> None:
        """A picture for the film."""
        video = self._video  # the window's thread may end it meanwhile
        if video is not None:
            video.add(frame)

    def start_film(self, path: Path) -> None:
        """Begin an MP4.

        Raises:
            OSError: when it cannot be written.
        """
        pixelated = self._game.display == "pixelated"
        size = display_size(self._game.frame_shape, self._game.display_aspect, 288, pixelated)
        try:
            self._video = VideoFile(path, self._game.fps, size, pixelated)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{path} cannot be written: {reason}") from None
        self._video_path = path
        self._say(f"recording {path}")

    def start_saving(self) -> None:
        """Begin to append the play to the data set.

        Raises:
            RecordingError: when the folder holds recordings of something else.
            FolderError, FolderInUseError: when it cannot be written.
        """
        game, session = self._game, self._session
        recorder = PlayRecorder(
            self._folder, game.frame_shape, game.keymap.space, self._source, game.fps, self._failed
        )
        if session.frame is not None and not session.over:
            recorder.began(session.frame, session.seed)
        self._recorder = session.recorder = recorder
        self._say(f"saving the play in {self._folder}")

    def toggle_film(self, shown: np.ndarray | None) -> None:
        """Begin or end an MP4 in the current folder; ``shown`` is its first picture."""
        if self._video is not None:
            return self.stop_film()
        try:
            self.start_film(Path(f"nfd-play-{time.strftime('%Y%m%d-%H%M%S')}.mp4"))
        except OSError as error:
            return self._say(str(error))
        if shown is not None:
            self.add(shown)

    def toggle_saving(self) -> None:
        """Begin or end saving the play."""
        saving = self.saving
        self.stop_saving()
        if saving:
            return
        try:
            self.start_saving()
        except (ValueError, OSError, FolderError, FolderInUseError) as error:
            self._say(f"cannot save: {error}")

    def keep_trail(self) -> None:
        """Write what led to a red frame, in the current folder."""
        path = Path(f"nfd-drift-{time.strftime('%Y%m%d-%H%M%S')}.npz")
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as target:
                save_trail(tuple(self._session.trail), target, self._session.seed)
            self._say(f"wrote {path}")
        except (ValueError, OSError) as error:
            self._say(str(error))

    def stop_film(self) -> None:
        """Finish the MP4."""
        video, self._video = self._video, None
        if video is not None:
            try:
                video.close()
                self._say(f"wrote {self._video_path}")
            except OSError as error:
                self._failed(str(error))

    def stop_saving(self) -> None:
        """Commit what was played last."""
        recorder, self._recorder, self._session.recorder = self._recorder, None, None
        if recorder is not None:
            recorder.close()
            if not recorder.error:
                self._say(f"{recorder.saved} episodes saved in {recorder.folder}")

    def _failed(self, why: str) -> None:
        self._say(why)
        print(f"nfd play: {why}", file=sys.stderr, flush=True)
