from __future__ import annotations

import pytest
import torch

from nfd_env.flow.path import (
    data_from_velocity,
    expand,
    interpolate,
    noise_from_velocity,
    sample_levels,
)

torch.manual_seed(0)
DATA = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64)
NOISE = torch.randn_like(DATA)
LEVELS = torch.rand(3, 5, dtype=torch.float64)


def test_expand_appends_dimensions() -> None:
    assert expand(LEVELS, DATA).shape == (3, 5, 1, 1, 1)
    assert torch.equal(expand(LEVELS, DATA)[..., 0, 0, 0], LEVELS)


def test_round_trip() -> None:
    sample = interpolate(DATA, NOISE, LEVELS)
    tight = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(data_from_velocity(sample.x, sample.velocity, LEVELS), DATA, **tight)
    torch.testing.assert_close(
        noise_from_velocity(sample.x, sample.velocity, LEVELS), NOISE, **tight
    )


def test_the_ends_of_the_path() -> None:
    assert torch.equal(interpolate(DATA, NOISE, torch.zeros(3, 5, dtype=DATA.dtype)).x, DATA)
    assert torch.equal(interpolate(DATA, NOISE, torch.ones(3, 5, dtype=DATA.dtype)).x, NOISE)


def test_each_frame_has_its_own_level() -> None:
    sample = interpolate(DATA, NOISE, LEVELS)
    for b, t in ((0, 0), (2, 4), (1, 3)):
        expected = (1 - LEVELS[b, t]) * DATA[b, t] + LEVELS[b, t] * NOISE[b, t]
        torch.testing.assert_close(sample.x[b, t], expected, rtol=0, atol=1e-14)


def test_velocity_is_the_derivative_in_the_level() -> None:
    step = 1e-6
    ahead, behind = (interpolate(DATA, NOISE, LEVELS + d).x for d in (step, -step))
    velocity = interpolate(DATA, NOISE, LEVELS).velocity
    torch.testing.assert_close((ahead - behind) / (2 * step), velocity, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampled_levels_are_a_shifted_logit_normal(shift: float) -> None:
    torch.manual_seed(1)
    levels = sample_levels((200, 200), shift)
    assert levels.shape == (200, 200)
    assert 0 < levels.min() and levels.max() < 1
    logits = torch.logit(levels.double() / (shift - (shift - 1) * levels.double()))
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    # Independent from frame to frame.
    rows = logits - logits.mean()
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 0.02
