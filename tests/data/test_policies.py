from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from nfd_env.data.policies import Mistaken, RandomHeld, make_policy
from tests.counter_env import AlwaysRight, CounterEnv

ENV = CounterEnv()
FRAME = np.zeros((4, 4, 3), np.uint8)


def actions_of(policy, count: int = 400, seed: int = 0) -> list[int]:
    policy.reset(ENV, np.random.default_rng(seed))
    return [int(policy.act(FRAME)) for _ in range(count)]


def test_random_held_holds_keys() -> None:
    actions = actions_of(RandomHeld(4, 4))
    assert all(len(set(actions[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert set(actions) == {0, 1, 2}
    changes = np.flatnonzero(np.diff(actions_of(RandomHeld(2, 9))))
    assert np.diff(changes).min() >= 2
    assert np.diff(changes).max() > 4


def test_random_held_depends_on_the_seed_alone() -> None:
    policy = RandomHeld(1, 3)
    first = actions_of(policy, seed=3)
    assert actions_of(policy, seed=4) != first
    assert actions_of(policy, seed=3) == first
    assert actions_of(RandomHeld(1, 3), seed=3) == first


class Fixed:
    def reset(self, env, rng) -> None: ...

    def act(self, observation) -> int:
        return 1


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.02, 0.02, 0.4), (1.0, 0.5, 1)])
def test_mistakes(rate: float, low: float, high: float) -> None:
    wrong = np.mean(np.array(actions_of(Mistaken(Fixed(), rate), 3000)) != 1)
    assert low <= wrong <= high


def test_make_policy() -> None:
    assert isinstance(make_policy("random_held", {"low": 2, "high": 3}), RandomHeld)
    assert isinstance(make_policy("tests.counter_env:AlwaysRight", {}), AlwaysRight)
    assert isinstance(make_policy("random_held", {}, 0.1), Mistaken)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ranodm", {}, "unknown policy 'ranodm'; known: random_held, sb3"),
        ("random_held", {"lo": 1}, "random_held.*lo"),
        ("random_held", {"low": 0}, "hold lengths"),
        ("random_held", {"low": 5, "high": 4}, "hold lengths"),
        ("no_such_module:Policy", {}, "cannot be imported"),
        ("tests.counter_env:NoSuchClass", {}, "cannot be imported"),
        ("os:getcwd", {}, "'os:getcwd' is none: what it makes, '.*', has no reset"),
    ],
)
def test_wrong_policies(name: str, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, kwargs)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_mistakes_are_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        Mistaken(Fixed(), rate)


def test_a_saved_sb3_agent_plays(tmp_path: Path) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    agent = stable_baselines3.A2C(
        "MlpPolicy", TimeLimit(CounterEnv(), 5), device="cpu", policy_kwargs={"net_arch": [4]}
    )
    agent.save(tmp_path / "agent")
    policy = make_policy(
        "sb3", {"path": str(tmp_path / "agent.zip"), "algorithm": "A2C", "trust": True}
    )
    env = CounterEnv()
    policy.reset(env, np.random.default_rng(0))
    observation, _ = env.reset(seed=0)
    actions = [policy.act(observation) for _ in range(20)]
    assert all(env.action_space.contains(a) for a in actions)
    assert len(set(map(int, actions))) > 1  # a fresh agent's play is random
