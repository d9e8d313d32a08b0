"""Progress bars that do not flood a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable[Any] | None, label: str, show: bool, **kwargs: Any) -> tqdm[Any]:
    """A bar over ``items``, or one to ``update`` by hand; in a log it is rarely printed.

    It also moves between items, when what it shows behind them changes. ``kwargs``: tqdm's.
    """
    often = 0.2 if sys.stderr.isatty() else 10.0  # seconds
    return tqdm(
        items, label, disable=not show, miniters=0, mininterval=often, maxinterval=often, **kwargs
    )
