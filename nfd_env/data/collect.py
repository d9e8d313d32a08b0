"""Recording any Gymnasium environment that shows RGB frames, in parallel and resumably."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tqdm import tqdm

from nfd_env import config
from nfd_env.data.episode import Episode
from nfd_env.data.policies import BehaviourPolicy, make_policy
from nfd_env.data.shards import DatasetSpec, RecordedDataset, RecordingError, ShardWriter
from nfd_env.named import import_named
from nfd_env.sources.source import SourceConfig, make_source
from nfd_env.spaces import ActionCodec, space_to_dict


@dataclass(frozen=True)
class PolicyConfig:
    """One behaviour policy of the mixture.

    Attributes:
        policy: "random_held", "sb3" or "module:Class".
        share: its share of the recorded frames, relative to the other policies.
        kwargs: passed to the policy.
        mistakes: probability a step of beginning a short stretch of random play.
    """

    policy: str
    share: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    mistakes: float = 0.0


@dataclass(frozen=True)
class CollectConfig:
    """What to record, and how much of it.

    Attributes:
        source: the environment and its frames.
        folder: where the data set is written.
        frames: total number of frames to record.
        workers: processes; a data set is resumed with the number it was begun with.
        seed: episode k of worker w is reset with a seed derived from (seed, w, k).
        max_episode_steps: an episode is truncated there.
        validation_every: every n-th episode of each worker is held out.
        recording_kwargs: ``gymnasium.make`` arguments that only the behaviour policies and the
            signals need.
        signals: "module:function" that is given the environment after each step and returns k
            numbers from 0 to 1, or NaN where they are not known, of what frames hardly show; "" for
            none. The heads can learn to tell them (``HeadsTrainingConfig.signal_weight``), which
            no agent ever sees.
        policies: the mixture.
    """

    source: SourceConfig
    folder: str
    frames: int
    policies: list[PolicyConfig]
    workers: int = 2
    seed: int = 0
    max_episode_steps: int = 2000
    validation_every: int = 20
    recording_kwargs: dict[str, Any] = field(default_factory=dict)
    signals: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.frames < 1 or self.workers < 1 or self.max_episode_steps < 1:
            raise config.ConfigError("frames, workers and max_episode_steps must be at least 1")
        if self.validation_every < 2:
            raise config.ConfigError("validation_every must be at least 2")
        if not self.policies or any(p.share <= 0 for p in self.policies):
            raise config.ConfigError("policies must name at least one policy, each with share > 0")


# What it returns is described at ``CollectConfig.signals``.
Signals = Callable[[gymnasium.Env], np.ndarray]


def record_episode(
    env: gymnasium.Env,
    behaviour: BehaviourPolicy,
    seed: int,
    max_steps: int,
    signals: Signals | None = None,
    **labels: str,
) -> Episode:
    """Play one episode of ``env`` with ``behaviour`` and return it, with ``signals`` of it.

    ``actions[t]`` of the result was chosen on ``frames[t]`` and caused ``frames[t + 1]``.

    Raises:
        RecordingError: when a signal is neither NaN nor from 0 to 1.
    """
    observation, _ = env.reset(seed=seed)
    behaviour.reset(env, np.random.default_rng(seed))
    frames, actions, rewards, terminations, truncations = [observation], [], [], [], []
    told: list[np.ndarray] = []
    for step in range(max_steps):
        action = behaviour.act(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        truncated = bool(truncated) or (step + 1 == max_steps and not terminated)
        actions.append(action)
        frames.append(observation)
        rewards.append(reward)
        terminations.append(bool(terminated))
        truncations.append(truncated)
        told.append(np.asarray(signals(env) if signals else (), np.float32))
        if terminated or truncated:
            break
    told_all = np.stack(told)
    if ((told_all < 0) | (told_all > 1)).any():
        raise RecordingError(
            "signals must be from 0 to 1, or NaN where they are not known, got "
            f"{np.nanmin(told_all):g} to {np.nanmax(told_all):g}"
        )
    return Episode(
        np.stack(frames),
        np.asarray(actions),
        np.asarray(rewards, np.float32),
        np.asarray(terminations),
        np.asarray(truncations),
        seed=seed,
        signals=told_all,
        **labels,
    )


def collect(settings: CollectConfig, progress: bool = True) -> RecordedDataset:
    """Record until the data set holds ``settings.frames`` frames; run again to go on.

    Raises:
        RecordingError: when a worker fails or the folder holds other recordings.
        SourceError: when the real environment cannot be made.
    """
    folder = Path(settings.folder)
    spec = _spec(settings)
    spec.save(folder)
    there = {p.name.split("-")[1] for p in folder.glob("shard-*")}
    wanted = {_writer(w) for w in range(settings.workers)}
    if there and there != wanted:
        raise RecordingError(
            f"{folder} was recorded with {len(there)} workers; go on with workers={len(there)}"
        )
    for name in wanted:  # at once, so that they tell the number of workers from here on
        (folder / f"shard-{name}-00000").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", RecordedDataset(folder).frame_count)
    failures = context.SimpleQueue()
    processes = [
        context.Process(
            target=_worker, args=(settings, spec, w, counter, failures), name=_writer(w)
        )
        for w in range(settings.workers)
    ]
    bar = tqdm(
        total=settings.frames,
        initial=counter.value,
        unit="frame",
        disable=not progress,
        desc="recording",
    )
    try:
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes):
            time.sleep(0.2)
            bar.update(counter.value - bar.n)
            if not failures.empty():
                raise RecordingError(failures.get())
        if not failures.empty():
            raise RecordingError(failures.get())
        bad = [p.name for p in processes if p.exitcode != 0]
        if bad:
            raise RecordingError(f"recording worker {', '.join(bad)} died; run again to go on")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
        bar.update(counter.value - bar.n)
        bar.close()
    return RecordedDataset(folder)


def _writer(worker: int) -> str:
    return f"w{worker:02d}"


def _spec(settings: CollectConfig) -> DatasetSpec:
    signals = _signals(settings.signals)
    env = make_source(settings.source, **settings.recording_kwargs)
    try:
        count = 0
        if signals:
            env.reset(seed=0)
            env.step(env.action_space.sample())
            count = len(signals(env))
        fps = float(env.metadata.get("render_fps") or 30)
        codec = ActionCodec(env.action_space)
        shape = env.observation_space.shape
        assert shape is not None
        return DatasetSpec(
            frame_shape=(int(shape[0]), int(shape[1]), int(shape[2])),
            action_shape=codec.shape,
            action_dtype=str(np.dtype(env.action_space.dtype or np.int64)),
            action_space=space_to_dict(env.action_space),
            source=config.to_dict(settings.source),
            fps=fps,
            signals=count,
        )
    finally:
        env.close()


def _signals(name: str) -> Signals | None:
    try:
        return import_named(name) if name else None
    except ValueError as error:
        raise RecordingError(f"signals must name a function as module:function: {error}") from None


def _worker(
    settings: CollectConfig, spec: DatasetSpec, worker: int, counter: Any, failures: Any
) -> None:
    # Leave through ``finally`` on a stop, so that the environment can end its own processes.
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    env = None
    try:
        writer = ShardWriter(settings.folder, spec, _writer(worker))
        mine = [
            e
            for e in RecordedDataset(settings.folder)
            if e.shard.name.split("-")[1] == _writer(worker)
        ]
        played = {label: 0 for label in _labels(settings)}
        total = 0
        for episode in mine:  # perhaps by policies that are no longer in the mixture
            total += episode.length + 1
            if episode.policy in played:
                played[episode.policy] += episode.length + 1
        goal = settings.frames // settings.workers + (worker < settings.frames % settings.workers)
        env = make_source(settings.source, **settings.recording_kwargs)
        policies = [make_policy(p.policy, dict(p.kwargs), p.mistakes) for p in settings.policies]
        signals = _signals(settings.signals)
        number = len(mine)
        while total < goal:
            # The policy that lags most behind its share plays next: resuming needs no more state.
            labels = list(played)
            shares = [p.share for p in settings.policies]
            choice = min(range(len(labels)), key=lambda i: played[labels[i]] / shares[i])
            seed = int(
                np.random.SeedSequence([settings.seed, worker, number]).generate_state(1)[0] >> 1
            )
            episode = record_episode(
                env,
                policies[choice],
                seed,
                settings.max_episode_steps,
                signals,
                policy=labels[choice],
                split="validation" if number % settings.validation_every == 0 else "train",
            )
            writer.add(episode)
            played[labels[choice]] += len(episode) + 1
            total += len(episode) + 1
            number += 1
            with counter.get_lock():
                counter.value += len(episode) + 1
    except Exception:
        failures.put(traceback.format_exc())
    finally:
        if env is not None:
            env.close()


def _stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def _labels(settings: CollectConfig) -> list[str]:
    """One distinct, stable name for each policy of the mixture."""
    return [
        f"{i}:{p.policy.rpartition(':')[2]}" + (f"+mistakes{p.mistakes:g}" if p.mistakes else "")
        for i, p in enumerate(settings.policies)
    ]
