"""How well an agent plays while it learns, in the real game wherever that is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.evaluation.agents import Scores, longest_episode
from nfd_env.evaluation.episodes import Episodes, play_episodes
from nfd_env.evaluation.tables import told_with_error
from nfd_env.players.player import NetworkPlayer, SB3Player
from nfd_env.sources.source import SourceError
from nfd_env.worlds.load import World


def describe(metrics: Mapping[str, float], real: bool, missing: str) -> dict[str, str]:
    """The metrics that may be shown: a world's score never without the real game's beside it.

    Args:
        metrics: "score" or "ends_per_1000_frames" of the training episodes and "real_score", as
            far as they are known.
        real: the training is in the real game.
        missing: why the real game cannot be played; "" where it can.
    """
    if real or missing or "real_score" in metrics:
        return {name: f"{value:.4g}" for name, value in metrics.items()}
    return {}


def _inside(metrics: Mapping[str, float]) -> str:
    parts = []
    if "score" in metrics:
        parts.append(f"{metrics['score']:.0f}")
    if "ends_per_1000_frames" in metrics:
        parts.append(f"{metrics['ends_per_1000_frames']:.2f} ends in 1,000 frames")
    return f"in the world {', '.join(parts)}; " if parts else ""


class Judge:
    """Plays the real game now and then during a training; says so once where there is none."""

    def __init__(
        self, world: World, episodes: int, max_episode_steps: int | None, device: str
    ) -> None:
        """Judge agents of ``world`` by ``episodes`` real episodes each time."""
        self._world, self._episodes, self._device = world, episodes, device
        self._max_episode_steps = max_episode_steps
        self._env: RealVectorEnv | None = None
        self.missing = ""

    def play(self, agent: NetworkPlayer | SB3Player) -> Episodes | None:
        """Real episodes, always with the same seeds; None without the real game."""
        if self.missing:
            return None
        if self._env is None:
            try:
                self._env = RealVectorEnv(
                    self._world.folder,
                    self._episodes,
                    device=self._device,
                    obs_type=agent.spec.obs_type,
                    frame_skip=agent.spec.frame_skip,
                    output="torch",
                    max_episode_steps=self._max_episode_steps
                    or math.ceil(longest_episode(self._world.spec) / agent.spec.frame_skip),
                )
            except SourceError as error:
                self.missing = str(error)
                return None
        with torch.random.fork_rng():
            return play_episodes(self._env, agent, self._episodes, seed=1_000_000)

    def report(
        self,
        agent: NetworkPlayer | SB3Player,
        decision: int,
        metrics: dict[str, float],
        real: bool = False,
    ) -> str:
        """Play, and put what came out into ``metrics``.

        "real_score" (the mean), "real_score_error" (its standard error), "real_length" (mean
        frames of an episode) and "real_ends_per_1000_frames".

        Args:
            agent: as it is after ``decision`` decisions of its training.
            decision: see there.
            metrics: with "ends_per_1000_frames" of the training episodes, and their "score" where
                those are whole episodes.
            real: the training is in the real game.

        Returns:
            A line to print.
        """
        played = self.play(agent)
        if played is None:
            return f"no score of the real game beside the world's: {self.missing}"
        scores = Scores.of(played, agent.spec.frame_skip)
        metrics["real_score"], metrics["real_score_error"] = scores.mean, scores.standard_error
        metrics["real_length"] = scores.length
        metrics["real_ends_per_1000_frames"] = scores.ends_per_1000_frames
        inside = "" if real else _inside(metrics)
        return (
            f"decision {decision}: {inside}in the real game "
            f"{told_with_error(scores.mean, scores.standard_error)} (standard error of "
            f"{len(scores.scores)} episodes of "
            f"{told_with_error(scores.length, scores.length_error, '.0f')} frames)"
        )

    def close(self) -> None:
        """Stop the games."""
        if self._env is not None:
            self._env.close()
            self._env = None
