"""A person's play as recordings that ``nfd train`` reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.data.episode import Episode
from nfd_env.data.shards import DatasetSpec, RecordedDataset, ShardWriter
from nfd_env.play.game import Outcome
from nfd_env.spaces import ActionCodec, space_to_dict

_COMMIT_EVERY = 2.0  # seconds of play that a kill or a power cut may cost
_VALIDATION_EVERY = 10  # episodes to train on for each that is held out, after the first one


class _Stretch:
    """A part of an episode that is not on disk yet; it begins with a frame that may be."""

    def __init__(self, frame: np.ndarray, seed: int) -> None:
        self.frames, self.seed = [frame], seed
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.ends: list[tuple[bool, bool]] = []
        self.players: set[str] = set()  # of the whole episode
        self.committed = 0  # transitions of the episode that are on disk
        self.follows = False  # another segment of the episode before

    def __len__(self) -> int:
        return len(self.actions)

    def rest(self) -> _Stretch:
        """What follows once this is on disk."""
        rest = _Stretch(self.frames[-1], self.seed)
        rest.players, rest.committed = set(self.players), self.committed + len(self)
        rest.follows = self.follows
        return rest

    def episode(self, split: str) -> Episode:
        ends = np.array(self.ends, bool)
        return Episode(
            np.stack(self.frames),
            np.stack(self.actions),
            np.array(self.rewards, np.float32),
            ends[:, 0],
            ends[:, 1] & ~ends[:, 0],
            seed=self.seed,
            policy="+".join(sorted(self.players)),
            split=split,
        )


class PlayRecorder:
    """Appends episodes of play to a data set; a segment begins with the picture shown then.

    A thread of its own commits what was played every few seconds, so that neither a slow disk holds
    up the game nor a kill costs more than that. An error, of a full disk for instance, ends the
    recording, not the game; what was committed before stays.
    """

    def __init__(
        self,
        folder: str | Path,
        frame_shape: tuple[int, ...],
        space: spaces.Space,
        source: dict[str, Any],
        fps: float,
        failed: Callable[[str], None],
        limit: int = 4000,
        writer: str = "play",
    ) -> None:
        """Open ``folder``, a new data set or one of the same world.

        Args:
            folder: see ``nfd_env.data.shards``.
            frame_shape: (H, W, 3).
            space: the action space.
            source: the world's source section, plain values.
            fps: frames a second.
            failed: told, in a line, why the recording has ended; on the recorder's thread.
            limit: transitions after which an episode is cut off and another segment begins, because
                readers load whole episodes.
            writer: of several at a time in one folder.

        Raises:
            RecordingError: when the folder holds recordings of something else.
            FolderError: when it cannot be written.
            FolderInUseError: when somebody else's play is recorded there.
        """
        codec = ActionCodec(space)
        spec = DatasetSpec(
            frame_shape=(frame_shape[0], frame_shape[1], 3),
            action_shape=codec.shape,
            action_dtype=str(np.dtype(space.dtype or np.int64)),
            action_space=space_to_dict(space),
            source=source,
            fps=fps,
        )
        self.folder = Path(folder).expanduser()
        self._limit, self._failed = limit, failed
        spec.save(self.folder)
        self._writer = ShardWriter(self.folder, spec, writer)
        self.saved = 0
        self._split = "train"  # of the last episode
        self._counts = Counter(e.split for e in RecordedDataset(self.folder))
        self.ended = False  # nothing is recorded any more
        self.error = ""  # why, when it was not asked to end
        self._waiting: list[_Stretch] = []
        self._now: _Stretch | None = None  # the last one of those that wait
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def began(self, frame: np.ndarray, seed: int | None) -> None:
        """An episode (or a segment of one) begins with ``frame``."""
        with self._changed:
            self._begin(frame, seed or 0)

    def took(self, action: Any, outcome: Outcome, by_agent: bool) -> None:
        """``action`` led to ``outcome``."""
        with self._changed:
            now = self._now
            if now is None or self.ended:
                return
            if outcome.error:  # the game failed: its last picture again is none of its frames
                self._now = None
                return
            now.frames.append(outcome.frame)
            now.actions.append(np.array(action))
            now.rewards.append(outcome.reward)
            now.ends.append((outcome.terminated, outcome.truncated))
            who = "agent" if by_agent else "person"
            now.players.add(f"{who}:dream" if outcome.dreamed else who)
            if outcome.terminated or outcome.truncated:
                self._now = None
            elif now.committed + len(now) >= self._limit:
                self._begin(outcome.frame, now.seed, follows=True)

    def close(self) -> None:
        """Commit what was played, and let others record into the folder.

        An episode under way reads as truncated.
        """
        with self._changed:
            self.ended = True
            self._changed.notify()
        self._thread.join()
        self._writer.close()

    def _begin(self, frame: np.ndarray, seed: int, follows: bool = False) -> None:
        if not self.ended:
            self._now = _Stretch(frame, seed)
            self._now.follows = follows
            self._waiting.append(self._now)

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self.ended, _COMMIT_EVERY)
                ended, stretches, self._waiting = self.ended, self._waiting, []
                if self._now is not None:
                    self._now = self._now.rest()
                    self._waiting.append(self._now)
            try:
                for stretch in stretches:
                    self._commit(stretch)
            except Exception as error:  # of the disk, or a game that breaks its own word
                with self._changed:
                    ended, self.ended = True, True
                    self._waiting, self._now = [], None
                self.error = (
                    f"the recording in {self.folder} has ended: {' '.join(str(error).split())}; "
                    f"what was committed before is whole ({self.saved} episodes)"
                )
                self._failed(self.error)

    def _commit(self, stretch: _Stretch) -> None:
        if not len(stretch):
            return
        if stretch.committed:
            return self._writer.extend(stretch.episode(self._split))
        if not stretch.follows:
            held_out = self._counts["validation"] * _VALIDATION_EVERY < self._counts["train"]
            self._split = "validation" if held_out else "train"
        self._writer.add(stretch.episode(self._split))
        self._counts[self._split] += 1
        self.saved += 1
