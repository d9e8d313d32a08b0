"""How well an agent plays while it learns, in the real game wherever that is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.load import Agent
from nfd_env.checkpoint import World
from nfd_env.envs.real import SourceError
from nfd_env.envs.real_vector import RealVectorEnv


def play_episodes(agent: Agent, env: Any, episodes: int, seed: int = 0) -> np.ndarray:
    """Scores (episodes,) of whole episodes, the sums of their rewards.

    Args:
        agent: plays.
        env: a (real or learned) vector env of the agent's world, with SAME_STEP autoreset and
            episodes that end.
        episodes: number of episodes; number i is played with the environment seed ``seed`` + i.
        seed: of environments and agent.
    """
    scores: list[float] = []
    while len(scores) < episodes:
        begin = seed + len(scores)
        observation, _ = env.reset(seed=begin)
        agent.reset(env.num_envs, seed=begin)
        total, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
        needed = running.copy()
        needed[episodes - len(scores) :] = False
        first = None
        while (running & needed).any():
            action = agent.act(observation, first)
            observation, *outcome, _ = env.step(action)
            reward, terminated, truncated = (torch.as_tensor(x).cpu().numpy() for x in outcome)
            total += reward * running
            first = terminated | truncated
            running &= ~first
        scores += total[needed].tolist()
    return np.array(scores)


class Judge:
    """Plays the real game now and then during a training; says so once where there is none."""

    def __init__(self, world: World, episodes: int, max_episode_steps: int, device: str) -> None:
        """Judge agents of ``world`` by ``episodes`` real episodes each time."""
        self._world, self._episodes, self._device = world, episodes, device
        self._max_episode_steps = max_episode_steps
        self._env: RealVectorEnv | None = None
        self.missing = ""

    def scores(self, agent: Agent) -> np.ndarray | None:
        """Real scores (episodes,), always with the same seeds; None without the real game."""
        if self.missing:
            return None
        if self._env is None:
            try:
                self._env = RealVectorEnv(
                    self._world.folder,
                    self._episodes,
                    device=self._device,
                    obs_type=agent.spec.obs_type,
                    frame_skip=agent.spec.frame_skip,
                    output="torch",
                    max_episode_steps=self._max_episode_steps,
                )
            except SourceError as error:
                self.missing = str(error)
                return None
        with torch.random.fork_rng():
            return play_episodes(agent, self._env, self._episodes, seed=1_000_000)

    def close(self) -> None:
        """Stop the games."""
        if self._env is not None:
            self._env.close()
            self._env = None
