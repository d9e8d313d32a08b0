"""A batch of real games that looks like a batch of learned worlds: what agents are compared in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from nfd_env.envs import checks
from nfd_env.envs.base import WorldVectorEnv
from nfd_env.envs.observing import observe
from nfd_env.worlds.load import make_real


class RealVectorEnv(WorldVectorEnv, VectorEnv):
    """Copies of the real game behind a world, with the interface of ``NFDVectorEnv``.

    An agent cannot tell the two apart but by the pictures: the frames go through the same crop and
    resize, with ``obs_type="latent"`` through the world's tokenizer too, with "features" also
    through its heads; an action is repeated for ``frame_skip`` frames and their rewards are summed.

    Autoreset is SAME_STEP. ``infos`` hold ``final_obs`` and ``_final_obs`` where an episode ended,
    and no ``hazard``: the real game keeps that to itself.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        world: str | PathLike[str],
        num_envs: int = 1,
        device: str | torch.device = "auto",
        frame_skip: int = 1,
        obs_type: str = "rgb",
        output: str = "numpy",
        max_episode_steps: int | None = None,
        precision: str = "auto",
        **kwargs: Any,
    ) -> None:
        """Start ``num_envs`` games.

        Args:
            world: a world folder or the name of a shipped world.
            num_envs: number of games, stepped by as many threads as there are processors.
            device: of the tokenizer, and of the tensors with ``output="torch"``.
            frame_skip: frames an action is repeated for.
            obs_type: "rgb", uint8 (num_envs, H, W, 3), "latent", float32 (num_envs, C, h, w), or
                "features", float32 (num_envs, C * h * w + F), see ``NFDVectorEnv``.
            output: "numpy" or "torch".
            max_episode_steps: steps (not frames) after which an episode is truncated.
            precision: of the tokenizer, see ``load_world``.
            kwargs: further arguments of the real environment.

        Raises:
            ValueError: on an argument out of range.
            SourceError: when the real game is not installed.
        """
        super().__init__()
        self._check_common(num_envs, frame_skip, obs_type, output, max_episode_steps)
        self._look_like(self._load(world, device, precision), AutoresetMode.SAME_STEP)
        self.model = self.world.model
        self._owns = True
        self.envs: list[gymnasium.Env] = []
        try:
            for _ in range(num_envs):
                self.envs.append(make_real(world, **kwargs))
        except BaseException:  # those that were made must not go on without an owner
            for env in self.envs:
                env.close()
            raise
        self._pool = ThreadPoolExecutor(min(num_envs, os.cpu_count() or 1))
        self._steps = np.zeros(num_envs, np.int64)
        self._seeds = [-1] * num_envs
        self._shown: np.ndarray | None = None
        # What latents and features are made of; not kept up to date where pictures are observed.
        shape = self.model.dynamics.config.latent_shape
        self._latents = torch.zeros(num_envs, *shape, **self._numbers)
        self._action = torch.zeros(num_envs, self.world.codec.width, **self._numbers)
        self._memory = self.model.heads.initial_state(num_envs)
        self._made = True

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed that each game was last given, -1 before."""
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; an int seed s gives slot i the seed s + i.

        The option ``reset_mask``, bool (num_envs,), says where; everywhere by default.

        Raises:
            ValueError: on the wrong number of seeds, another option, or a mask that cannot be used.
            gymnasium.error.ResetNeeded: when the first reset leaves games out.
        """
        self._need_open()
        seeds = checks.check_seeds(seed, self.num_envs)
        given = checks.check_options(options, ("reset_mask",))
        mask = checks.check_mask(given.get("reset_mask"), self.num_envs, self._shown is not None)
        rows = np.flatnonzero(mask)
        begun = list(self._pool.map(lambda row: self.envs[row].reset(seed=seeds[row])[0], rows))
        if self._shown is None:
            self._shown = np.zeros((self.num_envs, *self.world.spec.frame_size, 3), np.uint8)
        for row, frame in zip(rows, begun, strict=True):
            self._shown[row] = frame
        self._steps[mask] = 0
        for row in rows:
            if (known := seeds[row]) is not None:
                self._seeds[row] = known
        self._seed_np_random(seeds)
        self._begin(rows, self._shown[rows])
        return self._observe(self._shown), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Advance every game by one action (``frame_skip`` frames).

        Raises:
            ValueError: when the actions do not lie in the action space.
        """
        self._need_begun("step")
        checked = self.world.codec.check(actions, self.num_envs)
        native = self.world.codec.native(actions)
        results = list(self._pool.map(self._step_one, range(self.num_envs), native))
        frames, *columns = zip(*results, strict=True)
        shown, reward, terminated, truncated = (np.stack(column) for column in columns)
        self._follow(frames, self.world.codec.encode(checked).to(self.model.device))
        self._shown, ended = shown, terminated | truncated
        infos: dict[str, Any] = {}
        if ended.any():
            final = self._observe(np.stack([drawn[-1] for drawn in frames]))
            infos = {"final_obs": final, "_final_obs": self._told(ended)}
            rows = np.flatnonzero(ended)
            self._begin(rows, shown[rows])
        rewards = self._tensor(reward.astype(np.float32))
        return self._step_output(self._observe(shown), rewards, terminated, truncated, infos)

    def frames(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """The current frames, uint8 (num_envs, H, W, 3), or of some environments only."""
        shown = self._need_begun("frames")
        return shown.copy() if rows is None else shown[checks.check_rows(rows, self.num_envs)]

    def take(self, rows: Sequence[int]) -> RealVectorEnv:
        """An env of some of these games, in this order, that goes on where they are.

        The games are shared: step one of the two only. They are closed by this one.
        """
        shown, listed = self._need_begun("take"), checks.check_rows(rows, self.num_envs)
        taken = object.__new__(type(self))
        taken.__dict__.update(self.__dict__, num_envs=len(listed), _owns=False)
        taken.envs = [self.envs[row] for row in listed]
        taken._batch_spaces()
        taken._shown, taken._steps = shown[listed], self._steps[listed]
        for name in ("_latents", "_action", "_memory"):
            setattr(taken, name, getattr(self, name)[listed])
        return taken

    def _need_begun(self, what: str) -> np.ndarray:
        self._need_open()
        if self._shown is None:
            raise gymnasium.error.ResetNeeded(f"call reset() before {what}()")
        return self._shown

    def __reduce__(self) -> Any:
        """Refuse to be copied."""
        raise TypeError(
            "a real game cannot be copied or pickled; make another RealVectorEnv, or copy the "
            "learned world's NFDVectorEnv"
        )

    def _begin(self, rows: np.ndarray, frames: np.ndarray) -> None:
        """Remember that the games of ``rows`` have begun anew with ``frames``."""
        if self.obs_type == "rgb":
            return
        index = torch.from_numpy(rows).to(self.model.device)
        self._latents = self._latents.index_copy(0, index, self._encode(frames))
        self._action = self._action.index_fill(0, index, 0.0)
        nothing = self.model.heads.initial_state(len(rows))
        self._memory = self._memory.index_copy(0, index, nothing)

    def _follow(self, frames: Sequence[list[np.ndarray]], actions: Tensor) -> None:
        """Remember the next frames of all games, one to ``frame_skip`` of each."""
        if self.obs_type == "rgb":
            return
        if self.obs_type == "latent":
            self._latents = self._encode(np.stack([drawn[-1] for drawn in frames]))
            return
        latents = self._encode(np.concatenate(frames))
        counts = [len(drawn) for drawn in frames]
        ends = np.cumsum(counts) - 1
        for k in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if count > k]
            index = torch.tensor(rows, device=self.model.device)
            seen = latents[[int(ends[row]) - counts[row] + 1 + k for row in rows]]
            memory = self.model.remember(seen, actions[index], self._memory[index])
            self._memory = self._memory.index_copy(0, index, memory)
        self._latents, self._action = latents[[int(end) for end in ends]], actions

    def _step_one(
        self, row: int, action: Any
    ) -> tuple[list[np.ndarray], np.ndarray, float, bool, bool]:
        """The frames of this step, that to go on from, reward, terminated, truncated."""
        env, total = self.envs[row], 0.0
        plain = action.item() if isinstance(self.single_action_space, spaces.Discrete) else action
        frames: list[np.ndarray] = []
        terminated = truncated = False
        for _ in range(self.frame_skip):
            frame, reward, terminated, truncated, _ = env.step(plain)
            frames.append(frame)
            total += float(reward)
            if terminated or truncated:
                break
        self._steps[row] += 1
        if self.max_episode_steps is not None and not terminated:
            truncated = truncated or bool(self._steps[row] >= self.max_episode_steps)
        shown = frames[-1]
        if terminated or truncated:
            shown, self._steps[row] = env.reset()[0], 0
        return frames, shown, total, terminated, truncated

    def _observe(self, frames: np.ndarray) -> Any:
        """Observations of what was last remembered, whose pictures are ``frames``."""
        here = self._latents, self._action, self._memory
        return self._output(observe(self.world, self.obs_type, lambda: self._tensor(frames), *here))

    def _encode(self, frames: np.ndarray) -> Tensor:
        return self.model.encode(torch.from_numpy(frames.copy()))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the games, unless another env goes on with them."""
        if not self._owns:
            return
        self._pool.shutdown()
        for env in self.envs:
            env.close()
