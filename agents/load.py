"""Saved agents, ours and Stable-Baselines3's, behind one interface."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.network import ActorCritic, AgentError, AgentSpec, PolicyConfig, new_stack, push
from nfd_env import config
from nfd_env.models.weights import CheckpointError, load_weights

SPEC_ATTRIBUTE = "nfd_spec"  # of a saved Stable-Baselines3 model


class Agent(Protocol):
    """Plays a batch of environments.

    Attributes:
        spec: what it was trained on; its ``obs_type`` and ``frame_skip`` are those to make the
            environments with.
    """

    spec: AgentSpec

    def reset(self, n: int, seed: int | None = None) -> None:
        """New episodes begin in ``n`` environments; ``seed`` makes the agent repeatable."""
        ...

    def act(self, observations: Any, first: Any = None) -> Any:
        """The next action of each environment.

        Args:
            observations: (n, ...), array or tensor.
            first: bool (n,), environments whose observation begins a new episode.

        Returns:
            Actions of the action space (n, ...): a tensor for a tensor, else an array.
        """
        ...


class NativeAgent:
    """An agent of ``agents.train_ppo``; see ``Agent``."""

    def __init__(self, policy: ActorCritic, greedy: bool = False) -> None:
        """Play ``policy``, sampling its actions, or taking the most probable with ``greedy``."""
        self.policy, self.spec, self._greedy = policy, policy.config.spec, greedy
        self._device = policy.start.device
        self._generator = torch.Generator(self._device)
        self._stack: Tensor | None = None

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Agent``."""
        self._n, self._stack = n, None
        if seed is not None:
            self._generator.manual_seed(seed)

    @torch.no_grad()
    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Agent``."""
        tensor = torch.as_tensor(observations, device=self._device)
        expected = (self._n, *self.spec.observation_shape)
        if tuple(tensor.shape) != expected:
            raise AgentError(f"the agent takes observations {expected}, got {tuple(tensor.shape)}")
        if self._stack is None:
            self._stack = new_stack(tensor, self.spec.frame_stack)
        else:
            mask = None if first is None else torch.as_tensor(first, device=self._device)
            self._stack = push(self._stack, tensor, mask)
        action, *_ = self.policy.act(self.policy.look(self._stack), self._greedy, self._generator)
        return action if isinstance(observations, Tensor) else action.cpu().numpy()


class SB3Agent:
    """An agent of Stable-Baselines3; see ``Agent``."""

    def __init__(self, model: Any, spec: AgentSpec, greedy: bool = False) -> None:
        """Play ``model``, sampling its actions, or taking the most probable with ``greedy``."""
        self.model, self.spec, self._greedy = model, spec, greedy
        self._stack: Any = None

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Agent``."""
        self._n, self._stack = n, None
        if seed is not None:
            self.model.set_random_seed(seed)

    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Agent``."""
        from gymnasium import spaces
        from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

        tensor = isinstance(observations, Tensor)
        array = observations.cpu().numpy() if tensor else np.asarray(observations)
        expected = (self._n, *self.spec.observation_shape)
        if array.shape != expected:
            raise AgentError(f"the agent takes observations {expected}, got {array.shape}")
        if self._stack is None:
            low, high = (0, 255) if self.spec.obs_type == "rgb" else (-np.inf, np.inf)
            space: Any = spaces.Box(low, high, array.shape[1:], array.dtype.type)
            order = "first" if self.spec.obs_type == "latent" else "last"
            self._stack = StackedObservations(self._n, self.spec.frame_stack, space, order)
            stacked = self._stack.reset(array)
        else:
            begins = np.zeros(self._n, bool) if first is None else np.asarray(first)
            # The finished episode's last observation, which nobody looks at here.
            infos = [{"terminal_observation": row} for row in array]
            stacked, _ = self._stack.update(array, begins, infos)
        action, _ = self.model.predict(stacked, deterministic=self._greedy)
        return torch.from_numpy(action).to(observations.device) if tensor else action


def load_agent(path: str | PathLike[str], env: Any = None, greedy: bool = False) -> Agent:
    """Load an agent: ours (``.safetensors``) or Stable-Baselines3's (``.zip``).

    Args:
        path: the file. In front of a zip that is not of PPO stands its class: "DQN:agent.zip".
        env: the (real or learned) vector env of a world that it is to play.
        greedy: take the most probable action instead of drawing one.

    Raises:
        AgentError: when there is no such agent, or it was trained for something else than ``env``.
    """
    text = str(path)
    if text.endswith(".zip"):
        agent: Agent = _load_sb3(text, env, greedy)
    else:
        try:
            policy = load_weights(Path(text), ActorCritic, PolicyConfig)
        except CheckpointError as error:
            raise AgentError(f"no agent: {error}") from None
        device = None if env is None else env.model.device
        agent = NativeAgent(policy.requires_grad_(False).to(device), greedy)
    if env is not None:
        agent.spec.check(env)
    return agent


def _load_sb3(text: str, env: Any, greedy: bool) -> SB3Agent:
    algorithm, _, name = text.rpartition(":")
    if not Path(name).is_file():
        raise AgentError(f"no agent: {name}: no such file")
    try:
        import stable_baselines3
    except ImportError:
        raise AgentError("an SB3 agent needs: pip install 'nfd-env[sb3]'") from None
    try:
        model = getattr(stable_baselines3, algorithm or "PPO").load(name, device="cpu")
    except Exception as error:  # whatever a damaged zip or another algorithm leads to
        raise AgentError(f"{name} cannot be loaded as {algorithm or 'PPO'}: {error}") from None
    values = getattr(model, SPEC_ATTRIBUTE, None)
    if values is not None:
        return SB3Agent(model, config.from_mapping(AgentSpec, values, name), greedy)
    if env is None:
        raise AgentError(
            f"{name} does not say what it was trained on (agents.train_sb3 writes that); "
            "give the env that it is to play"
        )
    return SB3Agent(model, _guess_spec(model, env, name), greedy)


def _guess_spec(model: Any, env: Any, name: str) -> AgentSpec:
    """The spec of somebody's own SB3 agent whose spaces fit ``env``; frame skip is trusted."""
    if model.action_space != env.single_action_space:
        raise AgentError(
            f"{name} was trained for the action space {model.action_space}, "
            f"this is {env.single_action_space}: load an agent of this action space"
        )
    shape, own = model.observation_space.shape, env.single_observation_space.shape
    for count in range(1, 33):
        stacked = (*own[:-1], count * own[-1])
        if env.obs_type == "latent":
            stacked = (count * own[0], *own[1:])
        # SB3 moves the channels of images first.
        moved = (stacked[2], *stacked[:2]) if env.obs_type == "rgb" else stacked
        if shape in (stacked, moved):
            return replace(AgentSpec.of(env, count), trained_in="unknown")
    raise AgentError(
        f"{name} takes observations {shape}, this env gives {env.single_observation_space.shape} "
        f"of type {env.obs_type}: make the env with the observations of its training"
    )
