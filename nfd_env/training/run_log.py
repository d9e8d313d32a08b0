"""What a run tells: TensorBoard's curves, and pictures in the run folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfd_env.files import atomic_write, writing


class RunLog:
    """Scalars and pictures by step; use ``open_log``."""

    def __init__(self, folder: Path, step: int) -> None:
        """Log into ``folder`` from ``step`` on; what an earlier run logged after it is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with writing(folder):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Add numbers to the curves ``group``/name."""
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def picture(self, picture: np.ndarray, step: int) -> None:
        """Add a picture, uint8 RGB (H, W, 3), also as ``samples/STEP.png``."""
        with writing(self._folder):
            self._writer.add_image("samples", picture, step, dataformats="HWC")
            with atomic_write(self._folder / "samples" / f"{step:07d}.png") as temporary:
                Image.fromarray(picture).save(temporary)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


@contextmanager
def open_log(folder: Path, step: int) -> Iterator[RunLog]:
    """A log of ``folder`` from ``step`` on, closed with the block.

    Raises:
        FolderError: when it cannot be written.
    """
    # TensorBoard writes in a thread of its own, whose error is raised again at the next call; the
    # thread's own traceback tells nobody more.
    show = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, OSError):
            show(args)

    threading.excepthook = quiet
    try:
        log = RunLog(folder, step)
        try:
            yield log
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                log.close()
            raise
        with writing(folder):
            log.close()
    finally:
        threading.excepthook = show
