"""The token-autoregressive rival: its order of tokens, and its frames in the env."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import nfd_env  # noqa: F401
from nfd_env.baselines.transformer import Schedule, sample_top_p
from nfd_env.cli import main
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.rollout import new_cache
from nfd_env.models.weights import CheckpointError
from nfd_env.worlds.load import load_world
from tests.baselines.conftest import discrete, transformer

BOTH = ("autoregressive", "autoregressive_parallel")


def env(world: Path, num_envs: int, dynamics: str, **kwargs: Any) -> NFDVectorEnv:
    return NFDVectorEnv(world, num_envs, "cpu", dynamics=dynamics, precision="fp32", **kwargs)


def play(batch: NFDVectorEnv, steps: int = 9, seed: Any = 3) -> np.ndarray:
    batch.reset(seed=seed)
    actions = np.random.default_rng(0).integers(0, 3, (steps, 1))
    return np.stack([batch.step(np.repeat(a, batch.num_envs))[0] for a in actions])


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 3), (4, 1), (3, 5)])
def test_every_token_is_drawn_once_after_those_that_it_may_know(rows: int, columns: int) -> None:
    for delay, passes in ((columns, rows * columns), (1, rows + columns - 1)):
        schedule = Schedule(rows, columns, delay)
        assert len(schedule.passes) == passes
        drawn: list[int] = []
        filled: list[int] = []
        for first, end, count in schedule.passes:
            sources = schedule.sources[first:end].tolist()
            # What goes in was drawn in an earlier pass, is an action, or the last frame's token.
            assert all(s < 0 or s == rows * columns or s in drawn for s in sources)
            filled += schedule.slots[first:end].tolist()
            drawn += schedule.targets[len(drawn) : len(drawn) + count].tolist()
        assert sorted(drawn) == list(range(rows * columns))
        assert sorted(filled) == list(range(rows * (columns + 1)))
        if delay == columns:
            assert drawn == sorted(drawn)


@pytest.mark.parametrize("name", ["one_by_one", "diagonal"])
def test_drawing_with_a_cache_is_drawing_from_the_whole_sequence(name: str) -> None:
    torch.manual_seed(0)
    network = transformer().requires_grad_(False)
    schedule = getattr(network, name)
    actions, start = torch.randn(2, 12, 3), torch.randint(0, 36, (2, 3, 6))
    uniform = torch.rand(2, 9, 6)
    cache = new_cache(network, 2)  # type: ignore[arg-type]
    network.fill(cache, start, actions[:, :3], schedule)
    frames = [start[:, 0], start[:, 1], start[:, 2]]
    for t in range(9):  # well beyond the window
        frames.append(network.draw(cache, frames[-1], actions[:, 3 + t], uniform[:, t], schedule))
    made = torch.stack(frames, 1)
    logits = network(made, actions, schedule)[:, 2:]
    assert torch.equal(sample_top_p(logits, uniform, 0.95), made[:, 3:])
    assert len(made[:, 3:].unique()) > 10


@pytest.mark.parametrize("name", ["one_by_one", "diagonal"])
def test_a_token_knows_nothing_of_later_ones(name: str) -> None:
    network = transformer().requires_grad_(False)
    schedule = getattr(network, name)
    tokens, actions = torch.randint(0, 36, (1, 4, 6)), torch.randn(1, 4, 3)
    changed = tokens.clone()
    changed[0, 2, 4] = (tokens[0, 2, 4] + 1) % 36  # row 1, column 1
    before, after = (network(t, actions, schedule)[0] for t in (tokens, changed))
    same = (before == after).all(-1)
    assert same[0].all() and not same[2].any()  # frames 1 and 3; the first has no guess
    assert [i for i in range(6) if not same[1, i]] == [5]


def test_the_diagonal_order_knows_the_token_above() -> None:
    network = transformer().requires_grad_(False)
    tokens, actions = torch.randint(0, 36, (1, 3, 6)), torch.randn(1, 3, 3)
    changed = tokens.clone()
    changed[0, 1, 1] = (tokens[0, 1, 1] + 1) % 36  # row 0, column 1
    before, after = (network(t, actions, network.diagonal)[0, 0] for t in (tokens, changed))
    told = [i for i in range(6) if not torch.equal(before[i], after[i])]
    assert told == [2, 4, 5]  # right of it, below it, and what comes later; not row 1, column 0


def test_nucleus_sampling() -> None:
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    uniform = torch.linspace(0, 1, 1001)
    counts = {}
    for top_p in (1.0, 0.8, 0.3):
        drawn = sample_top_p(logits.expand(1001, 4), uniform, top_p)
        counts[top_p] = drawn.bincount(minlength=4).tolist()
    assert counts[1.0] == pytest.approx([100, 500, 50, 350], abs=2)
    assert counts[0.8] == pytest.approx([0, 588, 0, 412], abs=2)
    assert counts[0.3] == [0, 1001, 0, 0]


def test_tokens_of_latents() -> None:
    tokenizer = discrete().requires_grad_(False)
    latents = torch.randn(5, 4, 4, 6)
    tokens = tokenizer.encode(latents)
    assert tokens.shape == (5, 6) and tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) and int(tokens.max()) < 36
    assert torch.allclose(tokenizer.decode(tokens), tokenizer(latents), atol=1e-5)


@pytest.mark.parametrize("dynamics", BOTH)
def test_same_seed_same_rollout_and_slots_are_single_envs(rival_world: Path, dynamics: str) -> None:
    batch = play(env(rival_world, 3, dynamics))
    assert np.array_equal(batch, play(env(rival_world, 3, dynamics)))
    assert not np.array_equal(batch[:, 0], batch[:, 1])
    for slot in range(3):
        single = gymnasium.make(
            "NFD/World-v0", world=rival_world, device="cpu", precision="fp32", dynamics=dynamics
        )
        single.reset(seed=3 + slot)
        actions = np.random.default_rng(0).integers(0, 3, (9, 1))
        alone = np.stack([single.step(int(a[0]))[0] for a in actions])
        assert np.abs(alone.astype(int) - batch[:, slot]).max() <= 2
    assert not np.array_equal(batch, play(env(rival_world, 3, "flow")))


def test_both_orders_share_what_they_are(rival_world: Path) -> None:
    one, parallel, flow = (load_world(rival_world, "cpu", "fp32", d) for d in (*BOTH, "flow"))
    assert one.model.tokenizer is parallel.model.tokenizer is flow.model.tokenizer
    assert one.model.heads is flow.model.heads
    assert (one.dynamics, one.model.sampling.steps) == ("autoregressive", 6)
    assert (parallel.dynamics, parallel.model.sampling.steps) == ("autoregressive_parallel", 4)
    assert load_world(rival_world, "cpu", "fp32", "autoregressive").model is one.model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_are_saved_forked_and_restored(rival_world: Path, precision: str) -> None:
    batch = NFDVectorEnv(rival_world, 2, "cpu", dynamics=BOTH[0], precision=precision)
    play(batch, 7)
    state, fork = batch.save_state(), copy.deepcopy(batch)
    goes_on = [batch.step(np.array([1, 2]))[0] for _ in range(4)]
    batch.restore_state(state)
    for frames in goes_on:
        assert np.array_equal(batch.step(np.array([1, 2]))[0], frames)
        assert np.array_equal(fork.step(np.array([1, 2]))[0], frames)
    # A masked reset leaves the other row alone.
    batch.restore_state(state)
    batch.reset(seed=[None, 9], options={"reset_mask": np.array([False, True])})
    assert np.array_equal(batch.step(np.array([1, 2]))[0][0], goes_on[0][0])


def test_heads_features_and_frame_skip(rival_world: Path) -> None:
    batch = env(rival_world, 2, BOTH[1], obs_type="features", frame_skip=3, ood=True)
    batch.reset(seed=0)
    observation, reward, *_, info = batch.step(np.array([0, 1]))
    assert observation.shape == batch.observation_space.shape
    assert np.isfinite(reward).all() and info["hazard"].shape == info["ood"].shape == (2,)


def test_temperature_is_that_of_the_tokens(rival_world: Path) -> None:
    cold = play(env(rival_world, 2, BOTH[0], temperature=1e-3))
    other = env(rival_world, 2, BOTH[0], temperature=1e-3)
    other.reset(seed=3)
    state = other.save_state()
    # Other noise changes nothing where the likeliest token is certain.
    state.world.keys = state.world.keys + 12345
    other.restore_state(state)
    actions = np.random.default_rng(0).integers(0, 3, (9, 1))
    assert np.array_equal(cold, np.stack([other.step(np.repeat(a, 2))[0] for a in actions]))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"speculative_frames": 2}, "one frame at a time"),
        ({"sampling_steps": 4}, "a frame's tokens take 6 passes; leave it out, got 4"),
        ({"history_level": 0.1}, "tokens have none"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_has_no_meaning_is_refused(
    rival_world: Path, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        env(rival_world, 1, BOTH[0], **given)


def test_running_episodes_do_not_change_kind(rival_world: Path) -> None:
    batch = env(rival_world, 2, "flow")
    frame, _ = batch.reset(seed=0)
    state = batch.save_state()
    with pytest.raises(ValueError, match="networks of other sizes"):
        batch.set_sampling(dynamics=BOTH[0])
    assert batch.world.dynamics == "flow"
    with pytest.raises(ValueError, match="networks of other sizes"):
        env(rival_world, 2, BOTH[0]).restore_state(state)
    fresh = env(rival_world, 2, "flow")
    fresh.set_sampling(dynamics=BOTH[0])
    assert np.array_equal(play(fresh), play(env(rival_world, 2, BOTH[0])))


def test_a_world_without_it_says_what_it_has(tiny_world: Path, rival_world: Path) -> None:
    with pytest.raises(ValueError, match="'autoregressive' was asked for, Tiny has: flow$"):
        env(tiny_world, 1, BOTH[0])
    with pytest.raises(ValueError, match="Tiny has: flow, autoregressive, autoregressive_parallel"):
        env(rival_world, 1, "teacher")
    with pytest.raises(ValueError, match="dynamics must be .*autoregressive"):
        env(rival_world, 1, "autoregresive")


def test_without_the_extra(
    rival_world: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    shutil.copytree(rival_world, tmp_path / "world")
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'nfd-env\[autoregressive\]'"):
        env(tmp_path / "world", 1, BOTH[0])
    env(tmp_path / "world", 1, "flow").reset(seed=0)  # nothing else needs it


def test_parts_of_other_worlds_are_refused(
    rival_world: Path, make_world: Any, tmp_path: Path
) -> None:
    """Beside the world, as in a run, they are found too."""
    run = tmp_path / "run"
    shutil.copytree(make_world(hazard_bias=-1000.0), run / "world")
    parts = rival_world / "autoregressive"
    for part in ("tokenizer", "dynamics"):
        (run / "autoregressive" / part).mkdir(parents=True)
        shutil.copy(
            parts / f"{part}.safetensors", run / "autoregressive" / part / "model.safetensors"
        )
    assert np.array_equal(play(env(run / "world", 2, BOTH[0])), play(env(rival_world, 2, BOTH[0])))
    shutil.rmtree(run / "world")
    shutil.copytree(make_world(seed=5), run / "world")
    with pytest.raises(CheckpointError, match="another tokenizer than Tiny has"):
        env(run / "world", 1, BOTH[0])
    damaged = tmp_path / "damaged"
    shutil.copytree(rival_world, damaged)
    (damaged / "autoregressive" / "dynamics.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="dynamics.safetensors: damaged"):
        env(damaged, 1, BOTH[0])


def test_bench_says_who_measures_it(rival_world: Path, capsys: Any) -> None:
    assert main(["bench", str(rival_world), "--dynamics", BOTH[0], "--device", "cpu"]) == 1
    assert "nfd eval --against" in capsys.readouterr().err
