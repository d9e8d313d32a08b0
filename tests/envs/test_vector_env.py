from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from torch.utils._python_dispatch import TorchDispatchMode

import nfd_env  # noqa: F401  # registers the ids
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.envs.wrappers import SlotShare
from nfd_env.inference.state import Context
from nfd_env.models.weights import CheckpointError
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.starts import save_starts

MODES = list(AutoresetMode)


def make(world: Path, num_envs: int = 3, **kwargs: Any) -> NFDVectorEnv:
    """Latents by default: they show the smallest difference, and cost no decoding."""
    values = {"device": "cpu", "precision": "fp32", "obs_type": "latent", **kwargs}
    return NFDVectorEnv(world, num_envs, **values)


def actions(num_envs: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (steps, num_envs))


def play(env: NFDVectorEnv, acts: np.ndarray) -> list[tuple[Any, ...]]:
    return [env.step(a) for a in acts]


def same(left: Any, right: Any) -> bool:
    """Bit for bit equal, through tuples, dicts and arrays."""
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray) and left.dtype == object:
        return all(map(same, left.tolist(), right.tolist()))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    return left == right


def arrays(value: Any) -> Iterator[Any]:
    """All arrays and tensors in a returned value."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from arrays(part)
    elif isinstance(value, dict):
        yield from arrays(list(value.values()))
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from arrays(value.tolist())
    elif isinstance(value, np.ndarray | torch.Tensor):
        yield value


def close(left: Any, right: Any) -> bool:
    return np.allclose(left, right, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------ the contract


def test_spaces_and_metadata(tiny_world: Path) -> None:
    env = make(tiny_world, 2, obs_type="rgb", frame_skip=2)
    assert env.observation_space.shape == (2, 32, 48, 3)
    assert env.single_observation_space.shape == (32, 48, 3)
    assert env.single_observation_space.dtype == np.uint8
    assert env.single_action_space.n == 3
    assert env.metadata["render_fps"] == 18 and type(env.metadata["render_fps"]) is int
    assert env.metadata["autoreset_mode"] is env.autoreset_mode is AutoresetMode.NEXT_STEP
    assert "autoreset_mode" not in NFDVectorEnv.metadata
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert not info["hazard"].any() and not info["_hazard"].any()
    observation, rewards, terminated, truncated, info = env.step(env.action_space.sample())
    assert observation in env.observation_space
    assert rewards.shape == (2,) and rewards.dtype == np.float64
    for ends in (terminated, truncated):
        assert ends.shape == (2,) and ends.dtype == bool
    assert info["hazard"].shape == (2,) and info["_hazard"].all()
    assert (info["hazard"] > 0).all() and (info["hazard"] < 1).all()


def test_latent_observations(tiny_world: Path) -> None:
    latent, rgb = make(tiny_world, 2), make(tiny_world, 2, obs_type="rgb")
    assert latent.single_observation_space.shape == (4, 4, 6)
    shown, frames = latent.reset(seed=0)[0], rgb.reset(seed=0)[0]
    for a in actions(2, 4):
        assert shown in latent.observation_space and shown.dtype == np.float32
        assert np.array_equal(latent.model.decode(torch.from_numpy(shown)).numpy(), frames)
        shown, frames = latent.step(a)[0], rgb.step(a)[0]


@pytest.mark.parametrize("drafts", [1, 2])
def test_features_observations(hasty_world: Path, drafts: int) -> None:
    """With frames skipped and drafted ahead, and where episodes end within a skip."""
    count, skip = 12, 3
    kwargs: dict[str, Any] = {
        "output": "torch",
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "speculative_frames": drafts,
    }
    env = make(hasty_world, count, obs_type="features", frame_skip=skip, **kwargs)
    frames, model = make(hasty_world, count, **kwargs), env.model
    assert env.single_observation_space.shape == (model.feature_size,)
    shown, _ = env.reset(seed=0)
    start, _ = frames.reset(seed=0)
    assert tuple(shown.shape) == env.observation_space.shape and shown.dtype == torch.float32
    assert torch.equal(env.observe("latent"), start)
    assert torch.equal(frames.observe("features"), shown)
    codec = env.world.codec
    known = [s for s in env.starts]
    begun = [next(s for s in known if torch.equal(s.latents[-1].float(), row)) for row in start]
    action = torch.from_numpy(actions(count, 1)[0])
    into = codec.encode(action)
    played = [[c] for c in begun]
    running = np.ones(count, bool)
    for _ in range(skip):
        latents, _, terminated, _, info = frames.step(action)
        for row in np.flatnonzero(running):
            last = info["final_obs"][row] if terminated[row] else latents[row]
            played[row].append(Context(last[None], into[row][None]))
        running &= ~terminated.numpy()
    observation, _, terminated, _, info = env.step(action)
    assert 0 < terminated.sum() < count and same(terminated.numpy(), ~running)
    for row in range(count):
        whole = Context(
            torch.cat([part.latents for part in played[row]]),
            torch.cat([part.actions for part in played[row]]),
        )
        got = info["final_obs"][row] if terminated[row] else observation[row]
        assert close(got, model.features_along(whole)[-1])
    # A saved state shows the same again, in an env of whatever observations.
    state = env.save_state()
    assert torch.equal(state.take([1]).memory, state.memory[[1]])
    plain = make(hasty_world, count, frame_skip=skip, **kwargs)
    plain.restore_state(state)
    assert torch.equal(plain.observe("features"), observation)
    env.step(action)
    env.restore_state(state.take([3]), rows=[0])
    assert torch.equal(env.observe()[0], observation[3])


@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_torch_output_equals_numpy_output(hasty_world: Path, obs_type: str) -> None:
    kwargs = {"obs_type": obs_type, "autoreset_mode": AutoresetMode.SAME_STEP}
    tensors = make(hasty_world, output="torch", **kwargs)
    numbers = make(hasty_world, **kwargs)
    assert same(tensors.reset(seed=0)[0].numpy(), numbers.reset(seed=0)[0])
    for a in actions(3, 6):
        observation, reward, terminated, truncated, info = tensors.step(torch.from_numpy(a))
        expected = numbers.step(a)
        assert all(x.device == tensors.model.device for x in (observation, reward, terminated))
        assert reward.dtype == torch.float32 and terminated.dtype == torch.bool
        assert same(observation.numpy(), expected[0])
        assert np.array_equal(reward.numpy(), expected[1])
        assert same(terminated.numpy(), expected[2]) and same(truncated.numpy(), expected[3])
        assert same(info["hazard"].numpy(), expected[4]["hazard"])
        assert ("final_obs" in info) == ("final_obs" in expected[4])
        if "final_obs" in info:
            for row in np.flatnonzero(expected[4]["_final_obs"]):
                assert same(info["final_obs"][row].numpy(), expected[4]["final_obs"][row])


@pytest.mark.parametrize("obs_type", ["latent", "features"])
def test_torch_output_can_be_learned_from(tiny_world: Path, obs_type: str) -> None:
    env = make(tiny_world, output="torch", obs_type=obs_type)
    observation, _ = env.reset(seed=0)
    weight = torch.ones(*observation.shape[1:], requires_grad=True)
    for a in actions(3, 2):
        (observation * weight).sum().backward()
        observation, reward, *_ = env.step(a)
        observation.mul_(2)  # not an inference tensor either
        (reward * weight.sum()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "space",
    [
        {"type": "Discrete", "n": 3, "start": 4},
        {"type": "MultiDiscrete", "nvec": [3, 2], "start": [0, 0]},
        {"type": "MultiBinary", "n": 4},
        {"type": "Box", "low": [-1.0, 0.0], "high": [1.0, 5.0]},
        {"type": "Box", "low": [-np.inf], "high": [np.inf]},
    ],
    ids=lambda s: s["type"],
)
def test_every_action_space(make_world: Callable[..., Path], space: dict[str, Any]) -> None:
    env = make(make_world(action_space=space, hazard_bias=-1000.0), 3)
    env.reset(seed=0)
    state = env.save_state()
    env.action_space.seed(0)
    first = env.action_space.sample()
    made = env.step(first)[0]
    assert made in env.observation_space
    env.restore_state(state)
    other = np.roll(first, 1, axis=0)
    assert not np.array_equal(other, first)
    assert not same(env.step(other)[0], made)
    single = NFDEnv(env.world.folder, "cpu", precision="fp32")
    single.reset(seed=0)
    for _ in range(3):
        assert single.step(single.action_space.sample())[0] in single.observation_space


def test_bf16(endless_world: Path) -> None:
    env, exact = make(endless_world, precision="bf16"), make(endless_world)
    assert env.model.precision == "bf16"
    shown, expected = env.reset(seed=0)[0], exact.reset(seed=0)[0]
    assert same(shown, expected)
    first = play(env, actions(3, 3))
    assert first[0][0].dtype == np.float32
    difference = np.abs(first[0][0] - exact.step(actions(3, 3)[0])[0])
    assert 0 < difference.max() < 0.3
    env.reset(seed=0)
    assert same(play(env, actions(3, 3)), first)


# ----------------------------------------------------------------------------------------- seeding


@pytest.mark.parametrize("mode", MODES[:2])
def test_same_seed_same_rollout_bit_for_bit(hasty_world: Path, mode: AutoresetMode) -> None:
    acts = actions(3, 12)
    runs = []
    for noise in (1, 2):
        env = make(hasty_world, obs_type="rgb", autoreset_mode=mode, max_episode_steps=5)
        torch.manual_seed(noise)
        np.random.seed(noise)
        runs.append((env.reset(seed=11), play(env, acts)))
    assert same(*runs)
    env.reset(seed=12)
    assert not same(play(env, acts), runs[0][1])


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_slot_i_equals_the_single_env_with_that_seed(endless_world: Path, num_envs: int) -> None:
    env = make(endless_world, num_envs)
    acts = actions(num_envs, 9)
    first, _ = env.reset(seed=20)
    steps = play(env, acts)
    for slot in sorted({0, num_envs // 2, num_envs - 1}):
        single = NFDEnv(endless_world, "cpu", obs_type="latent", precision="fp32")
        assert close(single.reset(seed=20 + slot)[0], first[slot])
        for t, action in enumerate(acts[:, slot]):
            observation, reward, terminated, truncated, info = single.step(action)
            assert close(observation, steps[t][0][slot])
            assert close(reward, steps[t][1][slot])
            assert close(info["hazard"], steps[t][4]["hazard"][slot])
            assert not terminated and not truncated


def test_a_rollout_does_not_depend_on_the_place_in_the_batch(endless_world: Path) -> None:
    env = make(endless_world)
    acts = actions(3, 8)
    first = [env.reset(seed=[1, 2, 3])[0], *(s[0] for s in play(env, acts))]
    order = [2, 0, 1]
    second = [env.reset(seed=[3, 1, 2])[0], *(s[0] for s in play(env, acts[:, order]))]
    for a, b in zip(first, second, strict=True):
        assert close(a[order], b)
    assert not close(first[-1][0], first[-1][1])


def test_forms_of_a_seed(endless_world: Path) -> None:
    env = make(endless_world)
    expected = env.reset(seed=5)[0]
    for seed in ([5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), np.int64(5)):
        assert same(env.reset(seed=seed)[0], expected)
        assert env.np_random_seed == (5, 6, 7)


def test_without_a_seed_the_next_episode_follows(endless_world: Path) -> None:
    acts = actions(3, 3)
    one, other = make(endless_world), make(endless_world)
    runs = []
    for env in (one, other):
        env.reset(seed=5)
        first = play(env, acts)
        env.reset()
        runs.append(play(env, acts))
    assert same(*runs)
    assert not same(runs[0], first)
    # A seed for some slots only: the others go on.
    one.reset(seed=[5, None, 9])
    other.reset()
    assert one.np_random_seed == (5, 6, 9)
    a, b = play(one, acts)[-1][0], play(other, acts)[-1][0]
    assert same(a[1], b[1]) and not same(a[0], b[0])
    # It begins anew with the seed.
    assert same(a[0], first[-1][0][0])


def test_large_seeds_are_seeds_of_their_own(endless_world: Path) -> None:
    seeds = [5, 5 + 2**32, 5 + 2**63, 5 + 2**64, 5 + 2**128]
    env, acts = make(endless_world, 5), np.zeros((2, 5), int)
    env.reset(seed=seeds, options={"start": 0})
    assert env.np_random_seed == tuple(seeds)
    shown = play(env, acts)[-1][0]
    assert len({row.tobytes() for row in shown}) == 5
    single = NFDEnv(endless_world, "cpu", obs_type="latent", precision="fp32")
    single.reset(seed=seeds[3], options={"start": 0})
    single.step(0)
    assert close(single.step(0)[0], shown[3])


def test_unseeded_envs_differ(endless_world: Path) -> None:
    one, other = make(endless_world), make(endless_world)
    assert one.np_random_seed == (-1, -1, -1)
    one.reset(), other.reset()
    assert len({*one.np_random_seed, *other.np_random_seed}) == 6
    acts = actions(3, 1)
    assert not same(play(one, acts), play(other, acts))


def test_seeds_choose_among_the_starts(endless_world: Path) -> None:
    env = make(endless_world, 40)
    shown, _ = env.reset(seed=0)
    starts = [s.latents[-1].numpy() for s in env.world.starts]
    chosen = [next(i for i, s in enumerate(starts) if np.array_equal(s, x)) for x in shown]
    assert set(chosen) == set(range(6))


# --------------------------------------------------------------------------------------- autoreset


def run_to_an_end(env: NFDVectorEnv, seed: int = 2) -> tuple[tuple[Any, ...], np.ndarray, int]:
    """Step until a row but not every row ends; the transition, which rows, and the step's number.

    ``infos`` do not tell what ended with SAME_STEP, so terminated | truncated do.
    """
    env.reset(seed=seed)
    for number, a in enumerate(actions(env.num_envs, 200)):
        step = env.step(a)
        ended = step[2] | step[3]
        if ended.any() and not ended.all():
            return step, ended, number
        assert not ended.all()
    raise AssertionError("nothing ended")


def test_next_step(tiny_world: Path) -> None:
    env, twin = (make(tiny_world, max_episode_steps=50) for _ in range(2))
    end, ended, count = run_to_an_end(env)
    assert same(run_to_an_end(twin)[0], end)
    row, others = int(np.flatnonzero(ended)[0]), ~ended
    acts = actions(3, 2, 7)
    step = env.step(acts[0])
    # The action of the reset step is ignored ...
    changed = acts[0].copy()
    changed[row] = (changed[row] + 1) % 3
    assert same(twin.step(changed), step)
    # ... its reward is zero, it neither terminates nor truncates, it has no hazard ...
    observation, reward, terminated, truncated, info = step
    assert reward[row] == 0 and not terminated[row] and not truncated[row]
    assert info["_hazard"].tolist() == others.tolist()
    assert (reward[others] != 0).all()
    # ... and it shows the first observation of the next episode, which then goes its own way.
    single = NFDEnv(tiny_world, "cpu", obs_type="latent", precision="fp32")
    single.reset(seed=int(env.np_random_seed[row]))
    assert close(observation[row], single.reset()[0])
    after = env.step(acts[1])
    expected = single.step(acts[1][row])
    assert close(after[0][row], expected[0]) and close(after[1][row], expected[1])
    assert after[4]["_hazard"].all()
    # The row that ended shows its last frame at the end, not the next first one.
    assert not close(end[0][row], observation[row])


def test_next_step_leaves_the_other_rows_alone(tiny_world: Path) -> None:
    env, free = make(tiny_world), make(tiny_world, autoreset_mode=AutoresetMode.SAME_STEP)
    _, ended, count = run_to_an_end(env)
    run_to_an_end(free)
    running = ~ended
    acts = actions(3, 1, 7)
    a, b = env.step(acts[0]), free.step(acts[0])
    assert close(a[0][running], b[0][running]) and close(a[1][running], b[1][running])


def test_same_step(tiny_world: Path) -> None:
    env = make(tiny_world, autoreset_mode=AutoresetMode.SAME_STEP)
    reference = make(tiny_world, autoreset_mode=AutoresetMode.DISABLED)
    step, ended, count = run_to_an_end(env)
    final, expected_ended, expected_count = run_to_an_end(reference)
    assert count == expected_count and np.array_equal(ended, expected_ended)
    observation, reward, terminated, truncated, info = step
    assert same((reward, terminated, truncated), final[1:4])
    assert info["_final_obs"].tolist() == info["_final_info"].tolist() == ended.tolist()
    assert info["final_obs"].dtype == object and info["final_obs"].shape == (3,)
    for row in range(3):
        if ended[row]:
            assert same(info["final_obs"][row], final[0][row])
            assert info["final_info"]["hazard"][row] == final[4]["hazard"][row]
            assert not close(observation[row], final[0][row])
        else:
            assert info["final_obs"][row] is None
            assert same(observation[row], final[0][row])
    for name in ("hazard", "precision"):
        assert info["final_info"][f"_{name}"].tolist() == ended.tolist()
    # What is shown instead is the first observation of the next episode.
    reference.reset(options={"reset_mask": ended})
    acts = actions(3, 5, 7)
    for a in acts:
        left, right = env.step(a), reference.step(a)
        if (right[2] | right[3]).any():
            break
        assert same(left[:4], right[:4])
        assert "final_obs" not in left[4]


def test_disabled(tiny_world: Path) -> None:
    env = make(tiny_world, autoreset_mode=AutoresetMode.DISABLED)
    undisturbed = make(tiny_world, autoreset_mode=AutoresetMode.SAME_STEP)
    end, ended, _ = run_to_an_end(env)
    run_to_an_end(undisturbed)
    row = int(np.flatnonzero(ended)[0])
    acts = actions(3, 1, 7)
    for _ in range(2):  # refusing changes nothing
        with pytest.raises(ResetNeeded, match=f"environment {row} has ended"):
            env.step(acts[0])
    options = {"reset_mask": ended, "start": 1}
    mask = ended.copy()
    observation, info = env.reset(options=options)
    assert options.keys() == {"reset_mask", "start"} and options["reset_mask"] is ended
    assert np.array_equal(ended, mask)
    assert same(observation[~ended], end[0][~ended])
    start = env.world.starts[1].latents[-1].numpy()
    for r in np.flatnonzero(ended):
        assert same(observation[r], start)
    after, expected = env.step(acts[0]), undisturbed.step(acts[0])
    assert close(after[0][~ended], expected[0][~ended])
    assert close(after[1][~ended], expected[1][~ended])


def test_a_masked_reset_takes_seeds_for_its_rows_only(endless_world: Path) -> None:
    env = make(endless_world, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=5)
    play(env, actions(3, 2))
    before = env.save_state()
    mask = np.array([False, True, False])
    env.reset(seed=[100, 200, 300], options={"reset_mask": mask})
    assert env.np_random_seed == (5, 200, 7)
    step = env.step(np.array([0, 1, 2]))
    fresh = make(endless_world, 1)
    fresh.reset(seed=200)
    assert close(step[0][1], fresh.step(np.array([1]))[0][0])
    env.restore_state(before)
    assert same(env.step(np.array([0, 1, 2]))[0][[0, 2]], step[0][[0, 2]])
    # A tensor is a mask too.
    env.reset(options={"reset_mask": torch.tensor([True, True, True])})


@pytest.mark.parametrize("mode", MODES)
def test_truncation(endless_world: Path, mode: AutoresetMode) -> None:
    env = make(endless_world, 2, max_episode_steps=4, autoreset_mode=mode)
    env.reset(seed=0)
    seen = []
    for a in actions(2, 14):
        _, _, terminated, truncated, _ = env.step(a)
        assert not terminated.any() and truncated.all() == truncated.any()
        seen.append(bool(truncated[0]))
        if truncated[0] and mode == AutoresetMode.DISABLED:
            env.reset()
    period = 5 if mode == AutoresetMode.NEXT_STEP else 4  # the reset step does not count
    assert seen == [t % period == 3 for t in range(14)]


def test_steps_are_counted_for_each_row(endless_world: Path) -> None:
    env = make(endless_world, max_episode_steps=4, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    play(env, actions(3, 2))
    env.reset(options={"reset_mask": np.array([False, True, False])})
    play(env, actions(3, 1))
    assert env.step(actions(3, 1)[0])[3].tolist() == [True, False, True]


def test_the_world_says_when_episodes_are_truncated(endless_world: Path) -> None:
    env = make(endless_world)
    assert env.max_episode_steps is None  # the tiny world says never
    assert make(endless_world, max_episode_steps=3).max_episode_steps == 3


@pytest.mark.parametrize("skip, steps", [(1, 10), (4, 3)])
def test_the_worlds_own_limit_is_in_frames(
    endless_world: Path, tmp_path: Path, skip: int, steps: int
) -> None:
    folder = shutil.copytree(endless_world, tmp_path / "limited")
    spec = yaml.safe_load((folder / "world.yaml").read_text())
    (folder / "world.yaml").write_text(yaml.safe_dump({**spec, "max_episode_steps": 10}))
    write_checksums(folder)
    env = make(folder, 1, frame_skip=skip)
    env.reset(seed=0)
    truncated = [bool(step[3][0]) for step in play(env, actions(1, steps))]
    assert truncated == [False] * (steps - 1) + [True]
    assert make(folder, 1, frame_skip=skip, max_episode_steps=20).max_episode_steps == 20


# -------------------------------------------------------------------------------------- frame skip


def test_frame_skip_sums_rewards_and_stops_at_the_end_inside_the_skip(hasty_world: Path) -> None:
    skip, count = 4, 24
    env = make(hasty_world, count, frame_skip=skip, autoreset_mode=AutoresetMode.DISABLED)
    frames = make(hasty_world, count, autoreset_mode=AutoresetMode.SAME_STEP)
    assert same(env.reset(seed=0)[0], frames.reset(seed=0)[0])
    action = actions(count, 1)[0]
    ahead = env.save_state().world
    observation, reward, terminated, _, info = env.step(action)
    expected_reward = np.zeros(count)
    ended = np.zeros(count, bool)
    survival = np.ones(count)
    expected = np.empty_like(observation)
    lengths = np.zeros(count, int)
    for _ in range(skip):
        shown, r, t, _, i = frames.step(action)
        expected_reward += np.where(ended, 0, r)
        # Behind a drawn end too: what the frames there would have said of it.
        encoded = env.world.codec.encode(torch.from_numpy(action))
        hazard = env.model.step(ahead, encoded).hazard.numpy()
        assert close(np.where(ended, 0, i["hazard"]), np.where(ended, 0, hazard))
        survival *= 1 - hazard
        for row in np.flatnonzero(~ended):
            expected[row] = i["final_obs"][row] if t[row] else shown[row]
        lengths += ~ended
        ended |= t
    assert np.array_equal(terminated, ended)
    assert close(reward, expected_reward)
    assert close(info["hazard"], 1 - survival)
    assert close(observation, expected)
    assert set(lengths) == {1, 2, 3, 4}  # ends were met at every place in the skip


@pytest.mark.parametrize("drafts", [1, 2])
def test_hazard_is_the_mean_of_the_ends(hasty_world: Path, drafts: int) -> None:
    """Also where most steps end within a skip, and the rest of it is never seen."""
    count, skip, length = 32, 4, 6
    kwargs: dict[str, Any] = {"frame_skip": skip, "autoreset_mode": AutoresetMode.SAME_STEP}
    env = make(hasty_world, count, speculative_frames=drafts, **kwargs)
    env.reset(seed=0)
    steps = play(env, actions(count, length))
    terminated = np.stack([step[2] for step in steps])
    excess = np.stack([step[4]["hazard"] for step in steps]) - terminated
    assert 0.5 < terminated.mean() < 0.95
    assert abs(excess.mean()) < 4 * excess.std() / excess.size**0.5
    alone = make(hasty_world, 1, speculative_frames=drafts, **kwargs)
    alone.reset(seed=5)
    for step, row in zip(steps, actions(count, length)[:, 5], strict=True):
        own = alone.step([row])
        assert close(own[4]["hazard"][0], step[4]["hazard"][5]) and own[2][0] == step[2][5]


def test_frame_skip_counts_steps_not_frames(endless_world: Path) -> None:
    env = make(endless_world, 1, frame_skip=3, max_episode_steps=2)
    env.reset(seed=0)
    assert [bool(s[3][0]) for s in play(env, actions(1, 2))] == [False, True]
    assert env._now is not None and env._now.world.frame == [2 + 6]


def test_autoreset_with_frame_skip(hasty_world: Path) -> None:
    env = make(hasty_world, frame_skip=3)
    end, ended, _ = run_to_an_end(env, 0)
    step = env.step(actions(3, 1)[0])
    assert (step[1][ended] == 0).all() and not (step[2] | step[3])[ended].any()
    single = NFDEnv(hasty_world, "cpu", obs_type="latent", precision="fp32", frame_skip=3)
    row = int(np.flatnonzero(ended)[0])
    single.reset(seed=int(env.np_random_seed[row]))
    assert close(step[0][row], single.reset()[0])


# ------------------------------------------------------------------------------- interrupted steps


@pytest.mark.parametrize("part", ["heads.step", "tokenizer.decode_frames"])
def test_an_interrupted_step_is_not_gone_on_from(
    hasty_world: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Neither within a pass of the networks nor where an episode has ended and begun anew."""
    env = make(hasty_world, 2, obs_type="rgb", autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    state = env.save_state()
    expected = env.step([1, 2])
    env.restore_state(state)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    name, method = part.split(".")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(getattr(env.model, name), method, interrupted)
        env.step([1, 2])
    for go_on in (lambda: env.step([1, 2]), env.save_state, lambda: env.take([1])):
        with pytest.raises(ResetNeeded, match=r"a step was interrupted: call reset\(\) or"):
            go_on()
    env.reset(options={"reset_mask": np.array([True, False])})
    env.save_state([0])
    with pytest.raises(ResetNeeded, match="a step was interrupted"):
        env.step([1, 2])
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step([1, 2])
    env.restore_state(state)
    assert same(env.step([1, 2]), expected)


# --------------------------------------------------------------------------------- returned values


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
@pytest.mark.parametrize("mode", MODES[:2])
def test_returned_values_belong_to_the_caller(
    hasty_world: Path, output: str, obs_type: str, mode: AutoresetMode
) -> None:
    kwargs = {
        "output": output,
        "obs_type": obs_type,
        "autoreset_mode": mode,
        "render_mode": "rgb_array",
    }
    env, untouched = make(hasty_world, **kwargs), make(hasty_world, **kwargs)
    kept: list[tuple[Any, Any]] = []

    def copied(value: Any) -> list[Any]:
        return [x.clone() if isinstance(x, torch.Tensor) else x.copy() for x in arrays(value)]

    def check(value: Any, expected: Any) -> None:
        assert same(value, expected)
        kept.append((expected, copied(expected)))
        for array in arrays(value):  # the caller scribbles over everything it got
            if isinstance(array, torch.Tensor):
                array.copy_(~array if array.dtype == torch.bool else array + 1)
            else:
                array[:] = ~array if array.dtype == bool else array + 1

    check(env.reset(seed=0), untouched.reset(seed=0))
    for a in actions(3, 8):
        mine = torch.from_numpy(a.copy()) if output == "torch" else a.copy()
        step = env.step(mine)
        mine[:] = 0
        check(step, untouched.step(a))
        check(env.render(), untouched.render())
        check(env.frames(), untouched.frames())
    # And what was handed out earlier has not changed since.
    for value, before in kept:
        assert same(list(arrays(value)), before)


def test_saved_states_belong_to_the_caller(endless_world: Path) -> None:
    env, acts = make(endless_world), actions(3, 6)
    env.reset(seed=0)
    state = env.save_state()
    first = play(env, acts)
    for _ in range(2):
        shown = env.restore_state(state)
        shown[:] = 0
        assert same(play(env, acts), first)


def test_render(tiny_world: Path) -> None:
    env = make(tiny_world, 2, render_mode="rgb_array")
    rgb = make(tiny_world, 2, obs_type="rgb")
    env.reset(seed=0), rgb.reset(seed=0)
    for a in actions(2, 3):
        env.step(a)
        frames = env.render()
        assert isinstance(frames, tuple) and len(frames) == 2
        assert same(np.stack(frames), rgb.step(a)[0])
    silent = make(tiny_world, 2)
    silent.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert silent.render() is None


# ------------------------------------------------------------------------------ saving and forking


def test_a_restored_state_replays_exactly_through_ends(hasty_world: Path) -> None:
    env, acts = make(hasty_world, max_episode_steps=6), actions(3, 14)
    env.reset(seed=0)
    play(env, acts[:4])
    state = env.save_state()
    expected = play(env, acts[4:])
    assert any((s[2] | s[3]).any() for s in expected)
    env.reset(seed=99)
    play(env, acts[:3])
    env.restore_state(state)
    assert same(play(env, acts[4:]), expected)
    # In another env of the same world as well.
    other = make(hasty_world, max_episode_steps=6)
    assert same(other.restore_state(state), env.restore_state(state))
    assert same(play(other, acts[4:]), expected)


def test_saving_leaves_no_trace(hasty_world: Path) -> None:
    env, undisturbed, acts = make(hasty_world), make(hasty_world), actions(3, 8)
    for e in (env, undisturbed):
        e.reset(seed=0)
    for a in acts:
        env.save_state()
        assert same(env.step(a), undisturbed.step(a))


def test_rows_of_a_state(endless_world: Path) -> None:
    env, acts = make(endless_world), actions(3, 3)
    env.reset(seed=0)
    play(env, acts)
    state = env.save_state([2, 0, 2])
    expected = [s[0] for s in play(env, acts)]
    # "What if": the same moment under three actions.
    wide = make(endless_world)
    wide.restore_state(state)
    order = [2, 0, 2]
    for t, a in enumerate(acts):
        assert close(wide.step(a[order])[0], expected[t][order])
    # Into some rows of an env that goes on.
    env.reset(seed=7)
    undisturbed = [s[0] for s in play(env, acts)]
    env.reset(seed=7)
    shown = env.restore_state(state.take([1]), rows=[1])
    assert close(shown[1], state.shown[1].numpy())
    chosen = acts.copy()
    chosen[:, 1] = acts[:, 0]
    for t, a in enumerate(chosen):
        observation = env.step(a)[0]
        assert same(observation[[0, 2]], undisturbed[t][[0, 2]])
        assert close(observation[1], expected[t][0])
    assert env.np_random_seed == (7, 0, 9)


def test_states_that_do_not_fit(endless_world: Path) -> None:
    env = make(endless_world)
    with pytest.raises(ResetNeeded):
        env.save_state()
    env.reset(seed=0)
    state = env.save_state()
    with pytest.raises(ValueError, match="the state has 3 environments, this env has 2"):
        make(endless_world, 2).restore_state(state)
    for rows in ([0], [0, 0, 1]):
        with pytest.raises(ValueError, match="cannot go into"):
            env.restore_state(state, rows)
    with pytest.raises(ResetNeeded):
        make(endless_world).restore_state(state.take([0]), rows=[0])


@pytest.mark.parametrize("rows", [None, [2, 0, 1]])
@pytest.mark.parametrize("kind", ["world", "speculative_frames", "precision"])
def test_a_state_of_something_else_changes_nothing(
    endless_world: Path, make_world: Callable[..., Path], kind: str, rows: list[int] | None
) -> None:
    """Of the same shapes, but for the numbers in it."""
    other_world = make_world(hazard_bias=-1000.0, seed=1) if kind == "world" else endless_world
    changed: dict[str, Any] = {} if kind == "world" else {kind: {"precision": "bf16"}.get(kind, 2)}
    other, env, acts = make(other_world, **changed), make(endless_world), actions(3, 3)
    other.reset(seed=7)
    env.reset(seed=0)
    expected = play(env, acts)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=kind):
        env.restore_state(other.save_state(), rows)
    assert env.np_random_seed == (0, 1, 2)
    assert same(play(env, acts), expected)


