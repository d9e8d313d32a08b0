"""The guess that a frame's velocity is told from, against least squares on samples."""

import pytest
import torch

from nfd_env.flow.persistence import MOST, frame_correlation, linear_guess

CORRELATION = torch.tensor([0.0, 0.6, MOST])


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and those before them, (n, 3), with the correlations ``CORRELATION``."""
    generator = torch.Generator().manual_seed(0)
    before, own = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    return CORRELATION * before + (1 - CORRELATION.square()).sqrt() * own, before


@pytest.mark.parametrize("before_level", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("level", [0.0, 0.2, 0.7, 1.0])
def test_it_is_the_least_squares_fit(level: float, before_level: float) -> None:
    frames, before = pairs(200_000)
    generator = torch.Generator().manual_seed(1)
    noise, other = torch.randn(2, *frames.shape, generator=generator, dtype=torch.float64)
    noisy = (1 - level) * frames + level * noise
    seen = (1 - before_level) * before + before_level * other
    a, b, scale = linear_guess(torch.tensor(level), torch.tensor(before_level), CORRELATION)
    a, b = a.flatten(), b.flatten()
    for channel in range(3):
        observed = torch.stack((noisy[:, channel], seen[:, channel]), 1)
        velocity = (noise - frames)[:, channel, None]
        fit = torch.linalg.lstsq(observed, velocity).solution.flatten()
        made = torch.stack((a[channel], b[channel])).double()
        torch.testing.assert_close(made, fit, atol=0.05, rtol=0)
        alone = torch.linalg.lstsq(observed[:, :1], velocity).solution
        off = (velocity - observed[:, :1] @ alone).square().mean().sqrt()
        assert float(scale) == pytest.approx(float(off), rel=0.02)


def test_shapes_and_what_has_no_frame_before() -> None:
    level = torch.rand(2, 5)
    a, b, scale = linear_guess(level, torch.ones(2, 5), CORRELATION)
    assert a.shape == b.shape == (2, 5, 3, 1, 1)
    assert scale.shape == (2, 5, 1, 1, 1)
    assert not b.any()  # noise alone says nothing
    torch.testing.assert_close(a[..., 0, 0, 0], a[..., 1, 0, 0])


def test_the_correlation_of_frames() -> None:
    frames, before = pairs(50_000)
    both = torch.stack((before, frames), 1)[..., None, None]
    measured = frame_correlation(both)
    torch.testing.assert_close(measured, CORRELATION, atol=0.02, rtol=0)
    assert frame_correlation(before[:, None, :, None, None].expand(-1, 3, -1, 2, 2)).tolist() == (
        pytest.approx([MOST] * 3)
    )
    assert frame_correlation(torch.zeros(2, 3, 4, 1, 1)).tolist() == [0.0] * 4
    assert (
        frame_correlation(torch.stack((before, -before), 1)[..., None, None]).tolist() == [0.0] * 3
    )
