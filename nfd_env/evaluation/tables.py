"""Measured tables, put into a document by the command that measures them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nfd_env.files import atomic_write, found_file


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(value: float | None, form: str = ".2f") -> str:
    """A measurement, or a dash where there is none."""
    return f"{value:{form}}" if value is not None and math.isfinite(value) else "–"


def told_with_error(value: float, error: float, form: str = ".4g") -> str:
    """A measurement ± its standard error, which a single sample does not have."""
    return f"{value:{form}} ± {error:.2g}" if math.isfinite(error) else told(value, form)


def report_json(report: Any) -> str:
    """A dataclass of figures as JSON, which knows no NaN: what could not be measured is null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [known(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(asdict(report)), indent=2, allow_nan=False)


def check_markers(path: str | Path, name: str) -> tuple[int, int]:
    """Where the text called ``name`` begins and ends in the file.

    Raises:
        ValueError: unless each of its two markers is there once, in this order.
        OSError: when the file cannot be read.
    """
    found_file(path, ValueError)
    text = Path(path).read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{path} needs the two lines {begin} and {end} once each, in this order; the text "
            "between them is replaced"
        )
    return text.index(begin) + len(begin), text.index(end)


def replace_between_markers(path: str | Path, name: str, content: str) -> None:
    """Replace the text called ``name`` in the file, all or nothing; see ``check_markers``."""
    path = Path(path)
    begin, end = check_markers(path, name)
    text = path.read_text(encoding="utf-8")
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text[:begin]}\n{content.strip()}\n{text[end:]}", encoding="utf-8")
