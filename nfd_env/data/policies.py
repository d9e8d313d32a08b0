"""Behaviour policies for recording: what decides on the actions of an episode."""

from __future__ import annotations

import os
from typing import Any, Protocol

import gymnasium
import numpy as np

from nfd_env.named import UntrustedError, check_trusted, import_named
from nfd_env.sources.spec import short


class BehaviourPolicy(Protocol):
    """Chooses actions during recording.

    A custom policy is any ``module:Class`` with this interface; its keyword arguments come from
    the collect config.
    """

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """A new episode of ``env`` has begun; all randomness comes from ``rng``."""
        ...

    def act(self, observation: np.ndarray) -> Any:
        """The action for ``observation``, uint8 (H, W, 3), which is the policy's own."""
        ...


class RandomHeld:
    """Uniformly random actions, each held for a random number of steps, as a person holds keys."""

    needs_frames = False  # so that a learned world need not draw them

    def __init__(self, low: int = 1, high: int = 20) -> None:
        """Hold each action for ``low`` to ``high`` steps (both inclusive)."""
        if not 1 <= low <= high:
            raise ValueError(f"hold lengths must satisfy 1 <= low <= high, got {low}, {high}")
        self.low, self.high = low, high

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """See ``BehaviourPolicy``."""
        self._rng, self._left, self._space = rng, 0, env.action_space
        self._space.seed(int(rng.integers(2**31)))

    def act(self, observation: np.ndarray) -> Any:
        """See ``BehaviourPolicy``."""
        if self._left == 0:
            self._action = self._space.sample()
            self._left = int(self._rng.integers(self.low, self.high + 1))
        self._left -= 1
        return np.copy(self._action)[()]  # an environment may change what it is given


class SB3Agent:
    """A saved Stable-Baselines3 agent that acts on the recorded frames."""

    def __init__(
        self,
        path: str,
        algorithm: str = "PPO",
        deterministic: bool = False,
        trust: bool = False,
    ) -> None:
        """Load ``path`` with the class ``stable_baselines3.<algorithm>``.

        Raises:
            UntrustedError: without ``trust``, as the file may run its author's code.
            ValueError: when the library has no such class.
        """
        path = os.path.expanduser(path)
        check_trusted(path, trust)
        import stable_baselines3

        if not hasattr(stable_baselines3, algorithm):
            raise ValueError(f"Stable-Baselines3 has no algorithm {algorithm!r}")
        self._agent = getattr(stable_baselines3, algorithm).load(path, device="cpu")
        self._deterministic = deterministic

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """See ``BehaviourPolicy``."""
        self._agent.set_random_seed(int(rng.integers(2**31)))

    def act(self, observation: np.ndarray) -> Any:
        """See ``BehaviourPolicy``."""
        action, _ = self._agent.predict(observation, deterministic=self._deterministic)
        return action[()] if np.ndim(action) == 0 else action


class Mistaken:
    """Another policy, now and then replaced by held random actions, to get off its path."""

    def __init__(self, policy: BehaviourPolicy, rate: float, low: int = 4, high: int = 20) -> None:
        """Begin a random stretch of ``low`` to ``high`` steps with probability ``rate`` a step."""
        if not 0 <= rate <= 1:
            raise ValueError(f"mistakes must be a probability, got {rate}")
        self._policy, self._rate, self._low, self._high = policy, rate, low, high
        self.real_kwargs = getattr(policy, "real_kwargs", {})  # what it wants the game made with

    def reset(self, env: gymnasium.Env, rng: np.random.Generator) -> None:
        """See ``BehaviourPolicy``."""
        self._policy.reset(env, rng)
        self._rng, self._left, self._space = rng, 0, env.action_space
        self._space.seed(int(rng.integers(2**31)))

    def act(self, observation: np.ndarray) -> Any:
        """See ``BehaviourPolicy``."""
        action = self._policy.act(observation)
        if self._left == 0 and self._rng.random() < self._rate:
            self._left = int(self._rng.integers(self._low, self._high + 1))
            self._action = self._space.sample()
        if self._left > 0:
            self._left -= 1
            return np.copy(self._action)[()]
        return action


_BUILT_IN: dict[str, type] = {"random_held": RandomHeld, "sb3": SB3Agent}


def make_policy(name: str, kwargs: dict[str, Any], mistakes: float = 0.0) -> BehaviourPolicy:
    """Make "random_held", "sb3", or a custom "module:Class".

    Raises:
        ValueError: when there is no such policy or it does not take these arguments.
    """
    if name in _BUILT_IN:
        factory = _BUILT_IN[name]
    elif ":" in name:
        try:
            factory = import_named(name)
        except ValueError as error:
            raise ValueError(f"policy {error}") from None
    else:
        raise ValueError(
            f"unknown policy {name!r}; known: {', '.join(_BUILT_IN)}, or your own as module:Class"
        )
    try:
        policy: BehaviourPolicy = factory(**kwargs)
    except UntrustedError:
        raise
    except (Exception, SystemExit) as error:  # whatever the policy's own code does
        reason = " ".join(str(error).split())
        raise ValueError(f"policy {name!r} cannot be made: {reason}") from None
    lacking = [part for part in ("reset", "act") if not callable(getattr(policy, part, None))]
    if lacking:
        raise ValueError(
            f"policy {name!r} is none: what it makes, {short(policy)}, has no {lacking[0]}()"
        )
    return Mistaken(policy, mistakes) if mistakes else policy
