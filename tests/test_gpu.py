"""What is done differently on a GPU gives the same; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference import cuda_graph
from nfd_env.inference.noise import mix, noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ROWS = 3
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs of all replays."""
    made: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    class Counting(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            made.append(self)
            replay(self)

    monkeypatch.setattr(cuda_graph.torch.cuda, "CUDAGraph", Counting)
    return made


def make(world: Path | str, device: str = "cuda", captures: bool = True, **kwargs: Any) -> Any:
    arguments = {"precision": "fp32", "output": "torch", "autoreset_mode": "SameStep", **kwargs}
    env = NFDVectorEnv(world, ROWS, device=device, **arguments)
    env.model.captures &= captures
    return env


def play(env: Any, steps: int, seed: int = 0, held: int = 1) -> list[tuple[Tensor, ...]]:
    env.reset(seed=5)
    return go_on(env, steps, seed, held)


def go_on(env: Any, steps: int, seed: int = 0, held: int = 1) -> list[tuple[Tensor, ...]]:
    random = np.random.default_rng(seed)
    seen = []
    for step in range(steps):
        if step % held == 0:
            actions = random.integers(0, env.single_action_space.n, ROWS)
        observation, reward, terminated, truncated, info = env.step(actions)
        seen.append((observation, reward, terminated, truncated, info["hazard"]))
    return [tuple(x.cpu() for x in parts) for parts in seen]


def assert_alike(mine: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> None:
    for a, b in zip(mine, other, strict=True):
        for x, y in zip(a, b, strict=True):
            if x.dtype == torch.uint8:
                assert (x.int() - y.int()).abs().max() <= 2
            else:
                torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("sampling_steps", [1, 2])
@pytest.mark.parametrize("obs_type", ["latent", "rgb", "features"])
def test_replayed_steps_are_the_steps(
    obs_type: str, sampling_steps: int, replays: list[torch.cuda.CUDAGraph]
) -> None:
    """In the shipped world, through restarts of some rows."""
    common = {"obs_type": obs_type, "sampling_steps": sampling_steps, "max_episode_steps": 5}
    env = make("DoomTakeCover", frame_skip=2, **common)
    plain = make("DoomTakeCover", captures=False, frame_skip=2, **common)
    mine, other = play(env, 50), play(plain, 50)
    assert_alike(mine, other)
    kinds = 2 + (obs_type == "rgb")  # steps, starts, pictures
    assert len(set(replays)) >= kinds and len(replays) > 100


def test_one_device_gives_the_same_bit_for_bit(tiny_world: Path) -> None:
    mine, other = (play(make(tiny_world), 30) for _ in range(2))
    for a, b in zip(mine, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_the_cpu_gives_the_same(endless_world: Path) -> None:
    assert_alike(play(make(endless_world), 30), play(make(endless_world, "cpu"), 30))


@pytest.mark.parametrize("frame", [0, 12345])
def test_the_noise_is_the_same_everywhere(frame: int) -> None:
    keys = torch.tensor([mix(seed, 3) for seed in range(50)])
    frames = torch.full_like(keys, frame)
    here, there = noise(keys, frames, 1536), noise(keys.cuda(), frames.cuda(), 1536)
    assert torch.equal(here[1], there[1].cpu())
    differing = (here[0] != there[0].cpu()).sum()
    assert differing <= 1, "more than a rounding in a hundred thousand numbers"
    torch.testing.assert_close(here[0], there[0].cpu(), rtol=1e-6, atol=0)


def test_saved_states_come_back(endless_world: Path, replays: list[torch.cuda.CUDAGraph]) -> None:
    env = make(endless_world)
    play(env, 20)
    saved, graphs = env.save_state(), set(replays)
    first = go_on(env, 12, 1)
    go_on(env, 5, 2)
    env.restore_state(saved)
    assert_alike(go_on(env, 12, 1), first)
    assert set(replays) == graphs, "a restored state was captured anew"
    env.restore_state(saved)
    taken = env.take([2, 0, 1])
    expected = go_on(taken, 12, 3)
    env.restore_state(env.save_state([2, 0, 1]))
    assert_alike(go_on(env, 12, 3), expected)


@pytest.mark.parametrize("frame_skip", [1, 4])
def test_drafts(endless_world: Path, frame_skip: int) -> None:
    common = {"speculative_frames": 4, "frame_skip": frame_skip}
    env, plain = make(endless_world, **common), make(endless_world, captures=False, **common)
    assert_alike(play(env, 40, held=5), play(plain, 40, held=5))


def test_other_threads_go_on_while_a_step_is_captured(
    endless_world: Path, make_world: Callable[..., Path]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    envs = [make(endless_world) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda env: play(env, 30), envs))
    for other in seen[1:]:
        assert_alike(other, seen[0])
