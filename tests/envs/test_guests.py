"""Envs in processes that others start, beside torch's global settings, copied and pickled."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch

from nfd_env.envs import guests
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from tests.envs.test_vector_env import same

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def run(file: Path, program: str, world: Path, threads: str | None) -> str:
    """Output of a program of its own: this process has one thread, with which nothing can hang."""
    file.write_text(program)
    settings = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    settings |= {"OMP_NUM_THREADS": threads} if threads else {}
    done = subprocess.run(
        [sys.executable, str(file), str(world)],
        env={**settings, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORKED = """
import sys, gymnasium, torch, nfd_env
torch.set_num_threads(2)
world = {"world": sys.argv[1], "device": "cpu", "precision": "fp32", "obs_type": "latent"}
native = gymnasium.make_vec("NFD/World-v0", num_envs=2, **world)
first, _ = native.reset(seed=0)
(torch.randn(600, 600) @ torch.randn(600, 600)).sum()
assert torch.get_num_threads() == 2
env = gymnasium.make_vec("NFD/World-v0", num_envs=2, vectorization_mode="async", **world)
assert (env.reset(seed=0)[0] == first).all()
for actions in ([0, 1], [2, 2]):
    left, right = env.step(actions), native.step(actions)
    assert abs(left[0] - right[0]).max() < 1e-3
    assert left[4].keys() == right[4].keys()
env.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_without_this_package_gets_one_thread() -> None:
    """Also where ``OMP_NUM_THREADS`` asks for more: the parent's other threads are gone."""
    program = """if True:
        import multiprocessing, torch
        torch.set_num_threads(2)
        def child():
            from nfd_env.envs import guests
            guests.settle("cpu")
            assert torch.get_num_threads() == 1
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        raise SystemExit(process.exitcode)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [None, "2"])
def test_workers_that_were_forked_do_not_hang(
    endless_world: Path, tmp_path: Path, threads: str | None
) -> None:
    run(tmp_path / "forked.py", FORKED, endless_world, threads)


SPAWNED = """
import sys, gymnasium, torch
from gymnasium.vector import AsyncVectorEnv

class Threads(gymnasium.Wrapper):
    def threads(self):
        return torch.get_num_threads()

def make(world):
    return lambda: Threads(gymnasium.make("nfd_env:NFD/World-v0", world=world, device="cpu"))

if __name__ == "__main__":
    env = AsyncVectorEnv([make(sys.argv[1])] * 2, context="spawn")
    env.reset(seed=0)
    print(env.call("threads"))
    env.close()
"""


@pytest.mark.parametrize(("threads", "expected"), [(None, (1, 1)), ("2", (2, 2))])
def test_workers_take_one_thread_unless_they_are_told(
    endless_world: Path, tmp_path: Path, threads: str | None, expected: tuple[int, int]
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("there is one processor")
    made = run(tmp_path / "workers.py", SPAWNED, endless_world, threads)
    assert made == str(expected)


def test_a_fork_of_what_used_the_gpu(monkeypatch: pytest.MonkeyPatch, endless_world: Path) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for device in ("auto", "cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(RuntimeError, match='context="spawn"'):
            guests.settle(device)
        with pytest.raises(RuntimeError, match='context="spawn"'):
            NFDVectorEnv(endless_world, device=device)
    NFDVectorEnv(endless_world, device="cpu")


# ---------------------------------------------------------------------------- torch's own settings


@pytest.fixture(params=["float64", "meta"])
def unusual(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets a global default of torch's when it is called."""
    if request.param == "float64":
        yield lambda: torch.set_default_dtype(torch.float64)
    else:
        yield lambda: torch.set_default_device("meta")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
