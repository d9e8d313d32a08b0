"""Arguments that the wrappers refuse; what they do is tested beside the envs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.envs.wrappers import GuardConfig, GuardOOD, GuardOODVector, SlotShare

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("truncate", ["no", "x", 1, 0, None])
def test_only_a_bool_says_whether_to_truncate(tiny_world: Path, truncate: Any) -> None:
    env = NFDVectorEnv(tiny_world, 2, **CPU)
    with pytest.raises(ValueError, match="truncate must be True or False"):
        GuardOODVector(env, truncate=truncate)
    with pytest.raises(ValueError, match="truncate must be True or False"):
        GuardConfig(truncate=truncate)  # at once, not when something is put around an env
    single = gymnasium.make("NFD/World-v0", world=tiny_world, **CPU)
    with pytest.raises(ValueError, match="truncate must be True or False"):
        GuardOOD(single, truncate=truncate)
    env.reset(seed=0)
    assert "ood" not in env.step(np.zeros(2, int))[4]  # the env is as it was
    numpys: Any = np.bool_(True)
    GuardOODVector(env, truncate=numpys)


def test_a_guard_leaves_the_limits_of_others(tiny_world: Path) -> None:
    env = NFDVectorEnv(tiny_world, 1, **CPU)
    limits = []
    env.watch_ood(3.0)
    for guard in ({}, {"threshold": 2.5, "truncate": True}, {"penalty": 1.0}, {"truncate": True}):
        GuardOODVector(env, **guard)
        limits.append(env._ood_limit)
    GuardOODVector(env, threshold=2.9, truncate=True)
    assert [*limits, env._ood_limit] == [3.0, 2.5, 2.5, 2.0, 2.0]


@pytest.mark.parametrize("first", ["x", None, True, -5, 1.0])
def test_a_share_needs_a_seed(tiny_world: Path, first: Any) -> None:
    env = NFDVectorEnv(tiny_world, 2, **CPU)
    with pytest.raises(ValueError, match="first must be a whole number of at least 0"):
        SlotShare(env, first)
    numpys: Any = np.int64(3)
    assert SlotShare(env, numpys).first == 3
