"""A batch of real games that looks like a batch of learned worlds: what agents are compared in."""

from __future__ import annotations

import copy
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
from gymnasium.vector.utils import batch_space
from torch import Tensor

from nfd_env.envs.vector_env import OBSERVATION_TYPES, observation_space
from nfd_env.worlds.format import World, load_world, make_real


class RealVectorEnv(VectorEnv):
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
        if obs_type not in OBSERVATION_TYPES or output not in ("numpy", "torch"):
            raise ValueError(
                f"obs_type must be one of {', '.join(OBSERVATION_TYPES)} and output numpy or "
                f"torch, got {obs_type!r} and {output!r}"
            )
        if num_envs < 1 or frame_skip < 1 or (max_episode_steps or 1) < 1:
            raise ValueError("num_envs, frame_skip and max_episode_steps must be at least 1")
        self.world: World = load_world(world, device, precision)
        self.model = self.world.model
        self.num_envs, self.frame_skip, self.obs_type = num_envs, frame_skip, obs_type
        self.output, self.max_episode_steps = output, max_episode_steps
        self.autoreset_mode = AutoresetMode.SAME_STEP
        self.envs: list[gymnasium.Env] = [make_real(world, **kwargs) for _ in range(num_envs)]
        self._pool = ThreadPoolExecutor(min(num_envs, os.cpu_count() or 1))
        self._steps = np.zeros(num_envs, np.int64)
        self._shown: np.ndarray | None = None
        self._memory = self.model.heads.initial_state(num_envs)
        self._features = torch.zeros(num_envs, self.model.feature_size, device=self.model.device)
        self.single_observation_space = observation_space(self.world, obs_type)
        self.single_action_space = self.world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; an int seed s gives slot i the seed s + i.

        The option ``reset_mask``, bool (num_envs,), says where; everywhere by default.

        Raises:
            ValueError: on the wrong number of seeds, or a mask that cannot be used.
            gymnasium.error.ResetNeeded: when the first reset has a mask.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds were given for {self.num_envs} environments")
        given = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if given is None else np.asarray(given)
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask must be a bool array of shape ({self.num_envs},)")
        if self._shown is None:
            if not mask.all():
                raise gymnasium.error.ResetNeeded("the first reset() must reset every game")
            self._shown = np.zeros((self.num_envs, *self.world.spec.frame_size, 3), np.uint8)
        rows = np.flatnonzero(mask)
        begun = self._pool.map(lambda row: self.envs[row].reset(seed=seeds[row])[0], rows)
        for row, frame in zip(rows, begun, strict=True):
            self._shown[row] = frame
        self._steps[mask] = 0
        if self.obs_type == "features":
            return self._output(self._begin(rows, self._shown[rows])), {}
        return self._observe(self._shown.copy()), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Advance every game by one action (``frame_skip`` frames).

        Raises:
            ValueError: when the actions do not lie in the action space.
        """
        checked = self.world.codec.check(actions, self.num_envs)
        results = list(self._pool.map(self._step_one, range(self.num_envs), checked.cpu().numpy()))
        frames, *columns = zip(*results, strict=True)
        shown, reward, terminated, truncated = (np.stack(column) for column in columns)
        self._shown = shown.copy()
        infos: dict[str, Any] = {}
        ended = terminated | truncated
        if self.obs_type == "features":
            final = self._output(
                self._follow(frames, self.world.codec.encode(checked).to(self.model.device))
            )
            observation = final
            if ended.any():
                rows = np.flatnonzero(ended)
                observation = self._output(self._begin(rows, shown[rows]))
        else:
            observation, final = self._observe(shown), None
            if ended.any():
                final = self._observe(np.stack([drawn[-1] for drawn in frames]))
        if ended.any():
            infos = {"final_obs": final, "_final_obs": ended}
        if self.output == "torch":
            infos = {k: v if isinstance(v, Tensor) else self._tensor(v) for k, v in infos.items()}
            rewards = self._tensor(reward.astype(np.float32))
            return observation, rewards, self._tensor(terminated), self._tensor(truncated), infos
        return observation, reward, terminated, truncated, infos

    def frames(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """The current frames, uint8 (num_envs, H, W, 3), or of some environments only."""
        if self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before frames()")
        return self._shown.copy() if rows is None else self._shown[list(rows)]

    def take(self, rows: Sequence[int]) -> RealVectorEnv:
        """An env of some of these games, in this order, that goes on where they are.

        The games are shared: step one of the two only. They are closed by this one.
        """
        if self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before take()")
        taken, listed = copy.copy(self), list(rows)
        taken.num_envs, taken.envs = len(listed), [self.envs[row] for row in listed]
        taken.observation_space = batch_space(self.single_observation_space, len(listed))
        taken.action_space = batch_space(self.single_action_space, len(listed))
        taken._shown, taken._steps = self._shown[listed], self._steps[listed]
        taken._memory, taken._features = self._memory[listed], self._features[listed]
        taken.closed = True
        return taken

    def _begin(self, rows: np.ndarray, frames: np.ndarray) -> Tensor:
        """Features of all games, where those of ``rows`` have begun anew with ``frames``."""
        index = torch.from_numpy(rows).to(self.model.device)
        memory = self.model.heads.initial_state(len(rows))
        action = torch.zeros(len(rows), self.world.codec.width, device=self.model.device)
        latents = self.model.encode(torch.from_numpy(frames))
        begun = self.model.features(latents, action, memory)
        self._memory = self._memory.index_copy(0, index, memory)
        self._features = self._features.index_copy(0, index, begun)
        return self._features.clone()

    def _follow(self, frames: Sequence[list[np.ndarray]], actions: Tensor) -> Tensor:
        """Features of all games after their next frames, one to ``frame_skip`` of each."""
        latents = self.model.encode(torch.from_numpy(np.concatenate(frames)))
        counts = [len(drawn) for drawn in frames]
        ends = np.cumsum(counts) - 1
        for k in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if count > k]
            index = torch.tensor(rows, device=self.model.device)
            seen = latents[[int(ends[row]) - counts[row] + 1 + k for row in rows]]
            memory = self.model.remember(seen, actions[index], self._memory[index])
            self._memory = self._memory.index_copy(0, index, memory)
        last = latents[[int(end) for end in ends]]
        self._features = self.model.features(last, actions, self._memory)
        return self._features.clone()

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
        if self.output == "numpy" and self.obs_type == "rgb":
            return frames
        tensor = self._tensor(frames)
        return self._output(self.model.encode(tensor) if self.obs_type == "latent" else tensor)

    def _output(self, observation: Tensor) -> Any:
        return observation if self.output == "torch" else observation.cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the games."""
        self._pool.shutdown()
        for env in self.envs:
            env.close()
