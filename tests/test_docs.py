"""What the documentation names is there: commands, flags, files, modules, arguments."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest

from nfd_env import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def code_of(path: Path) -> list[str]:
    """Lines of code blocks, and code within text, which may go over the end of a line."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    return [line for block in blocks for line in block.splitlines()] + inline


@functools.cache
def flags_of(command: str) -> set[str]:
    """Those that ``nfd COMMAND -h`` shows."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main([command, "-h"])
    return set(re.findall(r"--[a-z-]+", shown.getvalue()))


@page
def test_commands_and_their_flags(path: Path) -> None:
    for code in code_of(path):
        for name, arguments in re.findall(r"\bnfd ([a-z][a-z-]+)\b([^#]*)", code):
            assert name in cli.COMMANDS, code
            for flag in re.findall(r"--[a-z-]+", arguments):
                assert flag in flags_of(name), code
            if name == "eval-agent" and re.match(r" (random|\S+:\S|\S+\.zip)", arguments):
                assert "--world" in arguments, code  # these do not say what they play


@page
def test_files_and_modules(path: Path) -> None:
    for code in code_of(path):
        for name in re.findall(r"\b(?:nfd_env|agents|configs|examples|tests)/[\w/.*<>]*", code):
            if "<" not in name:
                found = list(ROOT.glob(name.rstrip("/.")))
                assert found, code
        for name in re.findall(r"\b(?:nfd_env|agents|examples)\.\w[\w.]*", code):
            assert exists(name), code


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if error.name and not name.startswith(error.name):
                pytest.skip(f"{error.name} is not installed")
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_the_drawings_of_the_architecture_name_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [n for block in text.split("```")[1::2] for n in re.findall(r"[\w/]+\.py\b", block)]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "nfd_env" / name).is_file()] == []


@page
def test_links(path: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        target = path.parent / link if link else path
        assert "://" in link or target.exists(), link
        assert "://" in link or not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as both GitHub and MkDocs name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_of_the_env_has_every_argument_and_option() -> None:
    from nfd_env.envs.checks import RESET_OPTIONS
    from nfd_env.envs.vector_env import NFDVectorEnv

    sections = (ROOT / "docs" / "env.md").read_text(encoding="utf-8").split("\n## ")
    rows = {s.splitlines()[0]: re.findall(r"^\| `(\w+)` \|", s, re.MULTILINE) for s in sections}
    parameters = set(inspect.signature(NFDVectorEnv.__init__).parameters) - {"self"}
    assert sorted(rows["Arguments"]) == sorted(parameters)
    assert set(rows["Reset options"]) == set(RESET_OPTIONS)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
