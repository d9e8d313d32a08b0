"""A recording process: it owns its shards, ends with its parent, and says how it got on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from nfd_env.data.layout import RecordingError, writer_of
from nfd_env.data.policies import make_policy
from nfd_env.data.record import Signals, record_episode
from nfd_env.data.shards import DatasetSpec, RecordedDataset, ShardWriter
from nfd_env.named import described, import_named
from nfd_env.sources.source import make_source
from nfd_env.stopping import SIGNALS, asked_by_signal

if TYPE_CHECKING:
    from nfd_env.data.collect import CollectConfig

# A game that fails so often does not work here; more attempts would only hide that.
FAILURES_IN_ROW = 5
FAILED_SHARE, FAILED_FROM = 0.5, 20  # at most this share, once so many episodes were tried
_PREDECESSOR = 15.0  # seconds that a stopped worker of the same name may take to end
MOST_WORKERS = 1024  # processes, each with a game; more is a slip
_ODD = 0x2C1B3C6D, 0x297A2D39  # any odd factors with many bits permute
_CLOSING = 15.0  # seconds that a game may take to close
_LAST_WORDS = 5.0  # seconds for closing the game when the parent has died
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class _Stopped(BaseException):
    """A signal asks the process to end."""


def work(settings: CollectConfig, spec: DatasetSpec, worker: int, reports: Any) -> None:
    """Record this worker's share; ``reports`` is the sending end of a pipe.

    It is sent ("begun", (number, seed, policy)), ("episode", frames), ("skipped", reason) and, as
    the last words, ("finished", None) or ("failed", reason), also after a signal: who ends without
    them has died.
    """
    _on_signals(_stop)
    _end_with_parent()
    _take_threads(max(1, (os.cpu_count() or 1) // settings.workers))
    try:
        with ShardWriter(settings.folder, spec, writer_name(worker), wait=_PREDECESSOR) as writer:
            _record(settings, worker, writer, reports)
        words = ("finished", None)
    except _Stopped:
        _on_signals(signal.SIG_IGN)  # the whole group was told, and now the parent tells it too
        name = writer_name(worker)
        words = "failed", f"recording worker {name} was stopped by a signal; run again to go on"
    except (ValueError, RuntimeError, OSError, ImportError) as error:  # said for people
        words = ("failed", str(error))
    except BaseException as error:  # whatever foreign code may raise
        words = ("failed", described(error))
    with suppress(OSError):  # nobody listens any more
        reports.send(words)


def writer_name(worker: int) -> str:
    """The name of a worker and of its shards."""
    return f"w{worker:02d}"


def goal_of(settings: CollectConfig, worker: int) -> int:
    """Frames that a worker records."""
    return settings.frames // settings.workers + (worker < settings.frames % settings.workers)


def load_signals(name: str) -> Signals | None:
    """The function of ``CollectConfig.signals``.

    Raises:
        RecordingError: when there is none of that name.
    """
    try:
        return import_named(name) if name else None
    except ValueError as error:
        raise RecordingError(f"signals must name a function as module:function: {error}") from None


def labels_of(settings: CollectConfig) -> list[str]:
    """One distinct, stable name for each policy of the mixture."""
    return [
        f"{i}:{p.policy.rpartition(':')[2]}" + (f"+mistakes{p.mistakes:g}" if p.mistakes else "")
        for i, p in enumerate(settings.policies)
    ]


class _TooLongError(BaseException):
    """Closing a game takes too long."""


def close(env: gymnasium.Env | None) -> None:
    """Close a game, whatever its own code makes of it, and within ``_CLOSING`` where that can be.

    Signals that ask this process to end are obeyed.
    """
    if env is None:
        return

    def late(signum: int, frame: Any) -> None:
        raise _TooLongError

    timed = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, late) if timed else None
    if timed:
        signal.setitimer(signal.ITIMER_REAL, _CLOSING)
    try:
        env.close()
    except _TooLongError:
        print(f"nfd: a game did not close within {_CLOSING:g} s and is left", file=sys.stderr)
    except SystemExit as error:
        if asked_by_signal(error):
            raise
    except Exception:  # its own affair, and the last that is wanted of it
        pass
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _record(settings: CollectConfig, worker: int, writer: ShardWriter, reports: Any) -> None:
    data = RecordedDataset(settings.folder)
    mine = [e for e in data if writer_of(e.shard) == writer.writer]
    labels = labels_of(settings)
    played = dict.fromkeys(labels, 0)
    for episode in mine:  # perhaps by policies that are no longer in the mixture
        if episode.policy in played:
            played[episode.policy] += episode.length + 1
    total = sum(e.length + 1 for e in mine)
    # Data sets that are older than these numbers have skipped nothing.
    done = [e.number if e.number is not None else i for i, e in enumerate(mine)]
    done += [s["number"] for s in data.skipped() if s["writer"] == writer.writer]
    number = max(done, default=-1) + 1
    goal = goal_of(settings, worker)
    policies = [make_policy(p.policy, dict(p.kwargs), p.mistakes) for p in settings.policies]
    signals = load_signals(settings.signals)
    env, tried, failed, in_row = None, 0, 0, 0
    try:
        while total < goal:
            if env is None:
                env = make_source(settings.source, **settings.recording_kwargs)
            # The policy that lags most behind its share plays next: resuming needs no more state.
            shares = [p.share for p in settings.policies]
            choice = min(range(len(labels)), key=lambda i: played[labels[i]] / shares[i])
            label, seed = labels[choice], episode_seed(settings.seed, worker, number)
            reports.send(("begun", (number, seed, label)))
            tried += 1
            try:
                episode = record_episode(
                    env,
                    policies[choice],
                    seed,
                    settings.max_episode_steps,
                    signals,
                    policy=label,
                    split="validation" if number % settings.validation_every == 0 else "train",
                )
            except _Stopped:
                raise
            except BaseException as error:  # whatever foreign code may raise
                writer.skip(number, seed, label, traceback.format_exc())
                failed, in_row = failed + 1, in_row + 1
                reports.send(("skipped", f"episode of seed {seed}: {described(error)}"))
                if in_row >= FAILURES_IN_ROW or failed > FAILED_SHARE * max(tried, FAILED_FROM):
                    raise RecordingError(
                        f"{failed} of {tried} episodes failed, {in_row} of them in a row, and are "
                        f"noted in {settings.folder}/skipped-{writer.writer}.jsonl; the last, of "
                        f"seed {seed} with the policy {label}: {described(error)}"
                    ) from None
                close(env)  # who knows what state it is in
                env = None
            else:
                writer.add(episode, number)
                played[label] += len(episode) + 1
                total += len(episode) + 1
                in_row = 0
                reports.send(("episode", len(episode) + 1))
            number += 1
    finally:
        close(env)


def episode_seed(seed: int, worker: int, number: int) -> int:
    """The seed of a worker's episode: below 2**31, which is all that some games take.

    No two of a data set are alike, or an episode would be there twice, perhaps once of them held
    out: it is a permutation of all 31-bit numbers, which one depends on ``seed``. That holds for up
    to 2**21 episodes of each worker.
    """
    key = int(np.random.SeedSequence(seed).generate_state(1)[0])
    mixed = (number * MOST_WORKERS + worker + key) % 2**31
    for factor in _ODD:
        mixed = (mixed ^ mixed >> 15) * factor % 2**31
    return mixed ^ mixed >> 15


def _take_threads(count: int) -> None:
    """Let networks, which policies may be, compute in ``count`` threads, unless the user said it.

    With all processors each, the workers would wait for each other. Importing torch, which takes
    seconds, is left to the policies that need it.
    """
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return
    if "torch" in sys.modules:  # by the user's own program, which a new process begins with
        sys.modules["torch"].set_num_threads(count)
    else:
        os.environ["OMP_NUM_THREADS"] = str(count)


def _on_signals(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _stop(signum: int, frame: Any) -> None:
    raise _Stopped


def _end_with_parent() -> None:
    """End when the parent does, in whatever way: nobody else would stop this process."""
    parent = multiprocessing.parent_process()
    if parent is None:  # called in the process itself
        return
    if sys.platform == "linux":  # works even while a game does not let Python run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent.pid:  # it died before that
            os._exit(1)

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_LAST_WORDS)
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
