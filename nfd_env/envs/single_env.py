"""The learned world as a plain Gymnasium environment: a vector env of one."""

from __future__ import annotations

import difflib
import inspect
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from nfd_env.config import is_number
from nfd_env.envs import checks
from nfd_env.envs.vector_env import EnvState, NFDVectorEnv
from nfd_env.sources.spec import short
from nfd_env.worlds.load import World


class NFDEnv(gymnasium.Env):
    """One copy of a learned world.

    Spaces, rewards, ends, reset options and arguments are those of ``NFDVectorEnv`` without the
    batch dimension, ``num_envs`` and ``autoreset_mode``; so is ``info``, in numpy scalars and
    arrays of the same keys and types at ``reset`` and ``step``. A Discrete action may also be an
    array of shape (1,).

    ``gymnasium.make(..., max_episode_steps=n)`` keeps n to itself, for a ``TimeLimit`` around the
    env, which can only cut episodes shorter than the world's own limit and is no part of
    ``save_state``. ``env.unwrapped.max_episode_steps = n`` tells the env, as ``NFDEnv(...)`` and
    ``gymnasium.make_vec(...)`` do.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self, world: str | PathLike[str], device: str | torch.device = "auto", **options: Any
    ) -> None:
        """See ``NFDVectorEnv``.

        Raises:
            TypeError: on an option that it does not have.
        """
        for name in options:
            if name not in _SIGNATURE.parameters:
                near = difflib.get_close_matches(name, _SIGNATURE.parameters, 1)
                raise TypeError(
                    f"NFDEnv got an unexpected keyword argument {name!r}; "
                    + (f"did you mean {near[0]!r}?" if near else "see help(NFDEnv)")
                )
        self.vector = NFDVectorEnv(
            world, 1, device, autoreset_mode=AutoresetMode.DISABLED, **options
        )
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.metadata = {k: v for k, v in self.vector.metadata.items() if k != "autoreset_mode"}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; once the env is made, as ``NFDVectorEnv`` does (see its errors)."""
        if "metadata" not in self.__dict__:
            super().__setattr__(name, value)
        elif name == "vector":
            raise AttributeError("vector of an env cannot be set: make another env")
        elif name in _OF_VECTOR:
            setattr(self.vector, name, value)
        else:
            super().__setattr__(name, self.vector._settable(name, value))

    def __getattr__(self, name: str) -> Any:
        """The options that it was made with are those of the vector env."""
        if name in _OF_VECTOR:
            return getattr(self.vector, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def render_mode(self) -> str | None:  # type: ignore[override]
        """None or "rgb_array"."""
        return self.vector.render_mode

    @property
    def np_random_seed(self) -> int:
        """The seed of its episodes; -1 before the first reset."""
        return self.vector.np_random_seed[0]

    @property
    def world(self) -> World:
        """The loaded world."""
        return self.vector.world

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode; see ``NFDVectorEnv`` for ``options``."""
        # Checked before anything changes: Gymnasium's own check comes last.
        if seed is not None:
            array = isinstance(seed, np.ndarray | Tensor) and np.ndim(seed) == 0
            if not (array or is_number(seed, whole=True)):
                raise ValueError(f"a seed must be a whole number, got {short(seed)}")
            seed = checks.check_seeds(seed, 1)[0]
        observation, info = self.vector.reset(seed=seed, options=options)
        super().reset(seed=seed)
        return observation[0], _first(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance by one action; raises ValueError when it does not lie in the action space."""
        if isinstance(action, Tensor):
            batch: Any = action[None]
        else:
            try:
                batch = np.asarray(action)[None]
            except ValueError:
                raise ValueError(f"actions of {self.action_space} cannot be {action!r}") from None
        if self.action_space.shape == () and tuple(batch.shape) == (1, 1):  # as agents hand out
            batch = batch[0]
        observation, reward, terminated, truncated, info = self.vector.step(batch)
        ends = bool(terminated[0]), bool(truncated[0])
        return observation[0], float(reward[0]), *ends, _first(info)

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The current frame, uint8 (H, W, 3), with ``render_mode="rgb_array"``."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def get_action_meanings(self) -> list[str]:
        """See ``NFDVectorEnv.get_action_meanings``."""
        return self.vector.get_action_meanings()

    def get_keys_to_action(self) -> dict[tuple[str, ...], Any]:
        """See ``NFDVectorEnv.get_keys_to_action``."""
        return self.vector.get_keys_to_action()

    def set_sampling(self, **changed: Any) -> None:
        """See ``NFDVectorEnv.set_sampling``."""
        self.vector.set_sampling(**changed)

    def save_state(self) -> EnvState:
        """See ``NFDVectorEnv.save_state``."""
        return self.vector.save_state()

    def restore_state(self, state: EnvState) -> Any:
        """See ``NFDVectorEnv.restore_state``."""
        return self.vector.restore_state(state)[0]

    def close(self) -> None:
        """Free what the environment holds; it cannot be stepped any more."""
        self.vector.close()


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """What ``info`` says of the first environment, without masks: numpy scalars and arrays."""
    first: dict[str, Any] = {}
    for name, value in info.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict):
            first[name] = _first(value)
        else:
            one = value[0]
            first[name] = one.cpu().numpy()[()] if isinstance(one, Tensor) and not one.ndim else one
    return first


def _signature() -> inspect.Signature:
    """That of ``NFDVectorEnv`` without what a single environment has no use for."""
    whole = inspect.signature(NFDVectorEnv.__init__)
    left = [p for name, p in whole.parameters.items() if name not in ("num_envs", "autoreset_mode")]
    return whole.replace(parameters=left)


_SIGNATURE = _signature()
_OF_VECTOR = {*_SIGNATURE.parameters, "sampling"} - {"self", "world"}
NFDEnv.__init__.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # for help() and editors