def test_states_pass_between_student_and_teacher(distilled_world: Path) -> None:
    student, teacher = make(distilled_world), make(distilled_world, dynamics="teacher")
    student.reset(seed=0)
    teacher.restore_state(student.save_state())
    assert np.isfinite(teacher.step([0, 1, 2])[0]).all()


@pytest.mark.parametrize("rows", [[-1], [3], [0.0], [True], [], 1, None.__class__])
def test_wrong_rows_change_nothing(endless_world: Path, rows: Any) -> None:
    env, acts = make(endless_world), actions(3, 3)
    env.reset(seed=9)
    other = env.save_state([1])
    env.reset(seed=0)
    expected = play(env, acts)
    env.reset(seed=0)
    for wrong in (
        lambda: env.restore_state(other, rows),
        lambda: env.save_state(rows),
        lambda: env.take(rows),
        lambda: env.frames(rows),
    ):
        with pytest.raises(ValueError, match="environment"):
            wrong()
    with pytest.raises(ValueError, match="a state is what save_state"):
        env.restore_state({"frame": 3})  # type: ignore[arg-type]
    assert env.np_random_seed == (0, 1, 2)
    assert same(play(env, acts), expected)


# -------------------------------------------------------------------------------- changed sampling


def test_sampling_changes_in_place(distilled_world: Path) -> None:
    """As in an env that was made with it, from the next step on."""
    acts = actions(3, 4)
    settings: list[dict[str, Any]] = [
        {"sampling_steps": 3},
        {"temperature": 1.5, "history_level": 0.4},
        {"dynamics": "teacher"},
        {"dynamics": "teacher", "sampling_steps": 2},
        {"dynamics": "student", "temperature": 1.0},
    ]
    env = make(distilled_world)
    for changed in settings:
        fresh = make(distilled_world, **changed)
        env = make(distilled_world)
        env.reset(seed=0)
        play(env, acts)
        env.set_sampling(**changed)
        assert same(env.reset(seed=5)[0], fresh.reset(seed=5)[0])
        assert same(play(env, acts), play(fresh, acts))
    env.set_sampling(temperature=2.0)
    assert env.world.model.sampling.temperature == 1.0  # the world keeps its own


