"""Vector envs stepped beside each other, a thread each: what two processor cores gain most by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class ThreadedVectorEnv:
    """Several equal vector envs of tensors as one.

    On a CPU, the layers of a small world are shared badly by the threads of one operation: those
    wait for one another hundreds of times a frame. Here each thread has environments of its own and
    computes alone; they wait once a step.
    """

    def __init__(self, make: Callable[[int], Any], num_envs: int, workers: int) -> None:
        """Make ``workers`` envs of as many environments each.

        Args:
            make: a vector env with so many environments, ``output="torch"`` and SAME_STEP
                autoreset; no two may share mutable state.
            num_envs: of all together, a multiple of ``workers``.
            workers: threads.
        """
        self.envs = [make(num_envs // workers) for _ in range(workers)]
        self.num_envs, first = num_envs, self.envs[0]
        self.world, self.model, self.starts = first.world, first.model, first.starts
        self.obs_type, self.frame_skip = first.obs_type, first.frame_skip
        self.max_episode_steps = first.max_episode_steps
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, initializer=_compute_alone)
        everyone = threading.Barrier(workers)  # so that every thread exists before the next line
        list(self._pool.map(lambda _: everyone.wait(), self.envs))
        torch.set_num_threads(threads)

    def reset(self, *, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes; environment i gets ``seed`` + i."""
        size = self.num_envs // len(self.envs)
        seeds = range(seed, seed + self.num_envs, size)
        begun = self._pool.map(lambda env, first: env.reset(seed=first)[0], self.envs, seeds)
        return torch.cat(list(begun)), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step of every environment; see ``NFDVectorEnv``.

        The infos are ``hazard`` and, where an episode ended, ``final_obs`` of all environments.
        """
        parts = actions.chunk(len(self.envs))
        results = list(self._pool.map(lambda env, part: env.step(part), self.envs, parts))
        *columns, infos = zip(*results, strict=True)
        joined = [torch.cat(column) for column in columns]
        info = {"hazard": torch.cat([part["hazard"] for part in infos])}
        if any("final_obs" in part for part in infos):
            info["final_obs"] = _final(infos, columns[0])
        return joined[0], joined[1], joined[2], joined[3], info

    def close(self) -> None:
        """Close all of them."""
        self._pool.shutdown()
        for env in self.envs:
            env.close()


def _compute_alone() -> None:
    torch.set_num_threads(1)
    # A thread takes its number over when it first asks, and later changes leave it alone.
    torch.get_num_threads()


def _final(infos: Sequence[dict[str, Tensor]], observations: Sequence[Tensor]) -> Tensor:
    """Final observations; those of environments that go on are what they are now, if anything."""
    pairs = zip(infos, observations, strict=True)
    return torch.cat([info.get("final_obs", observation) for info, observation in pairs])
