"""A command that runs one stage as ``nfd train`` does, without the recipe's other stages."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tyro.conf import Positional

from nfd_env import cli, config
from nfd_env.training.distill import DistillStage, DistillTrainingConfig
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.flow import FlowStage, FlowTrainingConfig
from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig
from nfd_env.training.loop import train
from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig

STAGES = {
    "tokenizer": (TokenizerStage, TokenizerTrainingConfig),
    "flow": (FlowStage, FlowTrainingConfig),
    "heads": (HeadsStage, HeadsTrainingConfig),
    "distill": (DistillStage, DistillTrainingConfig),
}


def run_stage(
    path: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    name: str = "",
    told: str = "",
) -> int:
    """Run the stage ``name``; write the file ``told`` once something has been done."""

    def tell(done: int, total: int) -> None:
        if told and done >= (22 if name == "encode" else 3):  # more than a shard, or a few steps
            Path(told).touch()
            if name == "encode":
                time.sleep(1000)

    if name == "encode":
        encode(config.load(EncodeConfig, path, list(overrides)), False, tell)
    else:
        stage, settings_type = STAGES[name]
        settings = config.load(settings_type, path, list(overrides))
        train(stage(settings), settings.train, False, tell)
    return 0


cli.COMMANDS["stage"] = ("tests.training.stage_command:run_stage", "")


def in_the_background(arguments: list[str], errors: str) -> None:
    """The command, in a process of its own, where INT is ignored as shells have it for "&"."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    sys.exit(cli.main(arguments))