def test_a_branch_has_sampling_of_its_own(endless_world: Path) -> None:
    env, undisturbed, acts = make(endless_world), make(endless_world), actions(3, 3)
    env.reset(seed=0), undisturbed.reset(seed=0)
    branch, plain = env.take([1, 1]), env.take([1, 1])
    branch.set_sampling(sampling_steps=4, temperature=1.7)
    left, right = branch.step([1, 2])[0], plain.step([1, 2])[0]
    assert not close(left, right) and np.isfinite(left).all()
    assert same(play(env, acts), play(undisturbed, acts))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling_steps": 0}, "sampling_steps"),
        ({"sampling_steps": 10**9}, "sampling_steps must be at most 1000"),
        ({"temperature": "x"}, "temperature must be a number, got 'x'"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"history_level": [1]}, "history_level must be a number"),
        ({"dynamics": "teacher"}, "has: flow"),
        ({"dynamics": 3}, "dynamics must be one of"),
    ],
)
def test_wrong_sampling_changes_nothing(
    endless_world: Path, changed: dict[str, Any], message: str
) -> None:
    env, undisturbed, acts = make(endless_world), make(endless_world), actions(3, 3)
    env.reset(seed=0), undisturbed.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.set_sampling(**{"sampling_steps": 3, **changed})
    with pytest.raises(ValueError, match=message):
        make(endless_world, **changed)
    assert same(play(env, acts), play(undisturbed, acts))


