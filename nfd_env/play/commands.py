"""The commands ``nfd play`` and ``nfd serve``: their arguments, and errors in one line."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from nfd_env.play import PlayError


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command ``name``, "play" or "serve"."""
    add = parser.add_argument
    add("world", nargs="?", default="DoomTakeCover", help="name or folder")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--sampling-steps", type=int, help="denoising steps a frame")
    add(
        "--speculative-frames",
        type=int,
        default=1,
        help="frames drawn jointly while the action is kept (default 1; a key can switch to 2)",
    )
    add("--dynamics", help="student or teacher, in a world that has both")
    add("--agent", help="whom players can hand over to: random, a file or name, or module:Class")
    add("--trust", action="store_true", help="an agent's .zip may run its author's code")
    if name == "play":
        add("--seed", type=int, help="seed of the first episode")
        add("--scale", type=float, help="window size; 1 is about 480 pixels high")
        add("--record", metavar="FILE.mp4", help="record an MP4")
        add("--save", metavar="FOLDER", help="append the play to a data set")
        add("--max-episode-steps", type=int, help="cut episodes off there")
        add("--max-frames", type=int, help="stop after so many pictures")
    else:
        add("--host", default="127.0.0.1", help="address to bind to")
        add("--port", type=int, default=8000, help="TCP port, 0 for a free one")
        add("--max-clients", type=int, default=8, help="players at a time")
        add(
            "--token-file",
            metavar="FILE",
            help="holds the secret that players need; or set NFD_TOKEN. Made up beyond loopback",
        )
        add("--token", help="the secret itself, which others can read in the list of processes")
        add(
            "--allow-origin",
            metavar="URL",
            action="append",
            default=[],
            help="address of a proxy (JupyterHub, code-server) that the page may be opened at",
        )
        add("--idle-seconds", type=float, default=180.0, help="then a slot is freed")


def run(name: str, args: argparse.Namespace) -> int:
    """Run a command; 0, or 2 after one message on stderr."""
    logging.basicConfig(format=f"nfd {name}: %(message)s", level=logging.WARNING)
    try:
        command = _command(name)
        from nfd_env.devices import DeviceError
    except (ImportError, PlayError) as error:
        print(f"nfd {name}: {error}", file=sys.stderr)
        return 2
    names = inspect.signature(command).parameters
    try:
        command(**{key: value for key, value in vars(args).items() if key in names})
    except (PlayError, DeviceError, ValueError, OSError) as error:
        print(f"nfd {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _command(name: str) -> Callable[..., Any]:
    if name == "play":
        from nfd_env.play.window import play

        return play
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ImportError("nfd serve needs aiohttp: pip install 'nfd-env[serve]'") from None
    from nfd_env.play.web.server import serve

    return serve