@pytest.mark.parametrize("drafts", [1, 2])
def test_torchs_defaults_change_nothing(
    hasty_world: Path, unusual: Callable[[], None], before: bool, obs_type: str, drafts: int
) -> None:
    kwargs: dict[str, Any] = {
        "obs_type": obs_type,
        "autoreset_mode": "SameStep",
        "speculative_frames": drafts,
        "frame_skip": drafts,
        "ood": True,
        "context_observations": 2,
        **CPU,
    }
    acts = np.random.default_rng(0).integers(0, 3, (8, 3))
    context = {"frames": np.zeros((2, 32, 48, 3), np.uint8), "actions": [1]}

    def play(env: NFDVectorEnv) -> list[Any]:
        made: list[Any] = [env.reset(seed=0, options={"context": [context, None, None]})]
        made += [env.step(a) for a in acts[:4]]
        made.append(env.restore_state(env.save_state([0, 2, 1])))
        return [*made, *(env.step(a) for a in acts[4:]), env.frames([1])]

    expected = play(NFDVectorEnv(hasty_world, 3, **kwargs))
    if before:
        unusual()
    env = NFDVectorEnv(hasty_world, 3, **kwargs)
    unusual()
    assert same(play(env), expected)


def test_torchs_defaults_and_the_real_game(
    counter_world: Path, unusual: Callable[[], None]
) -> None:
    def play() -> list[Any]:
        env = RealVectorEnv(counter_world, 2, obs_type="features", frame_skip=2, **CPU)
        made = [env.reset(seed=0)[0], *(env.step([0, 2])[0] for _ in range(3))]
        env.close()
        return made

    expected = play()
    unusual()
    assert same(play(), expected)


# ------------------------------------------------------------------------------- copies and pickles

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "cloudpickle": lambda env: cloudpickle.loads(cloudpickle.dumps(env)),
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("steps", [None, 0, 3])
def test_a_copy_goes_on_as_the_original_does(
    hasty_world: Path, how: Callable[[Any], Any], drafts: int, steps: int | None
) -> None:
    env = NFDVectorEnv(
        hasty_world,
        3,
        autoreset_mode="SameStep",
        speculative_frames=drafts,
        max_episode_steps=5,
        ood=True,
        temperature=1.3,
        **CPU,
    )
    acts = np.random.default_rng(0).integers(0, 3, (12, 3))
    if steps is not None:
        env.reset(seed=0)
        for a in acts[:steps]:
            env.step(a)
    other = how(env)
    assert other.world.model.tokenizer is env.world.model.tokenizer  # weights are shared
    assert other.np_random_seed == env.np_random_seed
    if steps is None:
        env.reset(seed=4), other.reset(seed=4)
    for a in acts[steps or 0 :]:
        assert same(env.step(a), other.step(a))
    # They go their own ways.
    other.reset(seed=9)
    kept = env.save_state()
    expected = env.step(acts[0])
    env.restore_state(kept)
    other.step(acts[1])
    assert same(env.step(acts[0]), expected)


@pytest.mark.parametrize("how", [k for k in COPIES if k != "copy"])
def test_a_copy_of_a_made_env(endless_world: Path, how: str) -> None:
    """With its wrappers and random numbers."""
    env = gymnasium.make("nfd_env:NFD/World-v0", world=endless_world, max_episode_steps=4, **CPU)
    env.reset(seed=0)
    env.action_space.seed(5)
    env.step(1), env.step(2)
    other = COPIES[how](env)
    assert env.np_random.random() == other.np_random.random()
    for _ in range(2):
        action = env.action_space.sample()
        assert action == other.action_space.sample()
        left, right = env.step(action), other.step(action)
        assert same(left, right)
    assert left[3] and right[3]
    assert same(env.reset(), other.reset())


def test_copies_are_of_given_starts_too(endless_world: Path) -> None:
    from tests.envs.test_vector_env import other_starts

    env = NFDEnv(endless_world, starts=other_starts(), obs_type="latent", **CPU)
    other = pickle.loads(pickle.dumps(env))
    assert same(env.reset(seed=2)[0], other.reset(seed=2)[0])


def test_a_real_game_cannot_be_copied(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 1, **CPU)
    for how in COPIES.values():
        with pytest.raises(TypeError, match="a real game cannot be copied"):
            how(env)
    env.close()
