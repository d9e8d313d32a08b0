"""A run folder's training states: the latest, and an earlier one that has proved to be sound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from nfd_env.files import atomic_write, found_file, writing
from nfd_env.models.weights import CheckpointError
from nfd_env.training.divergence import RECENT


def read_state(path: Path, device: torch.device, keys: Collection[str]) -> dict[str, Any]:
    """The values of a training state, among them those called ``keys``.

    Raises:
        CheckpointError: when the file is damaged or not such a state.
    """
    found_file(path, CheckpointError)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        whole = isinstance(state, dict) and set(keys) <= state.keys()
        reason = "" if whole else "something else"
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        state, reason = {}, f"damaged, {type(error).__name__}"
    if reason:
        raise CheckpointError(f"{path}: no training state ({reason}): remove it to begin again")
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state, all or nothing.

    Raises:
        OSError: when it cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's own way to say that the disk is full
            raise OSError(str(error).splitlines()[0]) from None


class Checkpoints:
    """Reads and writes the states of one run folder, whose owner the process must be.

    ``state.pt`` is the latest. A state may look well and be ruined: the step before it was one too
    far, and the next losses will tell. So ``candidate-STEP.pt`` waits until as many good steps have
    followed as it takes to notice, and then becomes ``sound-STEP.pt``.
    """

    def __init__(self, folder: Path) -> None:
        """Of ``folder``."""
        self._folder, self.path = folder, folder / "state.pt"
        for left in folder.glob(".*.tmp.*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The latest state, None where there is none.

        Raises:
            CheckpointError: when the file is damaged or not a training state.
        """
        return self._read(self.path, device) if found_file(self.path, CheckpointError) else None

    def _read(self, path: Path, device: torch.device) -> dict[str, Any]:
        try:
            return read_state(path, device, ["step"])
        except CheckpointError as error:
            others = [p.name for p in self._stored("sound") if p != path]
            instead = f", or put {others[-1]} in its place" if others else ""
            raise CheckpointError(f"{error}{instead}") from None

    def write(self, state: dict[str, Any]) -> None:
        """Make ``state`` the latest one, all or nothing.

        Raises:
            FolderError: when it cannot be written; the one before is whole.
        """
        with writing(self._folder):
            write_state(self.path, state)
            for later in self._stored("sound", after=state["step"]):  # the run began again
                later.unlink()
            self._judge(state["step"])
            if not self._stored("candidate"):
                self._keep(state["step"])

    def _keep(self, step: int) -> None:
        """Keep the latest state under a name of its own, without writing it again if possible."""
        with atomic_write(self._folder / f"candidate-{step:08d}.pt") as temporary:
            temporary.unlink()  # a link is made where there is nothing
            try:
                os.link(self.path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(self.path, temporary)

    def _judge(self, step: int) -> None:
        """At ``step`` all losses were good: make what is old enough sound, drop what is later."""
        for path in self._stored("candidate"):
            if _step(path) + RECENT <= step:
                older = self._stored("sound")
                os.replace(path, path.with_name(path.name.replace("candidate", "sound")))
                for old in older:
                    old.unlink(missing_ok=True)
            elif _step(path) > step:
                path.unlink()

    def go_back(self, step: int, device: torch.device, **values: Any) -> int | None:
        """Make the newest state that was sound for long enough before ``step`` the latest one.

        Args:
            step: where the training diverged.
            device: to read to.
            values: put into the state.

        Returns:
            Its step; None where there is none, and then nothing is stored any more.

        Raises:
            FolderError: when it cannot be written.
        """
        with writing(self._folder):
            self._judge(step)
            for path in self._stored("candidate"):
                path.unlink()
            sound = self._stored("sound")
            if not sound:
                self.path.unlink(missing_ok=True)
                return None
            write_state(self.path, {**self._read(sound[-1], device), **values})
            return _step(sound[-1])

    def _stored(self, kind: str, after: int = -1) -> list[Path]:
        paths = [p for p in self._folder.glob(f"{kind}-*.pt") if p.stem.split("-")[1].isdigit()]
        return sorted(p for p in paths if _step(p) > after)


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])
