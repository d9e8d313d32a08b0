"""What processes do that ``torchrun`` starts beside the first one: train along."""

from __future__ import annotations

import sys
from typing import Any

from nfd_env.recipe import door
from nfd_env.training.distill import DistillStage
from nfd_env.training.divergence import TrainingDiverged
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.flow import FlowStage
from nfd_env.training.loop import train
from nfd_env.training.ranks import Ranks
from nfd_env.training.tokenizer import TokenizerStage

_MAKE: dict[str, Any] = {"tokenizer": TokenizerStage, "flow": FlowStage, "distill": DistillStage}


def follow(ranks: Ranks) -> int:
    """Do the first process's jobs until it has no more; returns the exit status."""
    try:
        for job in ranks.jobs():
            name, values = job["stage"], job["settings"]
            if name == "encode":
                encode(EncodeConfig(**values), False, ranks=ranks)
                continue
            stage = _MAKE[name](door.built_from(name, values))
            train(stage, stage.settings.train, False, ranks=ranks)
    except (KeyboardInterrupt, TrainingDiverged):  # the first process says it
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"nfd: process {ranks.rank} of {ranks.count}: {error}", file=sys.stderr)
        return 1
    return 0
