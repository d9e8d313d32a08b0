from __future__ import annotations

import numpy as np
import pytest

from agents.defend_the_line_turret import Turret
from nfd_env.data.policies import make_policy
from nfd_env.sources.source import SourceConfig, make_source


def played(policy: str, seed: int, frames: int) -> tuple[float, int]:
    """Return and length of an episode of ``VizdoomDefendLine-v1``."""
    source = SourceConfig(
        "VizdoomDefendLine-v1", ["vizdoom.gymnasium_wrapper"], frames="observation", key="screen"
    )
    env = make_source(source, **Turret.real_kwargs)
    player = make_policy(policy, {})
    frame, _ = env.reset(seed=seed)
    player.reset(env, np.random.default_rng(seed))
    total, count, ended = 0.0, 0, False
    while not ended and count < frames:
        frame, reward, terminated, truncated, _ = env.step(player.act(frame))
        total, count, ended = total + float(reward), count + 1, terminated or truncated
    env.close()
    return total, count


def test_it_hits_what_random_play_misses() -> None:
    pytest.importorskip("vizdoom")
    turret, random = (
        [played(name, seed, 200) for seed in range(2)]
        for name in ("agents.defend_the_line_turret:Turret", "random_held")
    )
    assert sum(r for r, _ in turret) >= 6 + sum(r for r, _ in random)
    assert all(count == 200 for _, count in turret)
