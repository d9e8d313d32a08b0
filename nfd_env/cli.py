"""The ``nfd`` command: which function a command is, and what becomes of its errors.

A command is a function whose signature and docstring are its command line (by tyro). Its module is
imported when the command is called, so that ``nfd worlds`` needs no torch and no window.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Sequence

import nfd_env
from nfd_env.files import check_current_folder

# Name: where the function is, and what it does.
COMMANDS = {
    "worlds": ("nfd_env.worlds.commands:worlds", "list the worlds that come along"),
    "demo": ("nfd_env.evaluation.commands:demo", "play a world by script; write a video"),
    "play": ("nfd_env.play.commands:play", "play a world in a window"),
    "serve": ("nfd_env.play.commands:serve", "play a world in a browser"),
    "init": ("nfd_env.recipe.commands:init", "look at a game, write the file that describes it"),
    "train": ("nfd_env.recipe.commands:train", "make a world of a game; run it again to go on"),
    "train-baseline": (
        "nfd_env.baselines.commands:train_baseline",
        "train a token-autoregressive rival of a world",
    ),
    "collect": ("nfd_env.recipe.commands:collect", "record a game"),
    "export": ("nfd_env.recipe.commands:export", "put finished stages together as a world again"),
    "export-onnx": ("nfd_env.export.commands:export_onnx", "a world as ONNX files"),
    "export-web": ("nfd_env.export.commands:export_web", "a page that plays without a server"),
    "eval": ("nfd_env.evaluation.commands:evaluate", "how good a world is, on held-out recordings"),
    "eval-agent": ("nfd_env.evaluation.commands:eval_agent", "score an agent, in world and game"),
    "rank": ("nfd_env.evaluation.commands:rank", "does a world rank policies as its game does"),
    "shrink": ("nfd_env.recipe.commands:shrink", "a smaller copy of a world"),
    "push": ("nfd_env.recipe.commands:push", "share a world on the Hugging Face Hub"),
    "pull": ("nfd_env.worlds.commands:pull", "fetch a world from there, or its newest version"),
    "bench": ("nfd_env.evaluation.commands:bench", "how fast a world steps"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Errors that a user can mend are one line on stderr and status 1; with ``--debug`` a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have every character
        sys.stdout.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        status = _told(_command(given))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _lost_output("\n"):
            return 0  # who reads it, such as head, has seen enough
        if debug:
            raise
        said = str(error)
        if isinstance(error, MemoryError):
            said = f"there is not enough memory: {said or 'ask for less at a time'}"
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            # Without "[Errno 2]"; the second file of a replacement is the one that was asked for.
            said = f"{os.fspath(error.filename2 or error.filename)}: {error.strerror}"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            said = f"the output cannot be written: {error.strerror}"  # it does not say what of it
        print(f"nfd: {said}", file=sys.stderr)
        status = 1
    return status


def _told(status: int) -> int:
    """``status``, once all that was printed has arrived; raises OSError where it has not.

    Python itself finds that out only as it ends, with a traceback.
    """
    lost = _lost_output()
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise lost
    return status


def _lost_output(more: str = "") -> OSError | None:
    """Why what was printed, and ``more``, cannot arrive, if so; from then on it goes nowhere."""
    stream = sys.stdout
    if stream is None:
        return None
    try:
        stream.write(more)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def _command(given: list[str]) -> int:
    if given[:1] == ["--version"]:
        print(f"nfd {nfd_env.__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        print(f"nfd: unknown command {name!r}\n{_usage()}", file=sys.stderr)
        return 2
    check_current_folder()
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    import importlib
    import inspect

    import tyro

    module, function = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), function)
    parameters = inspect.signature(command).parameters
    if "overrides" in parameters:
        flags = [f"--{n.replace('_', '-')}" for n, p in parameters.items() if p.default is False]
        arguments = _overrides_together(arguments, flags)
    # What several commands share is a dataclass among their arguments, without a name of its own.
    # Its values are checked by who takes it: tyro would catch what its constructor raises.
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return int(tyro.cli(command, args=arguments, prog=f"nfd {name}", config=config) or 0)


def _overrides_together(arguments: list[str], flags: list[str]) -> list[str]:
    """``arguments`` with every key.sub=value right behind the game file, wherever they stood.

    The library wants positional arguments to stand together, and who types does not know that.
    """
    overrides = [a for a in arguments if re.match(r"[A-Za-z_][\w.]*=", a)]
    others = [a for a in arguments if a not in overrides]
    for place, argument in enumerate(others):
        before = others[place - 1] if place else ""
        value = before.startswith("-") and "=" not in before and before not in flags
        if not argument.startswith("-") and not value:
            return [*others[: place + 1], *overrides, *others[place + 1 :]]
    return arguments


def _usage() -> str:
    lines = [f"  {name:11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nfd [--debug] [--version] COMMAND ...   (nfd COMMAND -h shows its arguments)",
            "Game recordings -> a learned world that steps as a Gymnasium env.",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
