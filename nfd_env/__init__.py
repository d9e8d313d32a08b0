"""Learned game worlds as batched Gymnasium environments.

Importing this package only registers environment ids; torch is imported when an env is made.
"""

from __future__ import annotations

import os
import sys


def _leave_folder() -> None:
    """Let ``python -m nfd_env`` import no more than ``nfd`` does: nothing that lies about.

    Python puts the current folder first. It stays, last, only if this package lies in it itself.
    """
    command = [sys.orig_argv[i + 1 : i + 2] for i, a in enumerate(sys.orig_argv) if a == "-m"][:1]
    ours = command in ([["nfd_env"]], [["nfd_env.cli"]])
    if sys.argv[:1] == ["-m"] and ours and not sys.flags.safe_path:
        here = sys.path.pop(0)
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        if os.path.realpath(here) == os.path.realpath(package):
            sys.path.append(here)


_leave_folder()  # before anything that is not Python's own

from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from gymnasium.envs.registration import register  # noqa: E402

if TYPE_CHECKING:
    from nfd_env.envs.single_env import NFDEnv
    from nfd_env.envs.vector_env import NFDVectorEnv
    from nfd_env.worlds.load import World, load_world, make_real

__version__ = "0.1.0"
__all__ = ["NFDEnv", "NFDVectorEnv", "World", "load_world", "make_real"]

_WHERE = {
    "NFDEnv": "nfd_env.envs.single_env",
    "NFDVectorEnv": "nfd_env.envs.vector_env",
    "World": "nfd_env.worlds.load",
    "load_world": "nfd_env.worlds.load",
    "make_real": "nfd_env.worlds.load",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'nfd_env' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also before they are imported."""
    return sorted([*__all__, "__version__"])


# Torch's threads (of libgomp) wait for each other by spinning, for so long that beside other work
# most of a core goes into it. So many rounds bridge the pauses within a step of a world, and no
# more. It is read when torch is imported, and left alone where somebody has chosen.
_SPINS = "10000"
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = _SPINS


_IMPORTED_BY = os.getpid()  # what is forked from this process is prepared below


def _after_fork() -> None:
    """One thread in a forked process: torch's others do not survive a fork and are waited for."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# "NFD/World-v0" takes any folder as ``world``; each shipped world has an id of its own.
_worlds = {"World": {}}
for _path in sorted(Path(__file__).parent.glob("worlds/[!.]*/world.yaml")):
    _name = "".join(word.capitalize() for word in _path.parent.name.split("_"))
    _worlds[_name] = {"world": _path.parent.name}
for _name, _kwargs in _worlds.items():
    register(
        id=f"NFD/{_name}-v0",
        entry_point="nfd_env.envs.single_env:NFDEnv",
        vector_entry_point="nfd_env.envs.vector_env:NFDVectorEnv",
        kwargs=_kwargs,
    )
