"""Streams of actions to measure with: how long actions are held decides what speculation saves."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from nfd_env.data.policies import RandomHeld
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.players.load import load_player
from nfd_env.players.player import Player, PolicyPlayer

HELD = {"held keys": (5, 20), "agent": (1, 20), "random": (1, 1)}


class ActionStream:
    """Actions for a vector env, from one of the streams.

    - "held keys": random actions, each held for 5 to 20 frames, as a person holds keys;
    - "agent": an agent's; without one, the policy that recordings begin with, random actions held
      for 1 to 20 frames;
    - "random": uniformly random every frame.
    """

    def __init__(
        self,
        name: str,
        env: NFDVectorEnv,
        agent: str | None = None,
        seed: int = 0,
        trust: bool = False,
    ) -> None:
        """Drive ``env``.

        Args:
            name: of the stream.
            env: with any observations; an agent is shown those that it was trained on.
            agent: see ``nfd_env.players.load.load_player``.
            seed: of all randomness.
            trust: see there.

        Raises:
            ValueError: on another name, or an agent that cannot be loaded.
        """
        if name not in HELD:
            raise ValueError(f"the action streams are {', '.join(HELD)}, got {name!r}")
        self._env, self._obs_type, self._every = env, "", 1
        if name == "agent" and agent is not None:
            # It is shown its own observations at its own pace, whatever those of ``env`` are.
            self._player: Player = load_player(agent, env, trust=trust, check=False)
            spec = self._player.spec
            self._obs_type = spec.obs_type if spec else "rgb"
            # An agent that decides on every k-th frame keeps its action in between.
            self._every = max(1, (spec.frame_skip if spec else 1) // env.frame_skip)
        else:
            policies: list[Any] = [RandomHeld(*HELD[name]) for _ in range(env.num_envs)]
            self._player = PolicyPlayer(policies, env)
        self._player.reset(env.num_envs, seed)
        self._count, self._first = 0, np.ones(env.num_envs, bool)

    def next(self, observation: Any, ended: np.ndarray | None = None) -> np.ndarray:
        """The next action of each environment, (num_envs, ...).

        Args:
            observation: what the env has just returned.
            ended: bool (num_envs,), environments that a new episode has begun in.
        """
        self._first |= False if ended is None else ended
        if self._count % self._every == 0:
            first = self._first if self._count else None
            self._actions = np.asarray(self._player.act(self._seen(observation), first))
            self._first = np.zeros_like(self._first)
        self._count += 1
        return self._actions

    def _seen(self, observation: Any) -> Any:
        if not self._obs_type:  # random streams see nothing
            return [None] * self._env.num_envs
        if self._obs_type == self._env.obs_type:
            return observation
        seen = self._env.observe(self._obs_type)
        return seen.cpu().numpy() if isinstance(seen, Tensor) else seen
