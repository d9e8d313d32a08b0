"""Measured tables, put into a document by the command that measures them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nfd_env.files import atomic_write, found_file


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
