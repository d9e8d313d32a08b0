"""What an agent is trained in, whoever trains it: the native PPO or Stable-Baselines3."""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Any

from nfd_env.config import check_ranges, config_class
from nfd_env.envs.observing import OBSERVATION_TYPES
from nfd_env.envs.wrappers import GuardConfig
from nfd_env.players.policy import STACKS, AgentError, looked_at
from nfd_env.training.starts import StartsConfig, recorded_starts
from nfd_env.worlds.load import load_world

# Arguments of ``NFDVectorEnv`` that nothing else here decides on.
_ENV = {
    *("precision", "sampling_steps", "history_level", "temperature", "speculative_frames"),
    *("dynamics", "ood", "max_episode_steps", "device", "starts", "render_mode"),
}


@config_class
class AgentTrainingConfig:
    """What an agent is trained in, and on what it decides.

    Attributes:
        folder: the run's folder: agent, state and logs.
        world: a world folder or the name of a shipped world.
        decisions: total decisions over all environments. Raising it later continues the run.
        num_envs: environments stepped together.
        obs_type: "latent", "rgb" or "features".
        frame_skip: frames for which each action is repeated.
        frame_stack: latest observations that a decision can be based on; one shows no velocity.
        frame_offsets: those of them that it is based on, in decisions back; empty for all.
        max_episode_frames: whole episodes are truncated there; 0 for the world's own limit.
        starts: recorded moments that the episodes in the learned world start from; None for those
            that come with it.
        horizon_frames: truncate the episodes in the learned world so early, with the value of what
            would follow; 0 for whole episodes. With ``starts``, the policy learns on frames that
            are never far from recorded ones: a world is the less true, the longer it runs on its
            own (branched rollouts, Janner et al. 2019, arXiv 1906.08253).
        env: further arguments of ``NFDVectorEnv``, e.g. sampling_steps.
        guard: against learning from frames of the learned world that are out of distribution; None
            for nothing. A penalty is part of the scores in the world that are logged.
        channels: of the policy's convolutions.
        width: of the policy's fully connected layer.
        seed: of everything.
        device: "auto", "cpu" or "cuda".
        evaluate_every: decisions between evaluations in the real game; 0 for none.
        evaluate_episodes: real episodes each time.
        checkpoint_seconds: time between checkpoints.
        keep: decisions after which the agent, as it then is, is kept beside the last one, such as
            [0, 8192, 65536]: policies from poor to good, for ``nfd rank``. Numbers beyond
            ``decisions`` count when the training goes on with more.
    """

    folder: str
    world: str
    decisions: int
    num_envs: int = 32
    obs_type: str = "latent"
    frame_skip: int = 4
    frame_stack: int = 3
    frame_offsets: list[int] = field(default_factory=list)
    max_episode_frames: int = 0
    starts: StartsConfig | None = None
    horizon_frames: int = 0
    env: dict[str, Any] = field(default_factory=dict)
    guard: GuardConfig | None = None
    channels: int = 32
    width: int = 256
    seed: int = 0
    device: str = "auto"
    evaluate_every: int = 0
    evaluate_episodes: int = 8
    checkpoint_seconds: float = 60.0
    keep: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the ranges."""
        some, any_ = "[1, inf)", "[0, inf)"
        check_ranges(self, decisions=some, num_envs=some, frame_skip=some, frame_stack=STACKS)
        check_ranges(self, max_episode_frames=any_, horizon_frames=any_, evaluate_every=any_)
        check_ranges(self, channels=some, width=some, evaluate_episodes=some, seed="[0, 2**63)")
        check_ranges(self, checkpoint_seconds="[0, inf]")
        if self.obs_type not in OBSERVATION_TYPES:
            raise ValueError(
                f"obs_type must be one of {', '.join(OBSERVATION_TYPES)}, got {self.obs_type!r}"
            )
        looked_at(self.frame_offsets, self.frame_stack)
        if unknown := sorted(set(self.env) - _ENV):
            raise ValueError(f"env knows {', '.join(sorted(_ENV))}, got {unknown[0]!r}")
        if wrong := [at for at in self.keep if at < 0]:
            raise ValueError(f"keep must be numbers of decisions from 0, got {wrong}")

    @property
    def max_episode_steps(self) -> int | None:
        """The truncation of whole episodes in steps; None for the world's own."""
        return math.ceil(self.max_episode_frames / self.frame_skip) or None

    @property
    def branched(self) -> bool:
        """Whether training episodes are only parts of whole ones."""
        return bool(self.starts or self.horizon_frames)

    def kept(self, folder: Path, suffix: str, before: int, done: int) -> list[Path]:
        """Files of the agents to keep that were reached after ``before`` decisions, by ``done``."""
        return [_kept(folder, at, suffix) for at in self.keep if before < at <= done]

    def check_kept(self, folder: Path, suffix: str, done: int) -> None:
        """Raise ``AgentError`` where a run of ``done`` decisions has not kept what it should."""
        lost = [at for at in self.keep if at <= done and not _kept(folder, at, suffix).is_file()]
        if lost:
            raise AgentError(
                f"keep: {folder} is at {done} decisions and has not kept the agents after {lost}: "
                "choose another folder, or leave these out"
            )

    def world_kwargs(self) -> dict[str, Any]:
        """Arguments of ``NFDVectorEnv`` beside the world and the number of environments."""
        horizon = math.ceil(self.horizon_frames / self.frame_skip)
        kwargs: dict[str, Any] = {
            "device": self.device,
            "frame_skip": self.frame_skip,
            "obs_type": self.obs_type,
            "max_episode_steps": horizon or self.max_episode_steps,
        }
        if self.starts is not None:
            kwargs["starts"] = recorded_starts(self.starts, load_world(self.world, self.device))
        return kwargs | self.env


def _kept(folder: Path, decisions: int, suffix: str) -> Path:
    return folder / f"agent-{decisions:09d}{suffix}"
