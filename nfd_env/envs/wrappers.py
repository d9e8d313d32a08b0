"""Wrappers: against agents that profit where a world is wrong; for shares of a larger batch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from nfd_env.config import config_class, is_number
from nfd_env.envs.checks import check_flag, check_number, check_whole
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv

THRESHOLD = 2.0


@config_class
class GuardConfig:
    """The arguments of ``GuardOODVector``, for config files."""

    penalty: float = 0.0
    threshold: float = THRESHOLD
    truncate: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(**asdict(self))

    def around(self, env: VectorEnv) -> GuardOODVector:
        """``env``, guarded."""
        return GuardOODVector(env, **asdict(self))


class GuardOOD(gymnasium.Wrapper):
    """Penalises or ends what leaves the distribution of real frames, in a single env.

    Each step's reward loses ``penalty`` times the excess of ``info["ood"]`` over ``threshold``.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        penalty: float = 0.0,
        threshold: float = THRESHOLD,
        truncate: bool = False,
    ) -> None:
        """Wrap a learned world.

        Args:
            env: an ``NFDEnv``, possibly wrapped.
            penalty: >= 0, see the class; 0 leaves the rewards alone.
            threshold: > 0; about 1 is the mean of real frames, see ``NFDVectorEnv.watch_ood``.
            truncate: truncate episodes above the threshold. The world itself does it, so that what
                follows is its own reset behaviour.

        Raises:
            ValueError: on a value out of range or another kind of env.
        """
        super().__init__(env)
        base = env.unwrapped
        _watch(base.vector if isinstance(base, NFDEnv) else base, penalty, threshold, truncate)
        self.penalty, self.threshold = penalty, threshold

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step, penalised."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        excess = max(info["ood"] - self.threshold, 0.0)
        return observation, float(reward) - self.penalty * excess, terminated, truncated, info


class GuardOODVector(VectorWrapper):
    """``GuardOOD`` for an ``NFDVectorEnv``, in every autoreset mode and either output."""

    def __init__(
        self,
        env: VectorEnv,
        penalty: float = 0.0,
        threshold: float = THRESHOLD,
        truncate: bool = False,
    ) -> None:
        """See ``GuardOOD``."""
        super().__init__(env)
        _watch(env.unwrapped, penalty, threshold, truncate)
        self.penalty, self.threshold = penalty, threshold

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step, penalised; steps that only reset are not."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        excess = (infos["ood"] - self.threshold).clip(0.0) * infos["_ood"]
        return observations, rewards - self.penalty * excess, terminated, truncated, infos


def _watch(env: Any, penalty: float, threshold: float, truncate: bool) -> None:
    if not isinstance(env, NFDVectorEnv):
        raise ValueError(
            f"only a learned world can tell how far out of distribution it is, not {env}"
        )
    _check(penalty, threshold, truncate)
    # Another guard, or the env's owner, may truncate already: what they want still holds.
    env.watch_ood(min(threshold, env._ood_limit) if truncate else env._ood_limit)


def _check(penalty: float, threshold: float, truncate: bool) -> None:
    if not 0 <= check_number("penalty", penalty) < np.inf:
        raise ValueError(f"penalty must be at least 0 and finite, got {penalty!r}")
    if not check_number("threshold", threshold) > 0:
        raise ValueError(f"threshold must be above 0, got {threshold!r}")
    check_flag("truncate", truncate)


class SlotShare(VectorWrapper):
    """The share of a batch of environments that one process holds.

    Libraries with several processes seed them by consecutive numbers, so that neighbours would play
    nearly the same episodes: slot i of a batch has the seed s + i. Here the seed ``first + n`` is
    that of share n, whose slot i is slot ``n * num_envs + i`` of the whole and has the seed ``first
    + n * num_envs + i``, whatever the number of shares that the whole is cut into.
    """

    def __init__(self, env: VectorEnv, first: int) -> None:
        """Wrap a share.

        Args:
            env: an env; all shares have equally many environments.
            first: >= 0, the seed with which share 0 is reset. A smaller one is share 0's, too.

        Raises:
            ValueError: when ``first`` is no seed.
        """
        self.first = check_whole("first", first, 0)
        super().__init__(env)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; only a seed that is one number is changed."""
        if is_number(seed, whole=True):
            seed = self.first + max(0, int(seed) - self.first) * self.num_envs
        return self.env.reset(seed=seed, options=options)
