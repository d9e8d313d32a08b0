"""What the learned world's vector env and the real game's have in common."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from nfd_env.envs import guests
from nfd_env.envs.checks import check_choice, check_room, check_whole
from nfd_env.envs.observing import OBSERVATION_TYPES, OUTPUTS, observation_space, to_output
from nfd_env.precision import PRECISIONS
from nfd_env.sources.keys import keys_to_action
from nfd_env.sources.spec import short
from nfd_env.worlds.load import World, load_world
from nfd_env.worlds.rivals import RIVALS

DYNAMICS = (None, "student", "teacher", "flow", *RIVALS)
_LONGEST_SKIP = 10_000  # frames; minutes of any game, so that more is a slip

# The thread that is changing an env, by the env's id; nobody else's entry is ever touched. It lies
# outside the envs, so that copies and pickles of them know nothing of it.
_CHANGING: dict[int, int] = {}
if hasattr(os, "register_at_fork"):  # the threads of the parent are not there in a fork
    os.register_at_fork(after_in_child=_CHANGING.clear)

Method = TypeVar("Method", bound=Callable[..., Any])


def one_thread(method: Method) -> Method:
    """``method`` of an env, for one thread at a time; those so marked may call each other.

    Raises:
        RuntimeError: while another thread is in such a method of the same env.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        me, key = threading.get_ident(), id(self)
        if _CHANGING.get(key) == me:  # called by another of these methods
            return method(self, *args, **kwargs)
        try:
            if _CHANGING.setdefault(key, me) != me:  # atomic: one thread alone gets in
                raise RuntimeError(
                    f"{method.__name__}() was called while another thread changes this env: an "
                    "env is for one thread at a time; make one for each, or use a lock"
                )
            return method(self, *args, **kwargs)
        finally:
            if _CHANGING.get(key) == me:
                del _CHANGING[key]

    return alone  # type: ignore[return-value]


