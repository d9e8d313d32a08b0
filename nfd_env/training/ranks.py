"""The processes that train together, as ``torchrun`` starts them: who they are, what they agree on.

Process 0, the first, does everything that is done once: it records, validates, writes, prints and
owns the folders. The others wait for its jobs and train along.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from nfd_env.devices import DeviceError
from nfd_env.stopping import StopRequest

# A process that has died is noticed by its connection, or by torchrun. Until then it may be
# recording or validating for hours.
_PATIENCE = timedelta(days=30)
_OFTEN = 0.1  # seconds between looks for a job
_END = "end"


class RanksError(RuntimeError):
    """Processes that were to train together cannot, or no longer can."""


class Ranks:
    """The processes of a training; alone, unless ``joined``."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        """Process ``rank`` of ``count``, which meet at ``store``."""
        self.rank, self.count = rank, count
        self._store, self._told = store, 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that records, validates, writes and prints."""
        return self.rank == 0

    def tell(self, job: Mapping[str, Any]) -> None:
        """Give the other processes a job, of plain values."""
        if self.count > 1:
            self._store.set(f"job-{self._told}", json.dumps(job))
            self._told += 1

    def jobs(self) -> Iterator[dict[str, Any]]:
        """The jobs that the first process gives, until it has no more."""
        number = 0
        while True:
            # Not by the store's own waiting: no signal is heard in it.
            while not self._store.check([f"job-{number}"]):
                time.sleep(_OFTEN)
            job = json.loads(self._store.get(f"job-{number}"))
            if _END in job:
                return
            yield job
            number += 1

    def end(self) -> None:
        """Send the other processes home."""
        self.tell({_END: True})

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.largest(0)

    def largest(self, *values: int) -> list[int]:
        """The largest of each value that any process has."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64, device="cpu")
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
        return numbers.tolist()

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes; the values themselves where it is alone."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        distributed.all_reduce(numbers)
        return (numbers / self.count).tolist()

    @contextmanager
    def losing_none(self, stop: StopRequest) -> Iterator[None]:
        """Say what it means when a process is lost within the block.

        Raises:
            RanksError: when one is.
            KeyboardInterrupt, SystemExit: when that happened because all were stopped.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_connection(error):
                raise
            stop.obey()
            raise RanksError(
                f"another of the {self.count} processes of this training has ended (what it said "
                "stands above or below); run the same command again, with as many processes as "
                "you like: it goes on from the last checkpoint"
            ) from None


ALONE = Ranks()


def _is_connection(error: RuntimeError) -> bool:
    told = str(error)
    return isinstance(error, distributed.DistError) or "gloo" in told or "NCCL" in told


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that ``torchrun`` has started together; alone where it has not.

    Args:
        device: what they train on; processes of one machine take its GPUs in turn.

    Raises:
        DeviceError: when there are fewer GPUs than processes, or one is named.
        RanksError: when they cannot meet.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    backend = "gloo"
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None or local >= there:
            raise DeviceError(
                f"process {local} on this machine asks for a GPU of its own (device: cuda), but "
                f"{f'{device} is named' if device.index is not None else f'there are {there}'}: "
                "start as many processes as there are GPUs, with device: cuda"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, count = next(distributed.rendezvous("env://", timeout=timedelta(minutes=10)))
        store = distributed.PrefixStore("nfd", store)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"the {count} processes cannot meet: {str(error).splitlines()[0]}"
        ) from None
    ranks = Ranks(rank, count, store)
    try:
        yield ranks
    finally:
        if ranks.first:
            ranks.end()
        distributed.destroy_process_group()