# ------------------------------------------------------------------------------ starts and context


def frames_and_actions(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "frames": rng.integers(0, 256, (count, 32, 48, 3), np.uint8),
        "actions": rng.integers(0, 3, count - 1),
    }


def test_start_option(endless_world: Path) -> None:
    env = make(endless_world)
    for number in (0, 5):
        observation, _ = env.reset(seed=0, options={"start": number})
        expected = env.world.starts[number].latents[-1].numpy()
        assert all(same(row, expected) for row in observation)
    step = env.step(np.zeros(3, int))
    assert not close(step[0][0], step[0][1])  # each has its own noise


@pytest.mark.parametrize("count", [1, 2, 5, 14])
def test_context_option(endless_world: Path, count: int) -> None:
    env = make(endless_world)
    context = frames_and_actions(count)
    given = {k: v.copy() for k, v in context.items()}
    observation, _ = env.reset(seed=0, options={"context": context})
    assert same(context, given)
    latent = env.model.encode(torch.from_numpy(context["frames"][-1:].copy()))[0].numpy()
    assert all(close(row, latent) for row in observation)
    acts = actions(3, 3)
    first = play(env, acts)
    env.reset(seed=0, options={"context": context})
    assert same(play(env, acts), first)
    # Of a longer context, frames depend on the last ones; rewards and ends may remember the others.
    reach = env.model.dynamics.config.window
    changed = {k: v.copy() for k, v in context.items()}
    if count > reach:
        changed["frames"][0] = 0
        changed["actions"][0] = (changed["actions"][0] + 1) % 3
        if count - reach > 1:
            env.reset(seed=0, options={"context": changed})
            for step, other in zip(play(env, acts), first, strict=True):
                assert same(step[0], other[0])
                assert not np.array_equal(step[1], other[1])
    elif count > 1:
        changed["actions"][0] = (changed["actions"][0] + 1) % 3
        env.reset(seed=0, options={"context": changed})
        assert not close(play(env, acts)[0][0], first[0][0])


