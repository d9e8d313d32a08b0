"""A command that trains one stage as ``nfd train`` does, without the recipe's other stages."""

from __future__ import annotations

import sys

from tyro.conf import Positional

from nfd_env import cli, config


def train_tokenizer(path: Positional[str], overrides: Positional[tuple[str, ...]] = ()) -> int:
    from nfd_env.training.loop import train
    from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig

    settings = config.load(TokenizerTrainingConfig, path, list(overrides))
    train(TokenizerStage(settings), settings.train)
    return 0


cli.COMMANDS["tokenizer"] = ("tests.training.stage_command:train_tokenizer", "")

if __name__ == "__main__":
    sys.exit(cli.main())
