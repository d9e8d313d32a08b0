"""The learned world as a plain Gymnasium environment: a vector env of one."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from nfd_env.envs.vector_env import EnvState, NFDVectorEnv
from nfd_env.inference.world_model import Context


class NFDEnv(gymnasium.Env):
    """One copy of a learned world.

    Spaces, rewards, ends, reset options and arguments are those of ``NFDVectorEnv`` without the
    batch dimension; ``info`` holds ``hazard``, the probability with which the step could have
    ended the episode, with ``ood=True`` the out-of-distribution signal ``ood``, and with
    ``speculative_frames`` > 1 the counters ``speculation``. With ``context_observations`` the
    ``info`` of ``reset`` holds ``context``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self,
        world: str | PathLike[str],
        device: str | torch.device = "auto",
        sampling_steps: int | None = None,
        frame_skip: int = 1,
        obs_type: str = "rgb",
        output: str = "numpy",
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        precision: str = "auto",
        history_level: float | None = None,
        temperature: float | None = None,
        ood: bool = False,
        context_observations: int = 0,
        speculative_frames: int = 1,
        draft_cost: float | None = None,
        dynamics: str | None = None,
        starts: Sequence[Context] | str | PathLike[str] | None = None,
    ) -> None:
        """See ``NFDVectorEnv``."""
        self.vector = NFDVectorEnv(
            world,
            num_envs=1,
            device=device,
            sampling_steps=sampling_steps,
            frame_skip=frame_skip,
            obs_type=obs_type,
            output=output,
            autoreset_mode=AutoresetMode.DISABLED,
            max_episode_steps=max_episode_steps,
            render_mode=render_mode,
            precision=precision,
            history_level=history_level,
            temperature=temperature,
            ood=ood,
            context_observations=context_observations,
            speculative_frames=speculative_frames,
            draft_cost=draft_cost,
            dynamics=dynamics,
            starts=starts,
        )
        self.world = self.vector.world
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.metadata = {k: v for k, v in self.vector.metadata.items() if k != "autoreset_mode"}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode; see ``NFDVectorEnv`` for ``options``."""
        super().reset(seed=seed)
        observation, info = self.vector.reset(seed=seed, options=options)
        return observation[0], {name: info[name][0] for name in info if not name.startswith("_")}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance by one action; raises ValueError when it does not lie in the action space."""
        if isinstance(action, torch.Tensor):
            batch: Any = action[None]
        else:
            try:
                batch = np.asarray(action)[None]
            except ValueError:
                raise ValueError(f"actions of {self.action_space} cannot be {action!r}") from None
        observation, reward, terminated, truncated, info = self.vector.step(batch)
        return (
            observation[0],
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            _first(info),
        )

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The current frame, uint8 (H, W, 3), with ``render_mode="rgb_array"``."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def get_keys_to_action(self) -> dict[tuple[str, ...], int]:
        """The world's keymap for ``gymnasium.utils.play``: single-letter keys to actions."""
        source = self.world.spec.source
        mapping: dict[tuple[str, ...], int] = {}
        for name, keys in source.keys.items():
            for key in keys:
                if len(key) == 1 and name in source.action_names:
                    mapping[(key,)] = source.action_names.index(name)
        return mapping

    def save_state(self) -> EnvState:
        """See ``NFDVectorEnv.save_state``."""
        return self.vector.save_state()

    def restore_state(self, state: EnvState) -> Any:
        """See ``NFDVectorEnv.restore_state``."""
        return self.vector.restore_state(state)[0]


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """The plain values of the first environment, without masks."""
    return {
        name: _first(value) if isinstance(value, dict) else value[0].item()
        for name, value in info.items()
        if not name.startswith("_")
    }
