"""What a game is like: seen in a few played steps, or by the recordings that are there."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nfd_env.data.importers import open_foreign
from nfd_env.data.policies import make_policy
from nfd_env.data.record import record_episode
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.data.worker import close
from nfd_env.named import described
from nfd_env.recipe import plan as planning
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.grid import PlanError
from nfd_env.sources.frames import frame_rate
from nfd_env.sources.keys import check_controls
from nfd_env.sources.source import make_source
from nfd_env.sources.spec import is_imported
from nfd_env.spaces import ActionCodec, space_from_dict, space_to_dict

_TRIED = 100  # steps that each policy plays to show what the game is like
_TIMED = 20  # steps of a timing, of which the fastest counts
_TRIES = 8  # episodes of a policy at most


@dataclass(frozen=True)
class Look:
    """What was seen of a game.

    Attributes:
        frame_size: [H, W].
        action_space: see ``space_to_dict``.
        fps: frames a second.
        rate: steps a second that one process plays; NaN where nothing is to be recorded.
    """

    frame_size: list[int]
    action_space: dict[str, Any]
    fps: float
    rate: float = math.nan

    @property
    def action_width(self) -> int:
        """Of encoded actions."""
        return ActionCodec(space_from_dict(self.action_space)).width


def look(game: GameConfig) -> Look:
    """Look at the recordings that are there, or play a few steps of the game.

    Raises:
        RecordingError: when there are no such recordings, or the game always fails.
        SourceError: when the game cannot be made or does what no game should.
        KeymapError: when source.action_names or source.keys do not fit its actions.
        PlanError: when its episodes are too short, or nothing moves in it.
    """
    if game.recordings:
        return look_at_recordings(game)
    if is_imported(game.source.env_id):
        foreign = open_foreign(game.source)
        size = [int(side) for side in foreign.frame().shape[:2]]
        check_controls(foreign.action_space, game.source.action_names, game.source.keys)
        return Look(size, space_to_dict(foreign.action_space), foreign.fps)
    for policy in game.policies:
        make_policy(policy.policy, dict(policy.kwargs), policy.mistakes)
    env = make_source(game.source, **game.recording_kwargs)
    try:
        shape = env.observation_space.shape
        assert shape is not None
        space, fps = ActionCodec(env.action_space).space, frame_rate(env)
        check_controls(space, game.source.action_names, game.source.keys)
        rate, longest, moves = 0.0, 0, False
        shares = sum(policy.share for policy in game.policies)
        for policy in game.policies:
            behaviour = _Timed(make_policy(policy.policy, dict(policy.kwargs), policy.mistakes))
            steps, failed = 0, 0
            for seed in range(_TRIES):
                most = min(_TRIED, game.max_episode_steps)
                try:
                    behaviour.begin()
                    episode = record_episode(env, behaviour, seed, most)
                except (Exception, SystemExit) as error:  # whatever foreign code may raise
                    failed += 1
                    if failed == _TRIES:
                        raise RecordingError(
                            f"{game.source.env_id} fails in every episode that {policy.policy} "
                            f"plays; the last: {described(error)}"
                        ) from error
                    close(env)  # who knows what state it is in
                    env = make_source(game.source, **game.recording_kwargs)
                    continue
                steps, longest = steps + len(episode), max(longest, len(episode))
                moves = moves or bool(np.any(episode.frames != episode.frames[0]))
                if steps >= _TRIED:
                    break
            rate += policy.share / shares * behaviour.seconds_a_step()
    finally:
        close(env)
    if longest + 1 < planning.LEAST_FRAMES:
        raise PlanError(
            f"the episodes of {game.source.env_id} have at most {longest + 1} frames, but a world "
            f"takes some of {planning.LEAST_FRAMES} or more to learn from: let policies play that "
            "live longer, or raise max_episode_steps"
        )
    if not moves:
        raise PlanError(
            f"nothing moves in the frames of {game.source.env_id}: check source.frames, source.key "
            "and source.crop"
        )
    size = [int(shape[0]), int(shape[1])]
    return Look(size, space_to_dict(space), fps, 1 / rate)


class _Timed:
    """A behaviour policy, and how fast the game goes on under it.

    Of several short timings the fastest counts: what else a machine was doing for a moment is no
    property of the game.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._resets: list[float] = []
        self._steps: list[float] = []

    def begin(self) -> None:
        """An episode is about to begin."""
        self._now, self._first = time.perf_counter(), True

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        """See ``BehaviourPolicy``."""
        self._policy.reset(env, rng)

    def act(self, observation: np.ndarray) -> Any:
        """See ``BehaviourPolicy``."""
        before, self._now = self._now, time.perf_counter()
        (self._resets if self._first else self._steps).append(self._now - before)
        self._first = False
        return self._policy.act(observation)

    def seconds_a_step(self) -> float:
        """Seconds of a step, with its share of the resets."""
        count = len(self._steps) + len(self._resets)  # actions
        timed = self._steps or self._resets
        parts = np.array_split(timed, max(1, len(timed) // _TIMED))
        starts = min(self._resets) * len(self._resets) / count
        return min(float(np.mean(part)) for part in parts) + starts


def look_at_recordings(game: GameConfig) -> Look:
    """What recordings say that are there.

    Raises:
        RecordingError: when there are none.
    """
    recordings = RecordedDataset(game.recordings_place)
    if not len(recordings):
        raise RecordingError(
            f"{recordings.folder} holds no episodes: set recordings to a data set's folder, or "
            "leave it out to record the game"
        )
    spec = recordings.spec
    return Look(list(spec.frame_shape[:2]), spec.action_space, spec.fps)
