"""Envs in processes that others start, beside torch's global settings, copied and pickled."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from nfd_env.envs import guests
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.envs.wrappers import SlotShare
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.weights import CheckpointError
from nfd_env.players.load import load_player
from nfd_env.players.player import NetworkPlayer
from nfd_env.players.policy import ActorCritic, AgentSpec, PolicyConfig
from nfd_env.worlds.load import load_world, make_real
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


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("dynamics", ["student", "teacher"])
def test_a_world_can_be_copied(
    distilled_world: Path, how: Callable[[Any], Any], dynamics: str
) -> None:
    """By its folder, so that the weights stay shared; with what was put into it."""
    world = load_world(distilled_world, "cpu", "fp32", dynamics)
    assert how(world) is world
    fewer = replace(world, starts=world.starts[:2])
    other = how(fewer)
    assert len(other.starts) == 2 and other.model.dynamics is world.model.dynamics
    assert (other.dynamics, other.fingerprint) == (dynamics, world.fingerprint)


def test_a_pickle_of_a_world_that_has_been_replaced(make_world: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(make_world(), tmp_path / "world")
    world, env = load_world(folder, **CPU), NFDVectorEnv(folder, 2, **CPU)
    pickles = [pickle.dumps(x) for x in (world, env, NFDEnv(folder, **CPU))]
    shutil.rmtree(folder)
    shutil.copytree(make_world(seed=1), folder)
    for pickled in pickles:
        with pytest.raises(CheckpointError, match="another world lies there"):
            pickle.loads(pickled)
    # Within the process the world is there still, whatever lies in its folder.
    assert copy.deepcopy(world) is world
    assert same(env.reset(seed=0), copy.deepcopy(env).reset(seed=0))
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="unknown world"):
        pickle.loads(pickles[0])


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("part", ["model", "model.tokenizer", "model.dynamics", "model.heads"])
def test_networks_can_be_copied(endless_world: Path, how: Callable[[Any], Any], part: str) -> None:
    """Also after they were laid out for inference, and used."""
    NFDVectorEnv(endless_world, 1, **CPU).reset(seed=0)
    world = load_world(endless_world, **CPU)
    env = NFDVectorEnv(endless_world, 2, **CPU)
    expected = [env.reset(seed=0), env.step([0, 1])]
    made = how(operator.attrgetter(part)(world))
    copied = world.model.with_sampling(world.model.sampling)
    if part == "model":
        copied = made
    else:
        setattr(copied, part.removeprefix("model."), made)
    env.model = copied
    assert same([env.reset(seed=0), env.step([0, 1])], expected)


# --------------------------------------------------------------------------- what cannot be set


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        *(
            (name, 3, AttributeError, "make another env")
            for name in (
                *("num_envs", "obs_type", "output", "frame_skip", "autoreset_mode", "world"),
                *("observation_space", "action_space", "single_action_space", "device"),
                *("single_observation_space", "precision", "speculative_frames"),
            )
        ),
        ("temperature", 1.2, AttributeError, r"call set_sampling\(temperature"),
        ("sampling_steps", 2, AttributeError, r"call set_sampling\(sampling_steps"),
        ("ood", True, AttributeError, "call watch_ood"),
        ("step", 5, AttributeError, "step is a method"),
        ("np_random_seed", 5, AttributeError, "setter"),
        ("max_episode_steps", True, ValueError, "a whole number"),
        ("max_episode_steps", 0, ValueError, "at least 1"),
        ("max_episode_steps", "long", ValueError, "a whole number"),
        ("render_mode", "human", ValueError, "render_mode must be one of"),
        ("metadata", 5, ValueError, "metadata of an env cannot be 5"),
        ("spec", "CartPole-v1", ValueError, "spec of an env cannot be"),
        ("closed", 1, ValueError, "closed"),
        ("starts", [5], ValueError, "starts must be"),
        ("sampling", 3, ValueError, "SamplingConfig"),
        ("model", None, ValueError, "WorldModel"),
        ("_now", None, AttributeError, "not public"),
    ],
)
@pytest.mark.parametrize("by", ["set_attr", "setattr", "of_one"])
def test_what_would_break_an_env_cannot_be_set(
    endless_world: Path, name: str, value: Any, error: type[Exception], message: str, by: str
) -> None:
    batch, one = NFDVectorEnv(endless_world, 2, **CPU), NFDEnv(endless_world, **CPU)
    env: Any = one if by == "of_one" else batch
    if by != "set_attr" and name in ("_now", "closed", "np_random_seed"):
        return
    expected = [env.reset(seed=1), env.step([1, 2] if env is batch else 1)]
    with pytest.raises(error, match=message):
        env.set_attr(name, value) if by == "set_attr" else setattr(env, name, value)
    assert same([env.reset(seed=1), env.step([1, 2] if env is batch else 1)], expected)


def test_the_options_of_an_env_can_be_read(endless_world: Path, counter_world: Path) -> None:
    options = {"sampling_steps": 3, "history_level": 0.1, "temperature": 1.2, "ood": True}
    made = {**options, "dynamics": "flow", "frame_skip": 2, **CPU, "device": torch.device("cpu")}
    one = NFDEnv(endless_world, **made)
    for env in (one, one.vector):
        assert {name: getattr(env, name) for name in made} == made
    assert one.vector.get_attr("temperature") == (1.2,) and not NFDEnv(endless_world, **CPU).ood
    assert NFDEnv(endless_world, **CPU).sampling_steps == 2  # the world's
    assert RealVectorEnv(counter_world, 1, **CPU).device == torch.device("cpu")


def test_sampling_that_was_set_is_that_of_copies(endless_world: Path) -> None:
    env = NFDVectorEnv(endless_world, 1, **CPU)
    env.sampling = SamplingConfig(1, "consistency")
    for made in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert made.sampling == SamplingConfig(1, "consistency")
    one = NFDEnv(endless_world, **CPU)
    one.sampling = env.sampling
    assert one.vector.sampling == one.sampling == env.sampling
    env.set_sampling(temperature=1.1)
    assert env.sampling == SamplingConfig(1, "consistency", temperature=1.1)


def test_what_clients_set_can_be_set(endless_world: Path) -> None:
    one = NFDEnv(endless_world, **CPU)
    both = SyncVectorEnv([lambda: NFDEnv(endless_world, **CPU)])
    batch = NFDVectorEnv(endless_world, 1, **CPU)
    for env in (batch, both):
        env.set_attr("max_episode_steps", [1])
        env.reset(seed=0)
        assert env.step([0])[3].all() and env.get_attr("max_episode_steps") == (1,)
    one.max_episode_steps = 1  # type: ignore[attr-defined]  # it was silently without effect
    one.reset(seed=0)
    assert one.step(0)[3] and one.vector.max_episode_steps == 1
    for env in (one, batch):
        env.render_mode = "rgb_array"  # type: ignore[misc]
        assert env.render() is not None
        env.spec = gymnasium.spec("NFD/World-v0")
        env.mine, env.metadata = 5, {**env.metadata, "mine": 1}  # type: ignore[union-attr]
        env.step = lambda action: "watched"  # type: ignore[method-assign]
        assert env.step(0) == "watched"


def test_the_real_games_attributes_are_guarded_too(counter_world: Path) -> None:
    env = RealVectorEnv(counter_world, 2, **CPU)
    for name in ("num_envs", "action_space", "frame_skip"):
        with pytest.raises(AttributeError, match="make another env"):
            env.set_attr(name, 3)
        with pytest.raises(AttributeError, match="cannot be deleted"):
            delattr(env, name)
    with pytest.raises(ValueError, match="one value, or 2 equal ones"):
        env.set_attr("mine", [torch.zeros(2), torch.ones(3)])
    env.close()


# --------------------------------------------------------------------------------- True is no seed


@pytest.mark.parametrize("flag", [True, False, np.True_])
def test_a_bool_is_no_number(endless_world: Path, counter_world: Path, flag: Any) -> None:
    batch, one = NFDVectorEnv(endless_world, 2, **CPU), NFDEnv(endless_world, **CPU)
    real, game = RealVectorEnv(counter_world, 2, **CPU), make_real(counter_world)
    shared = SlotShare(batch, 0)
    expected = batch.reset(seed=0)
    for env in (batch, one, real, game, shared):
        with pytest.raises(ValueError, match="seed"):
            env.reset(seed=flag)
    for seeds in ([flag, 1], np.array([flag, flag]), torch.tensor([bool(flag)] * 2)):
        with pytest.raises(ValueError, match="seed"):
            batch.reset(seed=seeds)  # type: ignore[arg-type]
    for name in (
        *("num_envs", "frame_skip", "speculative_frames", "max_episode_steps"),
        *("sampling_steps", "context_observations", "temperature", "history_level"),
    ):
        with pytest.raises(ValueError, match=name):
            NFDVectorEnv(endless_world, **{name: flag, **CPU})
    with pytest.raises(ValueError, match="start must be"):
        batch.reset(options={"start": flag})
    for call in (batch.set_sampling, one.set_sampling):
        with pytest.raises(ValueError, match="sampling_steps"):
            call(sampling_steps=flag)
    for rows in ([flag], [0, flag]):
        with pytest.raises(ValueError, match="number of an environment"):
            batch.take(rows)
    assert same(batch.reset(seed=0), expected)
    for player in (load_player("random", batch), NetworkPlayer(ActorCritic(of_batch(batch)))):
        with pytest.raises(ValueError, match="seed"):
            player.reset(2, flag)
    real.close(), game.close()


def of_batch(env: NFDVectorEnv) -> PolicyConfig:
    return PolicyConfig(spec=AgentSpec.of(env, 1))
