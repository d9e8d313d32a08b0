"""Which code the real game behind somebody else's world may bring in."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.sources.source import SourceConfig, SourceError

# Published packages of games: importing one runs its authors' code, not that of a world's author.
GAME_PACKAGES = frozenset(
    {
        "ale_py",
        "box2d",
        "crafter",
        "envpool",
        "flappy_bird_gymnasium",
        "gym_super_mario_bros",
        "gymnasium",
        "gymnasium_robotics",
        "highway_env",
        "metaworld",
        "minigrid",
        "minihack",
        "miniworld",
        "mo_gymnasium",
        "nle",
        "pettingzoo",
        "procgen",
        "procgen2",
        "pygame",
        "retro",
        "stable_retro",
        "vizdoom",
    }
)

# Names and pictures only, see ``SourceConfig``; the identifier is looked at on its own.
_HARMLESS = ("env_id", "imports", "key", "frames", "action_names", "keys")


class UntrustedWorldError(SourceError):
    """A world's real game would run code that nobody has agreed to."""


def check_trusted(source: SourceConfig, folder: Path) -> None:
    """Refuse a real game that would import anything but a known package of games.

    A module that the caller has imported already is his own choice. A ``kwargs`` value that names a
    file or "module:attribute" is refused too: games run scripts and programs that they are told.

    Raises:
        UntrustedWorldError: naming what it would run.
    """
    modules = list(source.imports)
    if ":" in source.env_id:
        modules.append(source.env_id.split(":")[0])
    for module in modules:
        known = module in sys.modules or _installed(module.split(".")[0], folder)
        if not (known and re.fullmatch(r"\w+(\.\w+)*", module)):
            raise _error(folder, f"import {module!r}, which is no known package of games")
    values = config.to_dict(source)
    for name, value in values.items():
        for text in () if name in _HARMLESS else _strings(value):
            if re.search(r"[:/\\~]", text):
                raise _error(
                    folder, f"be given {text!r} in {name}, which may be a file or a module"
                )


def _installed(package: str, folder: Path) -> bool:
    """Whether it is a known package, and not a file that came along or lies about."""
    spec = importlib.util.find_spec(package) if package in GAME_PACKAGES else None
    if spec is None:
        return package in GAME_PACKAGES  # which is not there, and the game will say so
    homes = {
        Path(p).resolve().parent for p in spec.submodule_search_locations or [spec.origin or ""]
    }
    return not homes & {p.resolve() for p in (Path.cwd(), folder, folder.parent)}


def _error(folder: Path, reason: str) -> UntrustedWorldError:
    return UntrustedWorldError(
        f"{folder}: the real game of this world would {reason}. That can run any program. If you "
        "made the world or know who did, say trust=True (--trust on the command line)"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _strings(part)
