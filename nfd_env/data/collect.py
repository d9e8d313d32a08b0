"""Recording any Gymnasium environment that shows RGB frames, in parallel and resumably."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nfd_env import config
from nfd_env.data.episode import Episode
from nfd_env.data.importers import import_recordings
from nfd_env.data.layout import shard_folders, writer_of
from nfd_env.data.policies import RandomHeld, make_policy
from nfd_env.data.record import record_episode
from nfd_env.data.shards import DatasetSpec, RecordedDataset, RecordingError, ShardWriter
from nfd_env.data.summary import save_contact_sheet
from nfd_env.data.worker import (
    FAILURES_IN_ROW,
    MOST_WORKERS,
    close,
    goal_of,
    load_signals,
    work,
    writer_name,
)
from nfd_env.files import FolderError, make_folder, owned_folder
from nfd_env.named import described
from nfd_env.progress import progress_bar
from nfd_env.sources.keys import KeymapError, check_controls
from nfd_env.sources.source import SourceConfig, SourceError, make_source
from nfd_env.sources.spec import GameFailedError, is_imported
from nfd_env.spaces import ActionCodec, space_to_dict
from nfd_env.stopping import SIGNALS, StopRequest, stopping

_PROBED = 2  # steps that tell whether an environment can be recorded at all
_CLOSING = 10.0  # seconds that a worker may take to close its game
_HEARD = 1.0  # seconds within which a signal to a whole group has reached all of it
_KILLS = 3  # in one episode; out of memory every time, it would block the data set for ever


@config.config_class
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

    def __post_init__(self) -> None:
        """Check the ranges."""
        config.check_ranges(self, share="(0, inf)", mistakes="[0, 1]")


@config.config_class
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
        config.check_ranges(
            self,
            frames="[1, inf)",
            workers=f"[1, {MOST_WORKERS}]",
            max_episode_steps="[1, inf)",
            validation_every="[2, inf)",
            seed="[0, inf)",
        )
        if not self.policies:
            raise config.ConfigError("policies must name at least one policy")


def collect(settings: CollectConfig, progress: bool = True) -> RecordedDataset:
    """Record until the data set holds ``settings.frames`` frames; run again to go on.

    A source that names recordings made elsewhere is imported, whatever its number of frames is.
    INT, TERM and HUP end the workers first. Episodes that fail are noted and left out; see
    ``nfd_env.data.summary`` for what there is in the end.

    Raises:
        RecordingError: when a worker fails or dies, or the folder holds other recordings.
        SourceError: when the real environment cannot be made.
        FolderInUseError: when another process records into the folder.
        FolderError: when the folder cannot be written to.
        ValueError: when there is no such policy or it does not take its arguments, or names or keys
            do not fit the game's actions.
    """
    settings = replace(settings, folder=str(Path(settings.folder).expanduser()))
    folder = Path(settings.folder)
    if is_imported(settings.source.env_id):
        with stopping() as stop, stop.at_once():
            data = import_recordings(
                settings.source,
                folder,
                settings.max_episode_steps,
                settings.validation_every,
                progress,
            )
            save_contact_sheet(data)
        return data
    for policy in settings.policies:
        make_policy(policy.policy, dict(policy.kwargs), policy.mistakes)
    with stopping() as stop:
        with stop.at_once():
            spec = _spec(settings)
        with owned_folder(make_folder(folder)):
            spec.save(folder)
            there = {writer_of(p) for p in shard_folders(folder)}
            wanted = {writer_name(w) for w in range(settings.workers)}
            others = sorted(name for name in there if not re.fullmatch(r"w\d+", name))
            if others:
                raise RecordingError(
                    f"{folder} holds recordings that this command did not make "
                    f"({', '.join(others)}): record into another folder"
                )
            if there and there != wanted:
                raise RecordingError(
                    f"{folder} was recorded with {len(there)} workers; go on with "
                    f"workers={len(there)}"
                )
            for name in wanted:  # at once, so that they tell the number of workers from here on
                (folder / f"shard-{name}-00000").mkdir(exist_ok=True)
            recorded = Counter[str]()
            for episode in RecordedDataset(folder):
                recorded[writer_of(episode.shard)] += episode.length + 1
            count = recorded.total()
            _check_room(folder, spec, settings.frames - count)
            with progress_bar(
                None, "recording", progress, total=settings.frames, initial=count, unit="frame"
            ) as bar:
                # Who has nothing left to do need not be started, which takes seconds.
                left = [
                    worker
                    for worker in range(settings.workers)
                    if recorded[writer_name(worker)] < goal_of(settings, worker)
                ]
                _run_workers(settings, left, spec, bar, stop)
            data = RecordedDataset(folder)
            save_contact_sheet(data)
    return data


def _run_workers(
    settings: CollectConfig,
    workers: Sequence[int],
    spec: DatasetSpec,
    bar: tqdm,
    stop: StopRequest,
) -> None:
    """Record in processes of their own, which all have ended when this returns or raises."""
    context = multiprocessing.get_context("spawn")
    processes, running = [], {}
    try:
        for worker in workers:
            reports, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(settings, spec, worker, sender), name=writer_name(worker)
            )
            processes.append(process)
            process.start()
            sender.close()  # so that its end is heard
            running[reports] = process
        begun: dict[str, Any] = {}
        while running:
            ready: list[Any] = connection.wait(list(running), timeout=0.2)
            for reports in ready:
                process = running[reports]
                try:
                    kind, value = reports.recv()
                except Exception:  # it ended, perhaps in the middle of a word
                    kind, value = "died", None
                if kind in ("episode", "skipped"):
                    del begun[process.name]
                if kind == "begun":
                    begun[process.name] = value
                elif kind == "episode":
                    bar.update(value)
                elif kind == "skipped":
                    bar.write(f"skipped: {value}")
                elif kind != "finished":
                    _obey_soon(stop)  # perhaps a signal was to all of us
                    if kind == "died":
                        value = _died(settings, spec, process, begun)
                    raise RecordingError(value)
                else:
                    del running[reports]
                    process.join(_CLOSING)  # it has finished, and is not to be stopped
            stop.obey()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join(_CLOSING)
                if process.is_alive():
                    process.kill()
                    process.join()


def _obey_soon(stop: StopRequest) -> None:
    """Stop if a signal has arrived, or does at once."""
    end = time.monotonic() + _HEARD
    while not stop.asked and time.monotonic() < end:
        time.sleep(0.01)
    stop.obey()


def _died(settings: CollectConfig, spec: DatasetSpec, process: Any, begun: dict[str, Any]) -> str:
    """What to say of a worker that has ended without a word; notes what it died of."""
    process.join(_CLOSING)
    code = process.exitcode
    how = f"ended by itself with status {code}"
    if code is None:
        how = "does not answer"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    if process.name in begun:
        number, seed, policy = begun[process.name]
        how += f" in its episode of seed {seed}"
        # Whoever was killed from outside may try again; a game that ends the process would always.
        if code is not None and -code not in SIGNALS:
            with ShardWriter(settings.folder, spec, process.name) as writer:
                killed = -code == getattr(signal, "SIGKILL", None)
                if not killed or writer.killed(number) >= _KILLS:
                    writer.skip(number, seed, policy, f"the recording worker {how}")
                    how += ", which is left out from now on"
                else:
                    how += ", perhaps because memory ran out (fewer workers take less)"
    return f"recording worker {process.name} {how}; run again to go on"


def _check_room(folder: Path, spec: DatasetSpec, frames: int) -> None:
    needed, free = max(0, frames) * int(np.prod(spec.frame_shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"{frames} frames more take {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} "
            "GB left: record fewer or smaller frames"
        )


def _spec(settings: CollectConfig) -> DatasetSpec:
    """What is going to be recorded, from a look at the game: the door for all that is wrong."""
    signals = load_signals(settings.signals)
    for attempt in range(FAILURES_IN_ROW):
        env = make_source(settings.source, **settings.recording_kwargs)
        try:
            source = settings.source
            check_controls(env.action_space, source.action_names, source.keys)
            probe = record_episode(env, RandomHeld(), attempt, _PROBED, signals)
            return _spec_of(settings, env, probe)
        except (Exception, SystemExit) as error:
            own = isinstance(error, (RecordingError, SourceError, KeymapError))
            if own and not isinstance(error, GameFailedError):
                raise
            if attempt + 1 == FAILURES_IN_ROW:  # before that, another seed may do
                raise RecordingError(
                    f"{settings.source.env_id} fails at the beginning of every episode: "
                    f"{described(error)}"
                ) from None
        finally:
            close(env)
    raise AssertionError


def _spec_of(settings: CollectConfig, env: Any, probe: Episode) -> DatasetSpec:
    assert probe.signals is not None
    codec = ActionCodec(env.action_space)
    _, height, width, channels = probe.frames.shape
    return DatasetSpec(
        frame_shape=(height, width, channels),
        action_shape=codec.shape,
        action_dtype=str(np.dtype(env.action_space.dtype or np.int64)),
        action_space=space_to_dict(env.action_space),
        source=config.to_dict(settings.source),
        fps=env.fps,
        signals=probe.signals.shape[1],
    )
