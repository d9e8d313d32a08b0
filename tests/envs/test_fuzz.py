"""Nonsense in every argument: one clear error of a documented type, or success, and no trace."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nfd_env.devices import DeviceError
from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.state import Context
from nfd_env.models.weights import CheckpointError
from tests.envs.test_vector_env import same

DOCUMENTED = ValueError, CheckpointError, DeviceError, gymnasium.error.ResetNeeded
COUNT = 2

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 5),
    st.sampled_from([10**400, -(10**400)]),  # beyond floats
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.builds(object),
)

arrays = hnp.arrays(
    st.one_of(hnp.scalar_dtypes(), st.just(np.dtype(object))),
    hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
)
tensors = st.sampled_from(
    [
        torch.zeros(COUNT),
        torch.ones(COUNT, dtype=torch.bool),
        torch.zeros(COUNT, dtype=torch.complex64),
        torch.tensor([1, 2], dtype=torch.int16),
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.zeros(COUNT, dtype=torch.int64, device="meta"),
        torch.zeros(COUNT, dtype=torch.int64).to_sparse(),
    ]
)
nonsense = st.recursive(
    st.one_of(plain, arrays, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=2),
    ),
    max_leaves=4,
)
frames = st.one_of(
    hnp.arrays(np.uint8, st.sampled_from([(1, 32, 48, 3), (3, 32, 48, 3), (0, 32, 48, 3), (2, 3)])),
    nonsense,
)
context = st.one_of(
    nonsense,
    st.fixed_dictionaries({"frames": frames}, optional={"actions": nonsense, "more": plain}),
)
options = st.one_of(
    nonsense,
    st.fixed_dictionaries(
        {},
        optional={
            "context": st.one_of(context, st.lists(context, min_size=COUNT, max_size=COUNT)),
            "start": st.one_of(st.just("beginning"), st.integers(-1, 7), nonsense),
            "reset_mask": st.one_of(hnp.arrays(bool, (COUNT,)), nonsense),
        },
    ),
)
actions = st.one_of(
    nonsense,
    hnp.arrays(st.sampled_from([np.int64, np.int8, np.uint64, np.float32, bool]), (COUNT,)),
    st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT),
)
seeds = st.one_of(nonsense, st.lists(st.one_of(st.none(), st.integers(0, 2**70))))
arguments = st.dictionaries(
    st.sampled_from(
        "sampling_steps frame_skip obs_type output autoreset_mode max_episode_steps render_mode "
        "precision history_level temperature ood context_observations speculative_frames dynamics "
        "starts device world num_envs".split()
    ),
    st.one_of(nonsense, st.just(10**9)),
    min_size=1,
    max_size=2,
)


@functools.cache
def pair(world: Path) -> tuple[NFDVectorEnv, NFDVectorEnv]:
    """An env and its untouched twin."""
    kwargs: dict[str, Any] = {"device": "cpu", "precision": "fp32", "obs_type": "latent"}
    return NFDVectorEnv(world, COUNT, **kwargs), NFDVectorEnv(world, COUNT, **kwargs)


def rollout(env: NFDVectorEnv) -> list[Any]:
    return [env.step(action) for action in ([0, 1], [2, 0])]


def begun_anew(world: Path) -> list[Any]:
    env, _ = pair(world)
    return [env.reset(seed=3), *rollout(env), torch.get_default_dtype(), torch.get_num_threads()]


def agree(env: NFDVectorEnv, twin: NFDVectorEnv, method: str, *args: Any, **kwargs: Any) -> None:
    """What ``method`` refuses leaves no trace; what it takes, it takes twice in the same way."""
    for each in (env, twin):
        each.reset(seed=3)
        each.step([1, 1])
    try:
        made = getattr(env, method)(*args, **kwargs)
    except DOCUMENTED as error:
        assert str(error) and "\n" not in str(error)
    else:
        other = getattr(twin, method)(*args, **kwargs)
        if method != "reset" or env.np_random_seed == twin.np_random_seed:
            assert same(made, other)
    assert same(rollout(env), rollout(twin))


@given(action=actions)
@example(action=torch.zeros(COUNT, dtype=torch.int64, device="meta"))
@example(action=np.array([0, 2**64 - 1], np.uint64))
@example(action=np.array([None, 1], object))
def test_steps(endless_world: Path, action: Any) -> None:
    agree(*pair(endless_world), "step", action)


@given(given=options)
@example(given=5)
@example(given={"reset_mask": torch.ones(COUNT, dtype=torch.bool, device="meta")})
@example(given={"context": {"frames": [[1], [1, 2]]}})
@example(given={"context": "frames"})
def test_reset_options(endless_world: Path, given: Any) -> None:
    agree(*pair(endless_world), "reset", options=given)


@given(seed=seeds)
@example(seed=2**64)
@example(seed=-(10**5000))
@example(seed=torch.tensor([1, 2], device="meta"))
def test_seeds(endless_world: Path, seed: Any) -> None:
    if seed is not None:
        agree(*pair(endless_world), "reset", seed=seed)


@given(rows=nonsense)
@example(rows=[-1, 0])
@example(rows=[0, 0])
@example(rows=[1, COUNT])
def test_rows_of_states(endless_world: Path, rows: Any) -> None:
    env, twin = pair(endless_world)
    env.reset(seed=8)
    agree(env, twin, "restore_state", env.save_state(), rows)
    agree(env, twin, "frames", rows)


@given(values=st.lists(nonsense, max_size=4))
@example(values=[None, "x"])
@example(values=[10**9])
def test_sampling(endless_world: Path, values: list[Any]) -> None:
    env, twin = pair(endless_world)
    agree(env, twin, "set_sampling", *values)
    for each in pair(endless_world):
        each.set_sampling(2, 0.15, 1.0)


NAN = Context(torch.full((1, 4, 4, 6), torch.nan), torch.zeros(1, 3))


@given(changed=arguments)
@example(changed={"temperature": "x"})
@example(changed={"starts": 5})
@example(changed={"starts": [NAN]})
@example(changed={"context_observations": 10**9})
@example(changed={"num_envs": 10**9})
@example(changed={"sampling_steps": 10**9})
@example(changed={"frame_skip": 10**9})
@example(changed={"num_envs": 10**5000})
@example(changed={"temperature": 10**400})
@example(changed={"num_envs": True})
@example(changed={"device": 3})
@example(changed={"dynamics": 7})
@example(changed={"precision": None})
@example(changed={"autoreset_mode": [1]})
def test_arguments(endless_world: Path, changed: dict[str, Any]) -> None:
    values = {"world": endless_world, "num_envs": 1, "device": "cpu", "precision": "fp32"}
    before = begun_anew(endless_world)
    try:
        env = NFDVectorEnv(**{**values, **changed})
    except DOCUMENTED as error:
        assert str(error) and "\n" not in str(error)
    else:
        twin = NFDVectorEnv(**{**values, **changed})
        assert same(env.reset(seed=3), twin.reset(seed=3))
        env.close()
        twin.close()
    # What is shared, the networks and torch's settings, is as it was.
    assert same(begun_anew(endless_world), before)


@given(name=st.text(min_size=1, max_size=20), value=plain)
@example(name="sampling_step", value=2)
@example(name="num_envs", value=2)
def test_unknown_arguments(endless_world: Path, name: str, value: Any) -> None:
    try:
        NFDEnv(endless_world, "cpu", **{name: value})
    except TypeError as error:
        assert repr(name) in str(error)
    except DOCUMENTED:
        pass
