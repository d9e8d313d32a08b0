"""Envs as guests in processes that others start: how many threads, and what a fork cannot do."""

from __future__ import annotations

import functools
import multiprocessing
import os

import torch

import nfd_env


def settle(device: str | torch.device) -> None:
    """Make this process fit for stepping a world on ``device``; every env calls it first.

    A process that ``multiprocessing`` started, such as a worker of ``AsyncVectorEnv``, is one of
    many: with all processors each, they would wait for each other, 10 to 40 times slower than with
    one thread each. So it gets one, unless ``OMP_NUM_THREADS`` or ``torch.set_num_threads`` say
    otherwise.

    Raises:
        RuntimeError: when this process was forked from one that had used the GPU already, which
            CUDA cannot do.
    """
    if str(device).startswith(("auto", "cuda")) and torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "this process was forked from one that had already used the GPU, where CUDA does not "
            'work; start it afresh, e.g. AsyncVectorEnv(..., context="spawn"), or use '
            'device="cpu"; gymnasium.make_vec without vectorization_mode needs no processes'
        )
    _share_processors(os.getpid())


@functools.cache
def _share_processors(process: int) -> None:
    """Once in each ``process``, so that what its user sets later stays."""
    if multiprocessing.parent_process() is None:
        return
    started = getattr(multiprocessing.current_process(), "_start_method", None)
    started = started or multiprocessing.get_start_method()
    if started == "fork" and nfd_env._IMPORTED_BY == process:
        # Of a parent that perhaps used torch, whose other threads are gone and are waited for.
        torch.set_num_threads(1)
        return
    processors = os.cpu_count() or 1
    chosen = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    # Left alone, torch takes all processors, or half of them where they are hyper-threads.
    chosen = chosen or torch.get_num_threads() < max(2, processors // 2)
    if not chosen:
        torch.set_num_threads(1)
