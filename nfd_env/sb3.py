"""The learned world for Stable-Baselines3: its VecEnv over the native vector env.

Needs ``pip install 'nfd-env[sb3]'``. There is one model however many environments there are, so
Stable-Baselines3's own ``DummyVecEnv`` or ``SubprocVecEnv`` around single environments is not
needed, and slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from nfd_env.config import is_number
from nfd_env.envs.checks import check_options, check_seeds, chosen_contexts
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.sources.spec import short
from nfd_env.spaces import CountedFromZero

try:
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
except ImportError as error:
    raise ImportError(
        f"nfd_env.sb3 needs Stable-Baselines3: pip install 'nfd-env[sb3]' ({error})"
    ) from None


_OPTIONS = ("context", "start")  # of a reset; Stable-Baselines3 resets all environments together


class SB3VecEnv(VecEnv):
    """A Gymnasium vector env as a Stable-Baselines3 ``VecEnv``.

    The infos of an environment whose episode ended hold ``terminal_observation`` and
    ``TimeLimit.truncated``; every info holds what the vector env reports, e.g. ``hazard``.

    Actions are counted from 0, as Stable-Baselines3 counts them: of an env whose actions are
    ``Discrete(n, start=k)``, 0 stands for k; and a Box of integers is one of floats, which are
    rounded. ``counted`` translates (see ``CountedFromZero``). Algorithms of Stable-Baselines3
    refuse a Box without finite bounds; rescale it first.

    Attributes belong to the one vector env: ``get_attr`` gives every index the same value,
    ``env_method`` calls the method once and gives every index its result, and ``set_attr`` works
    for all indices together only.
    """

    def __init__(self, env: VectorEnv) -> None:
        """Wrap ``env``, which must give numpy arrays and reset in the step that ends an episode.

        Raises:
            ValueError: when it does not.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                "Stable-Baselines3 needs a vector env made with autoreset_mode="
                f"AutoresetMode.SAME_STEP, this one has {mode}"
            )
        if getattr(env.unwrapped, "output", "numpy") != "numpy":
            raise ValueError('Stable-Baselines3 needs a vector env made with output="numpy"')
        self.env: Any = env
        self.counted = CountedFromZero(env.single_action_space)
        self._actions: Any = None  # between ``step_async`` and ``step_wait``
        super().__init__(env.num_envs, env.single_observation_space, self.counted.space)
        self.metadata = {**self.metadata, "render_fps": env.metadata.get("render_fps", 30)}

    def reset(self) -> np.ndarray:
        """Begin new episodes, with what ``seed`` and ``set_options`` last gave.

        Raises:
            ValueError: on options that an environment does not have, or that cannot be used. No
                episode has changed then, and the seeds are kept; the options are forgotten.
        """
        options = list(self._options)
        self._reset_options()
        groups = self._groups(options)
        seeds = None if all(s is None for s in self._seeds) else list(self._seeds)
        whole = len(groups) == 1
        if not whole:  # the very first reset of a vector env must be one of every environment
            whole = min(self.env.unwrapped.np_random_seed) < 0
        observation: Any = None
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        # Each environment is reset once, in its own group, so that no episode of its seed is left
        # out.
        for mask, given in groups:
            masked = given if whole else {**given, "reset_mask": mask}
            observation, infos = self.env.reset(seed=seeds, options=masked or None)
            for row in np.flatnonzero(mask).tolist():
                rows[row] = _row(infos, row)
            if whole and len(groups) > 1:
                # The other groups have begun with another's options: with its seed given once
                # more, an environment begins its first episode again.
                whole, seeds = False, list(self.env.unwrapped.np_random_seed)
        self._reset_seeds()
        self.reset_infos = rows
        return observation

    def _groups(self, options: Sequence[Any]) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Which environments can be reset together, and with which options of the vector env.

        Contexts come first: the vector env checks them, before it changes anything.

        Raises:
            ValueError: on options that cannot be used.
        """
        for own in options:
            check_options(own, _OPTIONS)
        contexts = [own.get("context") for own in options]
        starts = [own.get("start") for own in options]
        if any(c is not None and s is not None for c, s in zip(contexts, starts, strict=True)):
            raise ValueError("give either the reset option context or start, not both")
        world = self.env.unwrapped
        for name, values in (("context", contexts), ("start", starts)):
            if not isinstance(world, NFDVectorEnv) and any(v is not None for v in values):
                raise ValueError(f"only a learned world has the reset option {name}, not {world}")
        for start in starts:  # all, before any is compared with another: True == 1
            if start is not None:
                chosen_contexts(world.world, world.starts, {"start": start}, [0], self.num_envs)
        groups: list[tuple[np.ndarray, dict[str, Any]]] = []
        # The vector env takes one start at a time.
        for start in sorted(dict.fromkeys(starts), key=lambda s: s is not None):
            given = {} if start is None else {"start": start}
            if start is None and any(c is not None for c in contexts):
                given = {"context": contexts}
            groups.append((np.array([s == start for s in starts]), given))
        return groups

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Options of the next reset: one dict for every environment, or a list with one for each.

        Raises:
            ValueError: on anything else; the options that were given before are kept.
        """
        if options is not None and not isinstance(options, dict):
            if not isinstance(options, list | tuple):
                raise ValueError(f"options must be a dict or a list of them, got {short(options)}")
            if len(options) != self.num_envs:
                raise ValueError(
                    f"{len(options)} options were given for {self.num_envs} environments"
                )
            for own in options:
                if not isinstance(own, dict):
                    raise ValueError(f"the options of an environment are a dict, got {short(own)}")
        super().set_options(options)  # type: ignore[arg-type]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Environment i gets ``seed`` + i at the next reset; see the base class.

        Raises:
            ValueError: on what is no seed; the seeds that were given before are kept.
        """
        if seed is not None and not is_number(seed, whole=True):
            raise ValueError(f"a seed must be a whole number, got {seed!r}")
        check_seeds(seed, self.num_envs)
        return super().seed(seed)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep ``actions``, counted from 0, for ``step_wait``."""
        self._actions = self.counted.to_env(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Advance every environment by one action.

        Returns:
            Observations, float32 rewards, dones and infos; after an end, the observation is the
            next episode's first.

        Raises:
            RuntimeError: without actions from ``step_async``, which are taken once.
        """
        actions, self._actions = self._actions, None
        if actions is None:
            raise RuntimeError("step_wait takes the actions of step_async: call that first")
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        done = np.asarray(terminated | truncated)
        final_obs, final_info = infos.pop("final_obs", None), infos.pop("final_info", {})
        rows = []
        for i in range(self.num_envs):
            row = _row(infos, i)
            row["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            if done[i]:
                row |= _row(final_info, i)
                row["terminal_observation"] = final_obs[i]
            rows.append(row)
        return observation, np.asarray(reward, np.float32), done, rows

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The current frame of each environment, with ``render_mode="rgb_array"``."""
        frames: Any = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector env's attribute, once for each index."""
        return [self._find(attr_name)] * len(self._numbers(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the vector env's attribute.

        Raises:
            ValueError: for some of the environments only; they are one object.
        """
        if len(set(self._numbers(indices))) != self.num_envs:
            raise ValueError(f"{attr_name} can only be set for all environments together")
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call the vector env's method once; its result, once for each index."""
        numbers = self._numbers(indices)  # before anything is done
        return [self._find(method_name)(*method_args, **method_kwargs)] * len(numbers)

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False for each index: a wrapper of single environments cannot be around a batch."""
        return [False] * len(self._numbers(indices))

    def _numbers(self, indices: VecEnvIndices) -> list[int]:
        """Numbers of environments, from 0 on; negative ones count from the end, as in a list.

        Raises:
            IndexError: for one that there is not.
        """
        numbers = list(self._get_indices(indices))
        for number in numbers:
            if not is_number(number, whole=True) or not -self.num_envs <= number < self.num_envs:
                raise IndexError(
                    f"there is no environment {number!r}: there are {self.num_envs}, from 0 on"
                )
        return [number % self.num_envs for number in numbers]

    def _find(self, name: str) -> Any:
        env: Any = self.env
        return getattr(env if hasattr(env, name) else env.unwrapped, name)


class MonitoredVecEnv(VecMonitor):
    """Stable-Baselines3's monitor, which can be copied and pickled like the env that it is around.

    What makes that fail there, and is left out here, is a list of its own class's attributes.
    """

    def __getstate__(self) -> dict[str, Any]:
        """All but that list.

        Raises:
            TypeError: while it writes a file, which a copy would write into as well.
        """
        if self.results_writer is not None:
            raise TypeError(
                "an env that writes monitor.csv cannot be copied or pickled: make it without "
                "monitor_dir"
            )
        return {k: v for k, v in self.__dict__.items() if k != "class_attributes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See ``__getstate__``."""
        vars(self).update(state)
        self.class_attributes = dict(inspect.getmembers(type(self)))


def make_vec_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    monitor_dir: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    wrapper: Callable[[VectorEnv], VectorEnv] | None = None,
) -> VecEnv:
    """Make a monitored VecEnv; to be used like Stable-Baselines3's function of the same name.

    Args:
        env_id: a Gymnasium id, e.g. "NFD/DoomTakeCover-v0", or "NFD/World-v0" with
            ``env_kwargs={"world": folder}``.
        n_envs: number of environments.
        seed: environment i gets ``seed`` + i at the first reset.
        monitor_dir: folder to write ``monitor.csv`` to, if any.
        env_kwargs: arguments of ``NFDVectorEnv``, e.g. ``frame_skip`` or ``obs_type``.
        wrapper: put around the vector env of all environments, e.g. ``GuardOODVector``.

    Raises:
        ValueError: on arguments that the env or Stable-Baselines3 cannot take.
    """
    kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP, **(env_kwargs or {})}
    env = gymnasium.make_vec(env_id, num_envs=n_envs, **kwargs)
    venv = SB3VecEnv(env if wrapper is None else wrapper(env))
    venv.seed(seed)
    return MonitoredVecEnv(
        venv, None if monitor_dir is None else str(Path(monitor_dir).expanduser() / "monitor.csv")
    )


def _row(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The info of one environment; a mask ``_key`` says who has ``key``."""
    return {
        key: _row(value, row) if isinstance(value, Mapping) else value[row]
        for key, value in infos.items()
        if not key.startswith("_") and (f"_{key}" not in infos or infos[f"_{key}"][row])
    }
