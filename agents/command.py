"""The command line that the native PPO's training and Stable-Baselines3's have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from nfd_env import config
from nfd_env.learning.settings import AgentTrainingConfig

Settings = TypeVar("Settings", bound=AgentTrainingConfig)


def run(
    name: str,
    schema: type[Settings],
    train: Callable[[Settings, argparse.Namespace], str],
    arguments: Sequence[str] | None,
    flags: dict[str, str],
) -> int:
    """The command line of a training.

    Args:
        name: of the module.
        schema: what the config file holds.
        train: trains, and returns the agent's file.
        arguments: None for the process's own.
        flags: switches and their help.

    Returns:
        The exit status.
    """
    about = sys.modules[train.__module__].__doc__
    parser = argparse.ArgumentParser(prog=f"python -m agents.{name}", description=about)
    parser.add_argument("config", help="YAML file")
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", help="key.sub=value, over the config file's")
    args = parser.parse_args(arguments)
    try:
        agent = train(config.load(schema, args.config, args.overrides), args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(f"finished; to score it: nfd eval-agent {agent}")
    return 0