def test_continuing_from_a_context_equals_having_played_it(endless_world: Path) -> None:
    """The actions of a context lead into its frames as those of steps do."""
    env = make(endless_world, 1)
    context = frames_and_actions(4)
    env.reset(seed=3, options={"context": context})
    assert env._now is not None
    into = env._now.world.action[0, 0]
    assert into.tolist() == np.eye(3)[context["actions"][-1]].tolist()


def test_a_context_for_each_environment(endless_world: Path) -> None:
    env, acts = make(endless_world), actions(3, 3)
    one, other = frames_and_actions(3, 1), frames_and_actions(1, 2)
    del other["actions"]  # one frame needs none
    env.reset(seed=0, options={"context": [one, None, other]})
    mixed = play(env, acts)
    for slot, context in ((0, one), (1, None), (2, other)):
        single = make(endless_world, 1)
        single.reset(seed=slot, options={"context": context})
        for t, a in enumerate(acts[:, [slot]]):
            assert close(single.step(a)[0][0], mixed[t][0][slot])


def test_the_next_episode_begins_at_a_recorded_start_again(endless_world: Path) -> None:
    env = make(endless_world, 1, max_episode_steps=1)
    env.reset(seed=0, options={"context": frames_and_actions(2)})
    env.step([0])
    observation = env.step([0])[0][0]
    assert any(same(observation, s.latents[-1].numpy()) for s in env.world.starts)


