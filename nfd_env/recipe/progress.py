"""One view of how far the recipe is: the stage, its bar, and the time that is left for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

from nfd_env.progress import progress_bar


class Progress:
    """Announces stages, and draws a bar of the steps of the one that runs."""

    def __init__(self, stages: tuple[str, ...], say: Callable[[str], None], shown: bool) -> None:
        """Of ``stages`` in their order; ``say`` takes lines for the user."""
        self._stages, self._say, self._shown = stages, say, shown
        self._bar: tqdm | None = None
        self._title, self._later = "", 0.0
        self._first: tuple[float, int] | None = None

    def stage(self, name: str, expected: Mapping[str, float]) -> None:
        """Begin a stage.

        Args:
            name: of it.
            expected: seconds of the stages that are not finished, where they are known.
        """
        self.close()
        place = self._stages.index(name)
        self._title = f"[{place + 1}/{len(self._stages)}] {name}"
        self.expect(name, expected)
        left = self._later + expected.get(name, 0.0)
        self._say(self._title + (f": {_minutes(left)} left for all" if left else ""))

    def expect(self, name: str, expected: Mapping[str, float]) -> None:
        """What comes after the stage ``name`` takes so long, see ``stage``."""
        later = self._stages[self._stages.index(name) + 1 :]
        self._later = sum(expected.get(stage, 0.0) for stage in later)

    def __call__(self, done: int, total: int) -> None:
        """So many steps of the stage are done."""
        now = time.monotonic()
        if self._bar is None:
            self._bar = progress_bar(
                None,
                self._title,
                self._shown,
                total=total,
                initial=done,
                bar_format="{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}{postfix}",
            )
            self._first = now, done
        assert self._first is not None
        begun, first = self._first
        if done > first:
            left = (now - begun) / (done - first) * (total - done)
            text = f"{_minutes(left)} left, {_minutes(left + self._later)} for all"
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """The stage has ended."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._first = None


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"
