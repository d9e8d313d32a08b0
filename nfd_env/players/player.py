"""One interface for whoever chooses actions, and what stands behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from nfd_env.data.policies import BehaviourPolicy
from nfd_env.inference.noise import fitting_seed
from nfd_env.named import described
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, new_stack, push
from nfd_env.spaces import CountedFromZero, space_from_dict


class Player(Protocol):
    """Chooses the actions of a batch of environments.

    Attributes:
        spec: what it was trained on: its ``obs_type`` and ``frame_skip`` are those to make the
            environments with; None for one that takes the frames of any world.
    """

    @property
    def spec(self) -> AgentSpec | None:
        """See the class."""
        ...

    def reset(self, n: int, seed: int | None = None) -> None:
        """New episodes begin in ``n`` environments; ``seed`` makes the choices repeatable."""
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


class NetworkPlayer:
    """An agent of the native PPO; see ``Player``."""

    def __init__(self, policy: ActorCritic, greedy: bool = False) -> None:
        """Play ``policy``, sampling its actions, or taking the most probable with ``greedy``."""
        self.policy, self.spec, self._greedy = policy, policy.config.spec, greedy
        self._generator = torch.Generator(policy.device)
        self._stack: Tensor | None = None

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Player``."""
        self._n, self._stack = n, None
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(fitting_seed(seed, 64))

    @torch.no_grad()
    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Player``."""
        tensor = torch.as_tensor(observations, device=self.policy.device)
        _check_shape(tensor, self._n, self.spec)
        if self._stack is None:
            self._stack = new_stack(tensor, self.spec.frame_stack)
        else:
            mask = None if first is None else torch.as_tensor(first, device=tensor.device)
            self._stack = push(self._stack, tensor, mask)
        raw, *_ = self.policy.act(self.policy.look(self._stack), self._greedy, self._generator)
        action = self.policy.playable(raw)
        return action if isinstance(observations, Tensor) else action.cpu().numpy()


class SB3Player:
    """An agent of Stable-Baselines3; see ``Player``."""

    def __init__(self, model: Any, spec: AgentSpec, greedy: bool = False) -> None:
        """Play ``model``, sampling its actions, or taking the most probable with ``greedy``."""
        self.model, self.spec, self._greedy = model, spec, greedy
        self._counted = CountedFromZero(space_from_dict(spec.action_space))
        self._stack: Any = None

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Player``."""
        self._n, self._stack = n, None
        if seed is not None:
            self.model.set_random_seed(fitting_seed(seed, 32))  # it seeds NumPy's too

    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Player``."""
        from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

        tensor = isinstance(observations, Tensor)
        array = observations.cpu().numpy() if tensor else np.asarray(observations)
        _check_shape(array, self._n, self.spec)
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
        action = np.asarray(self._counted.to_env(action))
        return torch.from_numpy(action).to(observations.device) if tensor else action


class PolicyPlayer:
    """A behaviour policy of recordings, one instance an environment; see ``Player``."""

    spec = None

    def __init__(self, policies: list[BehaviourPolicy], env: Any) -> None:
        """Play ``env``, a real or learned vector env of frames, one policy an environment."""
        self._policies = policies
        self._inside = hasattr(env, "envs")
        if self._inside:
            self._envs: list[Any] = env.envs
        else:
            # All that a learned world has to show a policy is its action space.
            copies = [copy.deepcopy(env.single_action_space) for _ in policies]
            self._envs = [SimpleNamespace(action_space=space) for space in copies]
        self.reset(len(policies))  # what it cannot play shows now

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Player``."""
        seed = None if seed is None else fitting_seed(seed, 128)  # NumPy takes True for 1
        self._rng, self._step = np.random.default_rng(seed), 0
        self._begin(range(n))

    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Player``."""
        if first is not None:
            self._begin(int(row) for row in np.flatnonzero(first))
        self._step += 1
        chosen = []
        for row, (policy, observation) in enumerate(zip(self._policies, observations, strict=True)):
            with _blamed(f"policy {type(policy).__name__}", row, self._step):
                chosen.append(np.array(policy.act(observation)))
        return np.stack(chosen)

    def _begin(self, rows: Any) -> None:
        for row in rows:
            policy, rng = self._policies[row], self._rng.spawn(1)[0]
            with _blamed(f"policy {type(policy).__name__}", row, self._step):
                self._reset(policy, self._envs[row], rng)

    def _reset(self, policy: BehaviourPolicy, env: Any, rng: np.random.Generator) -> None:
        try:
            policy.reset(env, rng)
        except AttributeError as error:
            if self._inside:
                raise
            raise AgentError(
                f"the policy cannot play the learned world: it wants more of the game than "
                f"its frames and action space ({error}); --real-only scores it in the "
                "real game alone"
            ) from None


class FunctionPlayer:
    """A function of one frame, asked for each environment; see ``Player``."""

    spec = None

    def __init__(self, function: Callable[[np.ndarray], Any]) -> None:
        """Play what ``function`` gives for a frame, uint8 (H, W, 3)."""
        self._function, self._step = function, 0
        self._name = getattr(function, "__name__", type(function).__name__)

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Player``; a function of the frame alone has nothing to begin."""
        self._step = 0

    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Player``."""
        self._step += 1
        chosen = []
        for row, frame in enumerate(observations):
            with _blamed(f"function {self._name}", row, self._step):
                chosen.append(np.array(self._function(frame)))
        return np.stack(chosen)


@contextmanager
def _blamed(name: str, row: int, step: int) -> Iterator[None]:
    """Say in one line what foreign code has raised, and where."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("nfd_env."):
            raise
        raise AgentError(
            f"the {name} failed in environment {row}, step {step}: {described(error)}"
        ) from error


def _check_shape(observations: Any, n: int, spec: AgentSpec) -> None:
    expected = (n, *spec.observation_shape)
    if tuple(observations.shape) != expected:
        raise AgentError(
            f"the agent takes observations {expected}, got {tuple(observations.shape)}"
        )
