"""What is refused before anything changes: damaged states, a second thread, starts out of range."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env.envs.state import EnvState
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.state import Context
from tests.envs.test_vector_env import actions, make, other_starts, play, same

# ---------------------------------------------------------------------------------- damaged states


def change(name: str, to: Callable[[Any], Any]) -> tuple[str, Callable[[Any], Any]]:
    return name, to


DAMAGE = [
    change("memory", lambda x: x[:, :3]),
    change("memory", lambda x: x.double()),
    change("shown", lambda x: x[:2]),
    change("shown", lambda x: x.half()),
    change("shown", lambda x: torch.full_like(x, torch.nan)),
    change("shown", lambda x: torch.full_like(x, -torch.inf)),
    change("shown", lambda x: x.to("meta")),
    change("shown", lambda x: x.to_sparse()),
    change("shown", lambda x: x.numpy()),
    change("frames", lambda x: x[:2]),
    change("frames", lambda x: x.astype(float)),
    change("frames", lambda x: x - 50),
    change("frames", lambda x: x.tolist()),
    change("ended", lambda x: None),
    change("ended", lambda x: x.astype(np.int64)),
    change("seeds", lambda x: [-1, "a", 0]),
    change("seeds", lambda x: x[:2]),
    change("seeds", lambda x: None),
    change("episodes", lambda x: x[:2]),
    change("episodes", lambda x: [True, 0, 0]),
    change("world", lambda x: None),
    change("world.keys", lambda x: x[:1]),
    change("world.action", lambda x: x * torch.nan),
    change("world.used", lambda x: x + 5),
    change("world.used", lambda x: x - 1),
    change("world.ready", lambda x: x[:1]),
    change("world.kept", lambda x: x * np.nan),
    change("world.counts", lambda x: x[:, :2]),
    change("world.cache", lambda x: None),
    change("world.cache.keys", lambda x: x[0]),
    change("world.cache.values", lambda x: x[:, :2]),
    change("world.cache.values", lambda x: x + torch.inf),
    change("world.cache.length", lambda x: x - 100),
    change("world.cache.last", lambda x: x[0, 0]),
    change("world.cache.window", lambda x: x + 1),
    change("world.drawn", lambda x: 5),
    change("world.drawn.latents", lambda x: x[:, :, :2]),
    change("world.drawn.latents", lambda x: 5),
    change("world.drawn.remembered", lambda x: x.long()),
    change("world.drawn.hazard", lambda x: x[:, :0]),
]


@pytest.mark.parametrize("rows", [None, [2, 0, 1]])
@pytest.mark.parametrize(("name", "to"), DAMAGE)
def test_a_damaged_state_changes_nothing(
    endless_world: Path, name: str, to: Callable[[Any], Any], rows: list[int] | None
) -> None:
    env, twin = make(endless_world), make(endless_world)
    env.reset(seed=7)
    state = env.save_state()
    for e in (env, twin):
        e.reset(seed=0)
        e.step([0, 1, 2])
    *path, last = name.split(".")
    part: Any = state
    for step in path:
        part = getattr(part, step)
    setattr(part, last, to(getattr(part, last)))
    with pytest.raises(ValueError, match=r"^the state "):
        env.restore_state(state, rows)
    if rows is None:
        with pytest.raises(ValueError, match=r"^the state "):
            make(endless_world).restore_state(state)
    assert env.np_random_seed == twin.np_random_seed == (0, 1, 2)
    assert same(play(env, actions(3, 3)), play(twin, actions(3, 3)))


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_state_survives_files(endless_world: Path, precision: str, drafts: int) -> None:
    kwargs: dict[str, Any] = {"precision": precision, "speculative_frames": drafts}
    env, other = make(endless_world, **kwargs), make(endless_world, **kwargs)
    env.reset(seed=0)
    play(env, np.ones((4, 3), int))
    state, file = env.save_state(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for read in (pickle.loads(pickle.dumps(state)), torch.load(file, weights_only=False)):
        assert isinstance(read, EnvState)
        other.restore_state(read)
        env.restore_state(state)
        assert same(play(env, actions(3, 4)), play(other, actions(3, 4)))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 4)])
def test_an_episode_is_as_long_with_another_frame_skip(
    endless_world: Path, before: int, after: int
) -> None:
    """20 frames in all, the first eight of them in an env that repeats actions otherwise."""
    first = make(endless_world, 1, frame_skip=before)
    first.reset(seed=0)
    for _ in range(8 // before):
        first.step([1])
    limit = 20 // after
    env = make(
        endless_world, 1, frame_skip=after, max_episode_steps=limit, autoreset_mode="Disabled"
    )
    env.restore_state(first.save_state())
    ended = [bool(env.step([1])[3][0]) for _ in range(12 // after)]
    assert ended == [False] * (12 // after - 1) + [True]


@pytest.mark.parametrize("rows", [None, [1]])
def test_what_has_ended_cannot_go_on_where_nothing_waits_for_a_reset(
    endless_world: Path, rows: list[int] | None
) -> None:
    ended = make(endless_world, 2, max_episode_steps=2, autoreset_mode="Disabled")
    ended.reset(seed=0)
    play(ended, actions(2, 2))
    env = make(endless_world, 2, autoreset_mode="SameStep")
    env.reset(seed=3)
    now = env.save_state()
    with pytest.raises(ValueError, match="environment 0 of the state has ended.*SameStep"):
        env.restore_state(ended.save_state(rows), rows)
    assert np.array_equal(env.save_state().frames, now.frames)
    other = make(endless_world, 2, autoreset_mode="NextStep")
    other.restore_state(ended.save_state())
    other.step([0, 1])
    assert other.save_state().episodes == [1, 1]


# ------------------------------------------------------------------------------------- two threads


class Paused:
    """Actions that make the step that is given them wait, in a thread of its own."""

    def __init__(self, env: NFDVectorEnv) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.pool = ThreadPoolExecutor(1)
        self.result = self.pool.submit(env.step, self)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.inside.set()
        assert self.go_on.wait(60)
        return np.array([0, 1, 2])

    def __enter__(self) -> Paused:
        assert self.inside.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self.go_on.set()
        self.pool.shutdown()


def test_an_env_is_for_one_thread_at_a_time(endless_world: Path) -> None:
    env, twin = make(endless_world), make(endless_world)
    for e in (env, twin):
        e.reset(seed=0)
    state, branch = env.save_state(), env.take([0, 1, 2])
    with Paused(env) as paused:
        for call in (
            lambda: env.step([0, 0, 0]),
            lambda: env.reset(seed=3),
            lambda: env.restore_state(state),
            lambda: env.set_sampling(temperature=2.0),
        ):
            with pytest.raises(RuntimeError, match="an env is for one thread at a time"):
                call()
        # Others have nothing to do with it, nor have copies that are made meanwhile.
        twin_step = twin.step([0, 1, 2])
        assert same(branch.step([0, 1, 2]), twin_step)
        copies = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    assert same(paused.result.result(), twin_step)
    assert all(same(made.step([0, 1, 2]), twin_step) for made in copies)
    assert same(env.step([1, 1, 1]), twin.step([1, 1, 1]))


def test_an_error_lets_the_next_thread_in(endless_world: Path) -> None:
    env = make(endless_world)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        env.step([9, 9, 9])
    with ThreadPoolExecutor(1) as pool:  # threads may take turns
        pool.submit(env.step, [0, 0, 0]).result()
    env.step([0, 0, 0])
    assert env.save_state().frames.tolist() == [2, 2, 2]


def test_no_step_is_lost_silently(endless_world: Path) -> None:
    env = make(endless_world)
    env.reset(seed=0)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(env.step, [0, 0, 0]) for _ in range(40)]
        errors = [d.exception() for d in done]
    assert all(e is None or isinstance(e, RuntimeError) for e in errors)
    assert env.save_state().frames.tolist() == [errors.count(None)] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_during_a_step_is_free(endless_world: Path) -> None:
    env = make(endless_world)
    env.reset(seed=0)
    with Paused(env):
        child = os.fork()
        if not child:
            code = 1
            try:
                env.set_sampling(temperature=2.0)
                code = 0
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------ starts


def test_starts_belong_to_the_env(endless_world: Path) -> None:
    given = other_starts()
    env, twin = make(endless_world, starts=given), make(endless_world, starts=other_starts())
    for start in given:
        start.latents.zero_(), start.actions.fill_(3)
    assert same(env.reset(seed=0)[0], twin.reset(seed=0)[0])
    assert same(play(env, actions(3, 2)), play(twin, actions(3, 2)))
    given = other_starts()
    env.starts = twin.starts = given
    given[0].latents.zero_()
    assert not same(env.reset(options={"start": 0})[0], np.zeros((3, 4, 4, 6), np.float32))


@pytest.mark.parametrize("part", ["latents", "actions"])
def test_starts_too_large_to_compute_with(endless_world: Path, part: str) -> None:
    latents, into = torch.zeros(2, 4, 4, 6), torch.zeros(2, 3)
    (latents if part == "latents" else into)[0] = 1e38
    with pytest.raises(ValueError, match=f"start 0: {part} must be from -65504 to 65504, got 1e"):
        make(endless_world, starts=[Context(latents, into)])
    (latents if part == "latents" else into)[0] = -65504.0
    env = make(endless_world, starts=[Context(latents, into)])
    env.reset(seed=0)
    observation, reward, *_, infos = env.step([0, 1, 2])
    assert all(np.isfinite(x).all() for x in (observation, reward, infos["hazard"]))


def test_context_actions_too_large_to_compute_with(make_world: Callable[..., Path]) -> None:
    space = {"type": "Box", "low": [-3.4028234663852886e38], "high": [3.4028234663852886e38]}
    env = make(make_world(action_space={**space, "dtype": "float32"}), 1)
    height, width = env.world.spec.frame_size
    context = {"frames": np.zeros((2, height, width, 3), np.uint8), "actions": [[1e38]]}
    with pytest.raises(ValueError, match="context actions must be from -65504"):
        env.reset(options={"context": context})
    env.reset(options={"context": {**context, "actions": np.float32([[5]])}})