GOOD = frames_and_actions(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (5, "options must be a dict of context, start, reset_mask, got 5"),
        ({3: GOOD, "start": 1}, "unknown reset option 3"),
        ({"context": {"frames": [[1], [1, 2]]}}, "frames must be an array"),
        ({"contxt": GOOD}, "unknown reset option 'contxt'"),
        ({"context": GOOD, "start": 0}, "either.*not both"),
        ({"start": 6}, 'start must be from 0 to 5 or "beginning", got 6'),
        ({"start": -1}, "start must be from 0 to 5"),
        ({"start": "first"}, "start must be from 0 to 5 or \"beginning\", got 'first'"),
        ({"start": "beginning", "context": GOOD}, "either.*not both"),
        ({"start": 1.5}, "start must be"),
        ({"context": [GOOD, GOOD]}, "one entry per environment, got 2 for 3"),
        ({"context": 7}, "context"),
        ({"context": [7, 7, 7]}, "a context is"),
        ({"context": {"actions": [0]}}, "a context is"),
        ({"context": {**GOOD, "frames": GOOD["frames"][:, :16]}}, r"shape \(T, 32, 48, 3\)"),
        ({"context": {**GOOD, "frames": GOOD["frames"][..., :1]}}, r"shape \(T, 32, 48, 3\)"),
        ({"context": {**GOOD, "frames": GOOD["frames"][0]}}, r"shape \(T, 32, 48, 3\)"),
        ({"context": {"frames": GOOD["frames"][:0]}}, "T >= 1"),
        ({"context": {**GOOD, "frames": GOOD["frames"] / 255.0}}, "must be uint8, got float64"),
        ({"context": {**GOOD, "actions": [0]}}, "3 context frames need 2 actions.*got 1"),
        ({"context": {"frames": GOOD["frames"]}}, "need 2 actions.*got 0"),
        ({"context": {**GOOD, "actions": [0, 3]}}, "got 3"),
        ({"context": {**GOOD, "actions": [0.0, 1.0]}}, "integers"),
        ({"context": {**GOOD, "actions": [[0], [1]]}}, "shape"),
        ({"context": {**GOOD, "actions": None}}, "actions"),
        ({"reset_mask": np.array([True, False])}, r"shape \(3,\)"),
        ({"reset_mask": np.array([1, 0, 0])}, "bool array"),
        ({"reset_mask": np.zeros(3, bool)}, "selects no environment"),
    ],
)
def test_wrong_reset_options_change_nothing(
    endless_world: Path, options: dict[str, Any], message: str
) -> None:
    env, acts = make(endless_world), actions(3, 2)
    env.reset(seed=0)
    expected = play(env, acts)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=50, options=options)
    assert env.np_random_seed == (0, 1, 2)
    assert same(play(env, acts), expected)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1, 2], "2 seeds were given for 3"),
        (-1, "negative"),
        ([1, 2, -3], "negative"),
        (1.5, "seed"),
        ("7", "seed"),
        ([1.5, 2, 3], "seed"),
    ],
)
def test_wrong_seeds(endless_world: Path, seed: Any, message: str) -> None:
    env = make(endless_world)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=seed)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (np.array([True, False, True]), ResetNeeded),
        (np.ones(5, bool), ValueError),
        (np.zeros(3, bool), ValueError),
    ],
)
def test_the_first_reset_is_of_every_environment(
    endless_world: Path, mask: np.ndarray, error: type[Exception]
) -> None:
    env = make(endless_world)
    with pytest.raises(error):
        env.reset(options={"reset_mask": mask})
    env.reset(options={"reset_mask": np.ones(3, bool)})


# --------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs must be a whole number of at least 1, got 0"),
        ({"num_envs": -2}, "num_envs"),
        ({"num_envs": 1.5}, "num_envs"),
        ({"num_envs": "2"}, "num_envs"),
        ({"frame_skip": 0}, "frame_skip"),
        ({"frame_skip": 2.0}, "frame_skip"),
        ({"context_observations": -1}, "context_observations must be a whole number of at least 0"),
        ({"context_observations": 1.0}, "context_observations"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"max_episode_steps": -1}, "max_episode_steps"),
        ({"sampling_steps": 0}, "sampling_steps"),
        ({"sampling_steps": 1.5}, "sampling_steps"),
        ({"obs_type": "pixels"}, "obs_type must be one of rgb, latent, features, got 'pixels'"),
        ({"output": "jax"}, "output must be one of numpy, torch"),
        ({"render_mode": "human"}, "render_mode must be one of"),
        ({"autoreset_mode": "Sometimes"}, "autoreset_mode must be one of"),
        ({"precision": "fp64"}, "precision must be"),
        ({"num_envs": True}, "num_envs must be a whole number"),
        ({"num_envs": 10**9}, "num_envs=1000000000 needs .* GiB"),
        ({"frame_skip": 10**9}, "frame_skip must be at most"),
        ({"context_observations": 10**9}, "context_observations must be at most 4096"),
        ({"temperature": "x"}, "temperature must be a number, got 'x'"),
        ({"history_level": None.__class__}, "history_level must be a number"),
        ({"ood": 1}, "ood must be True or False"),
        ({"starts": 5}, "starts must be a file or a sequence of Contexts, got 5"),
        ({"device": 3}, "device must be auto"),
        ({"world": 5}, "world must be a folder or the name of a world, got 5"),
        ({"world": "NoSuchWorld"}, "unknown world 'NoSuchWorld'"),
    ],
)
def test_wrong_arguments(tiny_world: Path, kwargs: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"world": tiny_world, "device": "cpu", **kwargs}
    with pytest.raises(ValueError, match=message):
        NFDVectorEnv(**values)


