"""Train an agent with the native PPO: ``python -m agents.train_ppo CONFIG``.

The same command goes on with a run that was interrupted; its environments then begin new episodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from agents.command import run
from nfd_env.learning.train import TrainPPOConfig, train


def _command(settings: TrainPPOConfig, args: argparse.Namespace) -> str:
    if args.real:
        settings = replace(settings, real=True, folder=f"{settings.folder}_real")
    train(settings)
    return f"{settings.folder}/agent.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags = {"--real": "real=true, in a folder with _real behind its name"}
    return run("train_ppo", TrainPPOConfig, _command, arguments, flags)


if __name__ == "__main__":
    sys.exit(main())