class WorldVectorEnv(VectorEnv):
    """Spaces, output, and attributes by name of a batch that looks like a world."""

    # What one environment of the batch calls by another name than the batch does.
    _OF_ONE = {
        "observation_space": "single_observation_space",
        "action_space": "single_action_space",
    }

    # What nobody can set once the env is made: the rest was made to fit it, or would not follow.
    _FIXED: dict[str, str] = dict.fromkeys(
        (
            *("num_envs", "obs_type", "output", "frame_skip", "autoreset_mode", "world"),
            *("device", "precision", "single_observation_space", "single_action_space"),
            *("observation_space", "action_space"),
        ),
        "make another env",
    )

    world: World
    obs_type: str
    output: str
    _made = False  # whether attributes are guarded

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; once the env is made, only to what it goes on with.

        Raises:
            AttributeError: for what cannot be set.
            ValueError: on a value that cannot be used.
        """
        super().__setattr__(name, self._settable(name, value) if self._made else value)

    def __delattr__(self, name: str) -> None:
        """Refuse to forget what cannot be set."""
        if self._made and name in self._FIXED:
            raise AttributeError(f"{name} of an env cannot be deleted")
        super().__delattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.world.model.device

    @property
    def precision(self) -> str:
        """The number format of tokenizer and dynamics, "fp32" or "bf16"."""
        return self.world.model.precision

    def _settable(self, name: str, value: Any) -> Any:
        """``value`` as attribute ``name`` takes it; raises what ``__setattr__`` does."""
        if name in self._FIXED:
            raise AttributeError(f"{name} of an env cannot be set: {self._FIXED[name]}")
        if callable(getattr(type(self), name, None)) and not callable(value):
            raise AttributeError(f"{name} is a method, it cannot be set to {short(value)}")
        if name == "max_episode_steps" and value is not None:
            return check_whole(name, value)
        if name == "render_mode":
            check_choice(name, value, (None, *self.metadata.get("render_modes", ())))
        kinds = {"metadata": dict, "spec": EnvSpec | None, "closed": bool}
        if not isinstance(value, kinds.get(name, object)):
            raise ValueError(f"{name} of an env cannot be {short(value)}")
        return value

    def _check_common(
        self, num_envs: Any, frame_skip: Any, obs_type: Any, output: Any, max_episode_steps: Any
    ) -> None:
        """Keep the arguments that do not need the world; raises ValueError."""
        check_choice("obs_type", obs_type, OBSERVATION_TYPES)
        check_choice("output", output, OUTPUTS)
        self.num_envs = check_whole("num_envs", num_envs)
        self.frame_skip = check_whole("frame_skip", frame_skip, 1, _LONGEST_SKIP)
        if max_episode_steps is not None:
            max_episode_steps = check_whole("max_episode_steps", max_episode_steps)
        self.max_episode_steps = max_episode_steps
        self.obs_type, self.output = obs_type, output

    def _load(self, world: Any, device: Any, precision: Any, dynamics: Any = None) -> World:
        """Load a world, fit for this process; raises ValueError for what is no name of one."""
        if not isinstance(world, str | PathLike):
            raise ValueError(f"world must be a folder or the name of a world, got {short(world)}")
        if not isinstance(device, str | torch.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {short(device)}")
        check_choice("precision", precision, PRECISIONS)
        check_choice("dynamics", dynamics, DYNAMICS)
        guests.settle(device)
        return load_world(world, device, precision, dynamics)

    def _look_like(self, world: World, autoreset_mode: AutoresetMode) -> None:
        """Take the spaces and the frame rate of ``world``."""
        self.world, self.autoreset_mode = world, autoreset_mode
        self.metadata = {
            **self.metadata,
            # Whole, because gymnasium.utils.play and writers of films need that.
            "render_fps": max(1, round(float(world.spec.fps) / self.frame_skip)),
            "autoreset_mode": autoreset_mode,
        }
        self.single_observation_space = observation_space(world, self.obs_type)
        self.single_action_space = copy.deepcopy(world.action_space)
        shape, dtype = self.single_observation_space.shape, self.single_observation_space.dtype
        size = self.num_envs * int(np.prod(shape)) * np.dtype(dtype).itemsize
        check_room("num_envs", self.num_envs, 3 * size)  # a batch and the bounds of its space
        self._batch_spaces()

    def _batch_spaces(self) -> None:
        singles = self.single_observation_space, self.single_action_space
        seen, act = (batch_space(space, self.num_envs) for space in singles)
        self.__dict__.update(observation_space=seen, action_space=act)

    def _need_open(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError(
                "this env was closed; make another one to go on"
            )

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or read an attribute; one result for each.

        They are one object: what does not differ between them is there once, and repeated.
        """
        value = getattr(self, self._OF_ONE.get(name, name))
        if callable(value):
            value = value(*args, **kwargs)
        if name in ("render", "np_random_seed") and isinstance(value, tuple):
            return value  # one for each already
        return (value,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment, see ``call``."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of all environments.

        Raises:
            AttributeError: for what cannot be set, see ``__setattr__``, or is not public.
            ValueError: on a value that cannot be used; when ``values`` is a list that differs
                between environments, which are one object, or is of another length.
        """
        if name.startswith("_"):
            raise AttributeError(f"{name} is not public, it cannot be set by name")
        if isinstance(values, list | tuple):
            if len(values) != self.num_envs or not all(_equal(v, values[0]) for v in values):
                raise ValueError(
                    f"{name} must be one value, or {self.num_envs} equal ones: the environments "
                    f"of a batch are one object, got {short(values)}"
                )
            values = values[0]
        setattr(self, self._OF_ONE.get(name, name), values)

    def get_action_meanings(self) -> list[str]:
        """Names of the actions in upper case, as Atari's environments have it.

        They stand in the order of the actions, so that the first is "NOOP" only where action 0 does
        nothing; wrappers that press "NOOP" at reset refuse other worlds, and rightly.

        Raises:
            ValueError: when the action space is not Discrete.
        """
        space = self.single_action_space
        if not isinstance(space, spaces.Discrete):
            raise ValueError(f"only actions of a Discrete space have names, not those of {space}")
        names = self.world.spec.source.action_names
        return [name.upper() for name in names] or [f"ACTION_{i}" for i in range(int(space.n))]

    def get_keys_to_action(self) -> dict[tuple[str, ...], Any]:
        """The world's keymap for ``gymnasium.utils.play``: single-letter keys to whole actions.

        That function takes 0 for the action without a key; where the resting action is another one,
        as in every Box, tell it by ``noop=`` (see ``nfd_env.sources.keys.resting_action``).
        """
        source = self.world.spec.source
        return keys_to_action(self.single_action_space, source.action_names, source.keys)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.world.model.device)

    @property
    def _numbers(self) -> dict[str, Any]:
        """Arguments of new tensors of numbers, whatever torch's defaults are."""
        return {"dtype": torch.float32, "device": self.world.model.device}

    def _seed_np_random(self, seeds: Sequence[int | None]) -> None:
        """``np_random``, which is for wrappers and users, begins anew with the first one's seed."""
        if seeds[0] is not None:
            self._np_random, _ = seeding.np_random(seeds[0])

    def _told(self, array: np.ndarray) -> Any:
        """What ``infos`` hold of an array of ours."""
        return array.copy() if self.output == "numpy" else self._tensor(array)

    def _output(self, value: Any) -> Any:
        return to_output(value, self.output)

    def _step_output(
        self,
        observation: Any,
        reward: Tensor,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos = self._output(infos)
        if self.output == "torch":
            return observation, reward, self._tensor(terminated), self._tensor(truncated), infos
        return observation, reward.cpu().double().numpy(), terminated, truncated, infos


def _equal(left: Any, right: Any) -> bool:
    try:
        return left is right or bool(np.all(left == right))
    except Exception:  # whatever foreign objects say to being compared
        return False
