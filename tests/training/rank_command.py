"""Processes that train stages together, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from nfd_env import cli, config
from nfd_env.training.loop import train
from nfd_env.training.ranks import joined
from tests.training.stage_command import STAGES


def started(count: int, jobs: list[dict], errors: Path) -> list[multiprocessing.Process]:
    """``count`` processes that run ``jobs``, settings of stages, one after the other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Whose server has imported everything once, see tests/conftest.py.
    context = multiprocessing.get_context("forkserver")
    made = [context.Process(target=_run, args=(r, count, port, jobs, errors)) for r in range(count)]
    for process in made:
        process.start()
    return made


def ended(processes: list[multiprocessing.Process]) -> list[int | None]:
    """How they ended; a busy machine takes long."""
    try:
        for process in processes:
            process.join(600)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _run(rank: int, count: int, port: int, jobs: list[dict], errors: Path) -> None:
    os.dup2(os.open(f"{errors}-{rank}", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    COMMAND.update(jobs=jobs, rank=rank)
    sys.exit(cli.main(["ranks"]))


COMMAND: dict = {}


def run_ranks() -> int:
    """Run the jobs of ``COMMAND``."""
    with joined(torch.device("cpu")) as ranks:
        for job in COMMAND["jobs"]:
            stage, settings_type = STAGES[job["stage"]]
            settings = config.from_mapping(settings_type, job["settings"], job["stage"])

            def tell(done: int, total: int, job: dict = job) -> None:
                if done == job.get("dies_at") and COMMAND["rank"] == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            train(stage(settings), settings.train, False, tell, ranks)
    return 0


cli.COMMANDS["ranks"] = ("tests.training.rank_command:run_ranks", "")
