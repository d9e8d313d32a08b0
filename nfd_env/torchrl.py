"""The learned world for TorchRL: its EnvBase over the native vector env, all on one device.

Needs ``pip install 'nfd-env[torchrl]'``. TorchRL's own ``GymWrapper`` takes the vector env too
(made with autoreset DISABLED or SAME_STEP), by way of numpy.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase

from nfd_env.envs.checks import RESET_OPTIONS, check_options, check_seeds
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.spaces import CountedFromZero

try:
    from torchrl.data import (
        Binary,
        Bounded,
        Categorical,
        Composite,
        MultiCategorical,
        TensorSpec,
        Unbounded,
    )
    from torchrl.envs import EnvBase
except ImportError as error:
    raise ImportError(
        f"nfd_env.torchrl needs TorchRL: pip install 'nfd-env[torchrl]' ({error})"
    ) from None


_FAR = 10.0  # where one bound of a Box is infinite and another is not: how far away it is drawn


class TorchRLEnv(EnvBase):
    """A batch of copies of a learned world, batch size (num_envs,).

    Entries: ``observation``, uint8 (H, W, 3) or float32 latents (C, h, w); ``action``, as
    ``CountedFromZero`` has it (0 stands for the ``start`` of a Discrete or MultiDiscrete space, a
    Box of integers is one of floats that are rounded; an infinite bound beside a finite one lies
    10 away); ``reward``, float32 (1,);
    ``terminated``, ``truncated`` and ``done``, bool (1,); ``hazard``, float32 (1,), the probability
    with which the step could have terminated, 0 after a reset.

    ``reset`` takes the keyword ``options`` of ``NFDVectorEnv.reset``.
    """

    def __init__(self, world: str | PathLike[str], num_envs: int = 1, **kwargs: Any) -> None:
        """Make the env.

        Args:
            world: a world folder or the name of a shipped world.
            num_envs: copies of the world.
            kwargs: further arguments of ``NFDVectorEnv`` but output and autoreset_mode.

        Raises:
            ValueError: on an argument out of range.
        """
        for name in ("output", "autoreset_mode"):
            if name in kwargs:
                raise ValueError(f"TorchRL decides on {name}, it cannot be given")
        env = NFDVectorEnv(
            world, num_envs, output="torch", autoreset_mode=AutoresetMode.DISABLED, **kwargs
        )
        super().__init__(device=env.model.device, batch_size=torch.Size([num_envs]))
        self.env = env
        self._seed: list[int | None] | None = None
        batch, one = torch.Size([num_envs]), torch.Size([num_envs, 1])
        self.observation_spec = Composite(
            observation=_expand(_spec(env.single_observation_space, self.device), num_envs),
            hazard=Bounded(0.0, 1.0, one, self.device, torch.float32),
            shape=batch,
            device=self.device,
        )
        self.counted = CountedFromZero(env.single_action_space)
        self.action_spec = _expand(_spec(self.counted.space, self.device), num_envs)
        self.reward_spec = Unbounded(one, self.device, torch.float32)
        flag = Categorical(2, one, self.device, torch.bool)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch
        )

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        options = dict(check_options(kwargs.get("options"), RESET_OPTIONS))
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is not None:
            options["reset_mask"] = mask.view(self.num_envs)
        observation, _ = self.env.reset(seed=self._seed, options=options)
        self._seed = None  # later episodes follow from it
        no = torch.zeros(self.num_envs, 1, dtype=torch.bool, device=self.device)
        return self._entries(observation, no.float(), done=no, terminated=no, truncated=no)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = self.counted.to_env(tensordict["action"])
        stepped = tensordict.get("_step", None)
        everywhere = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        stepped = everywhere if stepped is None else stepped.view(-1)
        waiting, held = (~stepped).nonzero()[:, 0].tolist(), None
        if (
            waiting
        ):  # ended, while TorchRL plays the others on: they must be as they were afterwards
            held = self.env.save_state(waiting)
            self.env.reset(options={"reset_mask": ~stepped})
        observation, reward, terminated, truncated, info = self.env.step(action)
        if held is not None:
            observation = self.env.restore_state(held, waiting)
        return self._entries(
            observation,
            info["hazard"][:, None],
            reward=reward[:, None],
            done=(terminated | truncated)[:, None],
            terminated=terminated[:, None],
            truncated=truncated[:, None],
        )

    def _entries(
        self, observation: torch.Tensor, hazard: torch.Tensor, **others: torch.Tensor
    ) -> TensorDict:
        entries = {"observation": observation, "hazard": hazard, **others}
        # Out of inference mode, so that they can be trained on.
        return TensorDict(
            {name: value.clone() for name, value in entries.items()},
            batch_size=self.batch_size,
            device=self.device,
        )

    def set_seed(self, seed: Any = None, static_seed: bool = False) -> int | None:
        """Seed the next reset, see ``NFDVectorEnv.reset``; returns TorchRL's seed of another env.

        Raises:
            ValueError: on what is no seed; those that were given before are kept.
        """
        seeds = check_seeds(seed, self.num_envs)
        following = super().set_seed(next((s for s in seeds if s is not None), None), static_seed)
        self._seed = seeds
        return following

    def _set_seed(self, seed: int | None) -> None:
        self._seed = check_seeds(seed, self.num_envs)

    def close(self, **kwargs: Any) -> None:
        """Close the vector env, too; ``kwargs`` are TorchRL's."""
        super().close(**kwargs)
        self.env.close()

    @property
    def num_envs(self) -> int:
        """Copies of the world."""
        return self.env.num_envs


def _spec(space: spaces.Space, device: torch.device | None) -> TensorSpec:
    """TorchRL's spec of one environment's space."""
    shape = torch.Size(space.shape or ())
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), shape, device, torch.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategorical(space.nvec.tolist(), shape, device, torch.int64)
    if isinstance(space, spaces.MultiBinary):
        return Binary(shape[0], shape, device, torch.int8)
    assert isinstance(space, spaces.Box)
    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32  # frames, or all else
    below, above = space.bounded_below, space.bounded_above
    if not (below | above).any():
        return Unbounded(shape, device, dtype)
    # TorchRL draws NaN where one bound is infinite.
    low = np.where(below, space.low, np.where(above, space.high, 0) - _FAR)
    high = np.where(above, space.high, np.where(below, space.low, 0) + _FAR)
    low, high = (torch.as_tensor(bound, dtype=dtype, device=device) for bound in (low, high))
    return Bounded(low, high, shape, device, dtype)


def _expand(spec: TensorSpec, count: int) -> TensorSpec:
    return spec.expand(torch.Size([count, *spec.shape]))