def test_a_device_that_is_not_there(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        NFDVectorEnv(tiny_world, device="cuda")


@pytest.mark.parametrize("mode", MODES)
def test_autoreset_mode_by_name(tiny_world: Path, mode: AutoresetMode) -> None:
    assert make(tiny_world, autoreset_mode=mode.value).autoreset_mode is mode


def test_sampling_steps(endless_world: Path) -> None:
    env, other = make(endless_world, 1), make(endless_world, 1, sampling_steps=5)
    assert (env.sampling.steps, other.sampling.steps) == (2, 5)
    env.reset(seed=0), other.reset(seed=0)
    assert not same(env.step([0])[0], other.step([0])[0])
    assert other.model.dynamics is env.model.dynamics  # the weights are shared


def test_student_or_teacher(distilled_world: Path) -> None:
    student, teacher = (make(distilled_world, dynamics=d) for d in ("student", "teacher"))
    default = make(distilled_world)
    seen = []
    for env in (student, teacher, default):
        env.reset(seed=0)
        seen.append(env.step([0, 1, 2])[0])
    assert (student.sampling.steps, teacher.sampling.steps) == (1, 3)
    assert np.array_equal(seen[0], seen[2]) and not close(seen[0], seen[1])
    assert make(distilled_world, dynamics="teacher", sampling_steps=7).sampling.steps == 7
    assert NFDEnv(distilled_world, dynamics="teacher").vector.world.dynamics == "teacher"


def test_before_the_first_reset(tiny_world: Path) -> None:
    env = make(tiny_world, render_mode="rgb_array")
    for call in (lambda: env.step([0, 0, 0]), env.render, env.save_state):
        with pytest.raises(ResetNeeded):
            call()


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 3], [0.0, 1.0, 2.0], 1, None, [[0], [1], [2]]])
def test_wrong_actions_change_nothing(endless_world: Path, wrong: Any) -> None:
    env, acts = make(endless_world), actions(3, 2)
    env.reset(seed=0)
    expected = play(env, acts)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        env.step(wrong)
    assert same(play(env, acts), expected)


# ------------------------------------------------------------------------------------ the long run


def test_three_hundred_steps_in_flat_memory(tiny_world: Path) -> None:
    env = make(tiny_world, 2, obs_type="rgb", max_episode_steps=25)
    env.reset(seed=0)
    ends = 0

    def tensor_bytes() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(t.numel() * t.element_size() for t in tensors)

    sizes = []
    for t, a in enumerate(actions(2, 300)):
        observation, reward, terminated, truncated, _ = env.step(a)
        ends += int((terminated | truncated).sum())
        assert np.isfinite(reward).all()
        if t in (60, 299):
            sizes.append(tensor_bytes())
    assert ends > 20
    assert sizes[1] <= sizes[0] + 1024
    assert observation in env.observation_space


def test_a_long_episode_stays_finite(endless_world: Path) -> None:
    env = make(endless_world, 1)
    env.reset(seed=0)
    steps = play(env, actions(1, 150))
    assert env._now is not None and env._now.world.frame == [2 + 150]
    shown = np.stack([s[0] for s in steps])
    assert np.isfinite(shown).all()
    assert len({x.tobytes() for x in shown}) == 150


def test_some_of_the_environments_go_on(hasty_world: Path) -> None:
    kwargs: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "obs_type": "rgb"}
    env, acts = make(hasty_world, **kwargs), actions(3, 12)
    env.reset(seed=0)
    play(env, acts[:3])
    taken = env.take([2, 0])
    assert taken.num_envs == 2 and taken.observation_space.shape == (2, 32, 48, 3)
    assert same(taken.frames([1]), env.frames([0]))
    whole, some = play(env, acts[3:]), play(taken, acts[3:][:, [2, 0]])
    for left, right in zip(whole, some, strict=True):
        assert np.abs(left[0][[2, 0]].astype(int) - right[0]).max() <= 1
        assert close(left[1][[2, 0]], right[1]) and np.array_equal(left[2][[2, 0]], right[2])


# ----------------------------------------------------------------------------------- given starts


def other_starts(count: int = 9, frames: int = 4, width: int = 3) -> list[Context]:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn((count, frames, 4, 4, 6), generator=generator).half()
    return [Context(x, torch.zeros(frames, width), i == 2) for i, x in enumerate(latents)]


@pytest.mark.parametrize("kind", ["contexts", "file"])
def test_episodes_start_from_given_moments(hasty_world: Path, tmp_path: Path, kind: str) -> None:
    given: Any = other_starts()
    known = [c.latents[-1].float().numpy() for c in given]
    if kind == "file":
        save_starts(tmp_path / "starts.safetensors", given)
        given = tmp_path / "starts.safetensors"
    env = make(hasty_world, starts=given, autoreset_mode=AutoresetMode.SAME_STEP)
    assert all(start.latents.dtype == torch.float16 for start in env.starts)
    first, _ = env.reset(seed=0)
    seen = [first]
    for acts in actions(3, 40):
        observation, _, terminated, *_ = env.step(acts)
        seen.append(observation[terminated])
    numbers = [[same(row, k) for k in known].index(True) for row in np.concatenate(seen)]
    assert len(set(numbers)) > 5
    again, _ = make(hasty_world, starts=given).reset(seed=0)
    assert same(again, first)
    alone, _ = NFDEnv(
        hasty_world, device="cpu", precision="fp32", obs_type="latent", starts=given
    ).reset(seed=1)
    assert same(alone, first[1])
    beginning, _ = env.reset(options={"start": "beginning"})
    assert all(same(row, known[2]) for row in beginning)
    numbered, _ = env.reset(options={"start": 8})
    assert all(same(row, known[8]) for row in numbered)
    with pytest.raises(ValueError, match="from 0 to 8"):
        env.reset(options={"start": 9})


