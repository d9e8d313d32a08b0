"""Progress bars that do not flood a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm


def progress_bar(items: Sequence[int], label: str, show: bool) -> tqdm[int]:
    """Iterate over ``items`` under a bar; where stderr is no terminal, it is rarely printed."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, desc=label, disable=not show, mininterval=seconds, maxinterval=seconds)
