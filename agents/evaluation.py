"""How well an agent plays while it learns, in the real game wherever that is installed."""

from __future__ import annotations

import numpy as np
import torch

from agents.load import Agent
from nfd_env.checkpoint import World
from nfd_env.envs.real import SourceError
from nfd_env.envs.real_vector import RealVectorEnv
from nfd_env.evaluation.agents import play_episodes


class Judge:
    """Plays the real game now and then during a training; says so once where there is none."""

    def __init__(
        self, world: World, episodes: int, max_episode_steps: int | None, device: str
    ) -> None:
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
            return play_episodes(self._env, agent, self._episodes, seed=1_000_000).scores

    def close(self) -> None:
        """Stop the games."""
        if self._env is not None:
            self._env.close()
            self._env = None
