"""A player that is shown one frame after the other: in a window or page, and for recordings."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from nfd_env.envs.observing import observation_space
from nfd_env.players.load import load_player, read_agent_spec
from nfd_env.players.policy import AgentError
from nfd_env.worlds.load import World, load_world


class FramePlayer:
    """Asks any agent for the action of one game whose frames arrive one by one.

    Latents and features are made of the frames that it is shown, by the world's own networks, and
    an agent that decides on every k-th frame keeps its action in between. A call gives the action
    for a frame, uint8 (H, W, 3); ``begin`` says that the next frame begins an episode.
    """

    def __init__(
        self,
        agent: Any,
        space: spaces.Space,
        frame_shape: tuple[int, ...],
        world: World | None = None,
        trust: bool = False,
        greedy: bool = False,
    ) -> None:
        """Prepare ``agent``.

        Args:
            agent: see ``nfd_env.players.load.load_player``.
            space: the game's action space.
            frame_shape: (H, W, 3).
            world: the world that is played, or that has the game behind it; None for any other
                game, which an agent of a world cannot play.
            trust: see ``load_player``.
            greedy: see there.

        Raises:
            AgentError: when there is no such agent, or it cannot play this game.
            UntrustedError: for a Stable-Baselines3 file without ``trust``.
        """
        self._space, self._world = space, world
        folder = None if world is None else world.folder
        spec = read_agent_spec(agent, folder, trust)
        if spec is not None and world is None:
            raise AgentError(
                f"the agent {agent} was trained for the world {spec.world} and cannot play a game "
                "of no world"
            )
        self._obs_type = spec.obs_type if spec else "rgb"
        self._every = spec.frame_skip if spec else 1
        self._given = (agent, space, frame_shape, world, trust, greedy)
        self.player = load_player(agent, self._stub(frame_shape), greedy, trust)
        self.begin()

    def fork(self) -> FramePlayer:
        """The same agent for another game beside this one, with a memory of its own."""
        return FramePlayer(*self._given)

    def begin(self, seed: int | None = None) -> None:
        """The next frame begins an episode."""
        self._count, self._action = 0, None
        self.player.reset(1, seed)
        if self._obs_type == "features":
            assert self._world is not None
            self._memory = self._world.model.heads.initial_state(1)

    def __call__(self, frame: np.ndarray) -> Any:
        """The action for ``frame``, of the action space."""
        decides = self._count % self._every == 0
        # Features remember all frames; else those in between would be encoded for nothing.
        observation = self._observe(frame) if decides or self._obs_type == "features" else None
        if decides:
            action = np.asarray(self.player.act(observation))[0]
            discrete = isinstance(self._space, spaces.Discrete)
            self._action = int(action) if discrete else action
        self._count += 1
        return copy.copy(self._action)

    def _observe(self, frame: np.ndarray) -> Any:
        if self._obs_type == "rgb":
            return np.array(frame)[None]
        assert self._world is not None
        model, codec = self._world.model, self._world.codec
        latents = model.encode(torch.from_numpy(np.array(frame))[None])
        if self._obs_type == "latent":
            return latents.float().cpu().numpy()
        into = torch.zeros(1, codec.width, device=model.device)
        if self._action is not None:
            into = codec.encode(codec.check(np.asarray(self._action)[None], 1)).to(model.device)
            self._memory = model.remember(latents, into, self._memory)
        return model.features(latents, into, self._memory).cpu().numpy()

    def _stub(self, frame_shape: tuple[int, ...]) -> Any:
        """What there is to know of the game, in the shape of a vector env of one."""
        world = self._world
        stub = SimpleNamespace(
            num_envs=1,
            world=world,
            obs_type=self._obs_type,
            frame_skip=self._every,
            single_action_space=self._space,
            single_observation_space=spaces.Box(0, 255, frame_shape, np.uint8),
        )
        if world is not None:
            stub.model = world.model
            stub.single_observation_space = observation_space(world, self._obs_type)
        return stub


class AgentPolicy:
    """A behaviour policy for recordings: any agent, on the frames that are recorded.

    In a collect config: ``policy: nfd_env.players.frames:AgentPolicy`` with these arguments.
    """

    def __init__(
        self,
        agent: str,
        world: str = "",
        trust: bool = False,
        greedy: bool = False,
        device: str = "cpu",
    ) -> None:
        """Play ``agent``.

        Args:
            agent: a name or file, see ``nfd_env.players.load.find_agent``.
            world: that it was trained in; "" for an agent of plain frames.
            trust: see ``nfd_env.named.check_trusted``.
            greedy: take its most probable actions.
            device: of the world's and the agent's networks.
        """
        self._agent, self._trust, self._greedy = agent, trust, greedy
        self._world = load_world(world, device) if world else None
        self._player: FramePlayer | None = None
        self._fresh = True

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        """See ``nfd_env.data.policies.BehaviourPolicy``."""
        self._space, self._seed = env.action_space, int(rng.integers(2**31))
        self._fresh = True

    def act(self, observation: np.ndarray) -> Any:
        """See ``nfd_env.data.policies.BehaviourPolicy``."""
        if self._player is None:
            shape = observation.shape
            self._player = FramePlayer(
                self._agent, self._space, shape, self._world, self._trust, self._greedy
            )
        if self._fresh:
            self._player.begin(self._seed)
            self._fresh = False
        return self._player(observation)