@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
@pytest.mark.parametrize("mode", MODES)
def test_what_came_before_an_episode(hasty_world: Path, mode: AutoresetMode, obs_type: str) -> None:
    arguments: dict[str, Any] = {"obs_type": obs_type, "autoreset_mode": mode, "frame_skip": 2}
    given = [
        replace(start, latents=start.latents[number % 4 :], actions=start.actions[number % 4 :])
        for number, start in enumerate(other_starts(frames=7))
    ]
    env = make(hasty_world, starts=given, context_observations=3, **arguments)
    plain = make(hasty_world, starts=given, **arguments)

    def check(infos: dict[str, Any], observation: Any, begun: np.ndarray) -> None:
        assert same(infos["_context"], begun)
        context = infos["context"]
        assert context.dtype == observation.dtype and context.shape == (3, 3, *observation[0].shape)
        assert not context[~begun].any()
        for row in np.flatnonzero(begun):
            seen = observation[row]  # features begin with the latents
            start = given[numbers[str((seen[:96] if obs_type == "features" else seen).tobytes())]]
            count = len(start.latents)
            places = [max(0, count - 1 - 2 * back) for back in (3, 2, 1)]
            expected = start.latents[places].float()
            if obs_type == "rgb":
                expected = env.model.decode(expected)
            elif obs_type == "features":
                expected = env.model.features_along(start)[places]
            assert close(context[row], expected.numpy())

    shown = [s.latents[-1:].float() for s in given]
    if obs_type == "rgb":
        shown = [env.model.decode(s) for s in shown]
    numbers = {str(s[0].numpy().tobytes()): number for number, s in enumerate(shown)}
    assert len({len(s.latents) for s in given}) > 1
    (observation, infos), (same_one, nothing) = env.reset(seed=0), plain.reset(seed=0)
    assert same(observation, same_one) and "context" not in nothing
    check(infos, observation, np.ones(3, bool))
    waiting, begun = np.zeros(3, bool), 0
    for acts in actions(3, 20):
        observation, *rest, infos = env.step(acts)
        same_one, *same_rest, same_infos = plain.step(acts)
        ended = rest[1] | rest[2]
        resets = ended if mode == AutoresetMode.SAME_STEP else waiting
        if mode == AutoresetMode.DISABLED and ended.any():
            observation, infos = env.reset(options={"reset_mask": ended})
            same_one, _ = plain.reset(options={"reset_mask": ended})
            check(infos, observation, ended)
        elif mode != AutoresetMode.DISABLED and resets.any():
            check(infos, observation, resets)
            begun += int(resets.sum())
        else:
            assert infos.keys() == same_infos.keys() | {"context", "_context"}
            check(infos, observation, np.zeros(3, bool))
        assert same(observation, same_one) and same(rest, same_rest)
        waiting = ended
    assert begun > 3 or mode == AutoresetMode.DISABLED


def test_what_came_before_frames_of_the_callers_own(endless_world: Path) -> None:
    env = make(endless_world, context_observations=9, frame_skip=3, output="torch")
    reach = env.model.dynamics.config.window
    given = frames_and_actions(40)
    assert reach < 9 * 3
    observation, infos = env.reset(seed=0, options={"context": given})
    latents = env.model.encode(torch.from_numpy(given["frames"][39 - 27 :: 3].copy()))
    for row in range(3):
        torch.testing.assert_close(infos["context"][row], latents[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(observation[row], latents[-1], rtol=1e-4, atol=1e-4)
    alone = NFDEnv(
        endless_world,
        device="cpu",
        precision="fp32",
        obs_type="latent",
        context_observations=9,
        frame_skip=3,
    )
    _, info = alone.reset(seed=0, options={"context": given})
    assert info.keys() == {"hazard", "precision", "context"}
    assert close(info["context"], infos["context"][0].numpy())
    # What is reported changes nothing in the world.
    plain = make(endless_world, frame_skip=3, output="torch")
    plain.reset(seed=0, options={"context": given})
    assert same(*([step[:4] for step in play(e, actions(3, 4))] for e in (env, plain)))


def test_given_moments_through_gymnasium(tiny_world: Path) -> None:
    given = other_starts()
    kwargs: dict[str, Any] = {"world": str(tiny_world), "device": "cpu", "obs_type": "latent"}
    env = gymnasium.make("NFD/World-v0", starts=given, **kwargs)
    batch: Any = gymnasium.make_vec("NFD/World-v0", num_envs=2, starts=given, **kwargs)
    assert same(env.reset(seed=4)[0], batch.reset(seed=4)[0][0])
    assert len(batch.unwrapped.starts) == 9


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ([], ValueError, "at least one recorded moment"),
        ([3], ValueError, "a file or Contexts, got 3"),
        ([Context(torch.full((2, 4, 4, 6), torch.nan), torch.zeros(2, 3))], ValueError, "NaN"),
        ([Context(torch.zeros(2, 4, 4, 6), torch.full((2, 3), torch.inf))], ValueError, "infinity"),
        ([Context([1], [2])], ValueError, "tensors"),  # type: ignore[arg-type]
        (other_starts(width=2), ValueError, r"start 0 does not fit .*actions \(K, 3\)"),
        ([Context(torch.zeros(2, 4, 4, 5), torch.zeros(2, 3))], ValueError, "start 0 does not fit"),
        ([Context(torch.zeros(0, 4, 4, 6), torch.zeros(0, 3))], ValueError, "K >= 1"),
        ("nowhere.safetensors", CheckpointError, "nowhere.safetensors: missing or damaged"),
    ],
)
def test_starts_that_do_not_fit(
    tiny_world: Path, starts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(tiny_world, starts=starts)


def test_a_file_of_starts_of_another_world(tiny_world: Path, tmp_path: Path) -> None:
    save_starts(tmp_path / "starts.safetensors", other_starts(width=5))
    with pytest.raises(CheckpointError, match="start frames of another world"):
        make(tiny_world, starts=tmp_path / "starts.safetensors")


class CountOperations(TorchDispatchMode):
    """Counts torch's operations outside the transformer."""

    def __init__(self, dynamics: Any) -> None:
        super().__init__()
        self.count, self.inside, self._stream = 0, False, dynamics.stream
        dynamics.stream = self.stream

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        self.inside = True
        try:
            return self._stream(*args, **kwargs)
        finally:
            self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self.inside
        return func(*args, **(kwargs or {}))


def test_a_step_takes_few_operations_beside_the_transformers(endless_world: Path) -> None:
    """Each costs some microseconds, however small the batch: more of them are a slower env."""
    env = NFDVectorEnv(endless_world, 1, "cpu", obs_type="latent", precision="fp32")
    env.reset(seed=0)
    env.step([0])
    counted = CountOperations(env.model.dynamics)
    try:
        with counted:
            env.step([1])
    finally:
        del env.model.dynamics.stream
    assert counted.count <= 167  # 153 with torch 2.13


def test_a_share_has_the_seeds_of_its_slots_in_the_whole(make_world: Callable[..., Path]) -> None:
    world, actions = make_world(), np.array([0, 1, 2, 1, 0, 2])

    def played(shares: int) -> np.ndarray:
        """First frames and two steps of six slots, in so many shares."""
        parts = []
        for number, mine in enumerate(np.split(actions, shares)):
            env = SlotShare(NFDVectorEnv(world, len(mine)), first=7)
            first, _ = env.reset(seed=7 + number)  # as libraries seed their processes
            parts.append(np.stack([first, *(env.step(mine)[0] for _ in range(2))], 1))
            begin = 7 + number * len(mine)
            assert [*env.unwrapped.np_random_seed] == list(range(begin, begin + len(mine)))
            env.reset(seed=[3] * len(mine))
            assert set(env.unwrapped.np_random_seed) == {3}
        return np.concatenate(parts)

    whole = played(1).astype(int)
    assert len({frames.tobytes() for frames in whole}) > 1
    for shares in (2, 3):
        assert np.abs(played(shares) - whole).max() <= 1
