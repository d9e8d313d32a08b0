"""The guess that a frame's velocity is told from, against least squares on samples."""

import pytest
import torch

from nfd_env.flow.persistence import LEAST, frame_change, linear_guess, trusted

CHANGE = torch.tensor([1.0, 0.6, 0.04, LEAST])


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and those before them, (n, 4), with the shares of ``CHANGE``."""
    generator = torch.Generator().manual_seed(0)
    before, own = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    return (1 - CHANGE).sqrt() * before + CHANGE.sqrt() * own, before


@pytest.mark.parametrize("before_level", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("level", [0.01, 0.2, 0.7, 1.0])
def test_it_is_the_least_squares_fit(level: float, before_level: float) -> None:
    frames, before = pairs(200_000)
    generator = torch.Generator().manual_seed(1)
    noise, other = torch.randn(2, *frames.shape, generator=generator, dtype=torch.float64)
    noisy = (1 - level) * frames + level * noise
    seen = (1 - before_level) * before + before_level * other
    change = CHANGE[:, None, None]
    guess = linear_guess(torch.tensor(level), torch.tensor(before_level), change)
    a, b, scale = (part.flatten().double() for part in guess)
    for channel in range(4):
        observed = torch.stack((noisy[:, channel], seen[:, channel]), 1)
        velocity = (noise - frames)[:, channel, None]
        solution = torch.linalg.lstsq(observed, velocity).solution
        least = (velocity - observed @ solution).square().mean().sqrt()
        off = velocity[:, 0] - a[channel] * observed[:, 0] - b[channel] * observed[:, 1]
        assert float(off.square().mean().sqrt()) == pytest.approx(float(least), rel=0.01)
        assert float(scale[channel]) == pytest.approx(float(least), rel=0.01)


def test_shapes_and_limits() -> None:
    level, change = torch.rand(2, 5), torch.full((2, 5, 4, 3, 2), 0.3)
    a, b, scale = linear_guess(level, torch.ones(2, 5), change)
    assert a.shape == b.shape == scale.shape == change.shape
    assert not b.any()  # noise alone says nothing
    for s in (0.0, 1.0):
        made = linear_guess(torch.tensor(s), torch.tensor(0.0), torch.tensor([LEAST, 1.0]))
        assert all(part.isfinite().all() for part in made)
    # From noise alone, and sure that nothing moves: the frame before.
    a, b, scale = linear_guess(torch.ones(()), torch.zeros(()), torch.tensor([LEAST]))
    assert float(a) == 1 and float(b) == pytest.approx(-1, abs=1e-4)
    assert float(scale) == pytest.approx(0.01)


def test_the_change_of_frames() -> None:
    frames, before = pairs(50_000)
    both = torch.stack((before, frames), 1)[..., None, None]
    torch.testing.assert_close(frame_change(both), CHANGE, atol=0.02, rtol=0)
    still = frame_change(before[:, None, :, None, None].expand(-1, 3, -1, 2, 2))
    assert still.tolist() == pytest.approx([LEAST] * 4)
    assert frame_change(torch.zeros(2, 3, 4, 1, 1)).tolist() == [1.0] * 4
    assert frame_change(torch.stack((before, -before), 1)[..., None, None]).tolist() == [1.0] * 4


def test_the_less_changes_the_less_a_correction_is_trusted() -> None:
    change = torch.tensor([1e-4, 0.01, 0.5])
    assert torch.equal(trusted(change, 0.0), torch.ones(3))
    torch.testing.assert_close(
        trusted(change, 0.01), torch.tensor([0.0099, 0.5, 0.9804]), rtol=1e-2, atol=0
    )
