"""Whom a person can hand over to: a callable, a Stable-Baselines3 file, or a behaviour policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.play.session import Agent


def load_agent(agent: Any, space: spaces.Space) -> Agent:
    """Something that chooses actions, as a function of the frame.

    Args:
        agent: a callable (frame, uint8 (H, W, 3)) -> action; an object with SB3's ``predict`` or a
            behaviour policy's ``act``; or a string: "random", the path of an SB3 file (with the
            algorithm in front of it when it is not PPO, as in "DQN:agent.zip"), or "module:Class"
            of a behaviour policy.
        space: the action space.

    Raises:
        ValueError: when it is none of these, or cannot be loaded.
    """
    given: Any = _named(agent) if isinstance(agent, str) else agent
    if hasattr(given, "predict"):
        return lambda frame: _plain(given.predict(frame, deterministic=False)[0], space)
    if hasattr(given, "act"):
        if hasattr(given, "reset"):
            given.reset(SimpleNamespace(action_space=space), np.random.default_rng())
        return lambda frame: _plain(given.act(frame), space)
    if callable(given):
        return lambda frame: _plain(given(frame), space)
    raise ValueError(f"an agent must be callable or have act() or predict(), got {agent!r}")


def _named(name: str) -> Any:
    from nfd_env.data.policies import make_policy

    if name == "random":
        return make_policy("random_held", {})
    if not name.endswith(".zip"):
        return make_policy(name, {})
    algorithm, _, path = name.rpartition(":")
    try:
        return make_policy("sb3", {"path": path, "algorithm": algorithm or "PPO"})
    except ImportError:
        raise ValueError("an SB3 agent needs: pip install 'nfd-env[sb3]'") from None
    except (OSError, AttributeError) as error:
        raise ValueError(f"agent {name!r} cannot be loaded: {error}") from None


def _plain(action: Any, space: spaces.Space) -> Any:
    return int(np.asarray(action).item()) if isinstance(space, spaces.Discrete) else action
