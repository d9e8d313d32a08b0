from __future__ import annotations

import numpy as np
import pytest
import torch

from nfd_env.metrics import (
    Estimate,
    FrechetReference,
    bright_share,
    frechet_distance,
    gradient_correlation,
    luminance,
    moving_pixels,
    ssim,
    standing_out,
)


def test_bright_share() -> None:
    frames = np.zeros((2, 4, 5, 3), np.uint8)
    frames[0, 0, 0] = 255
    frames[1, 2, 3] = (0, 200, 0)
    assert luminance(frames).shape == (2, 4, 5)
    assert luminance(frames).max() == pytest.approx(255)
    assert luminance(frames)[1, 2, 3] == pytest.approx(0.587 * 200)
    assert bright_share(frames, 200) == 1 / 40
    assert bright_share(frames, 100) == 2 / 40
    assert bright_share(frames, 255) == 0


def test_structural_similarity_is_of_each_frame() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    made = real.copy()
    made[1] = 255 - made[1]
    values = ssim(real, made)
    assert values.shape == (3,) and values[0] == values[2] == 1 and values[1] < 0.2


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=20)

    def mean(used: np.ndarray) -> float:
        return float(values[used].mean())

    estimate = Estimate.jackknife(mean, np.arange(20))
    assert estimate.value == values.mean()
    assert estimate.error == pytest.approx(values.std(ddof=1) / np.sqrt(20))


def test_copies_within_a_group_add_no_certainty() -> None:
    values = np.random.default_rng(0).normal(size=10)
    copied = values.repeat(5)
    one = Estimate.jackknife(lambda used: float(values[used].mean()), np.arange(10))
    five = Estimate.jackknife(lambda used: float(copied[used].mean()), np.arange(10).repeat(5))
    assert five.error == pytest.approx(one.error)
    alone = Estimate.jackknife(lambda used: float(copied[used].mean()), np.zeros(50))
    assert np.isnan(alone.error)


def test_what_two_figures_share_cancels_in_their_ratio() -> None:
    common = np.random.default_rng(0).normal(10, 3, size=30)
    groups = np.arange(30)
    one, other = (
        Estimate.jackknife(lambda used, f=factor: float(f * common[used].mean()), groups)
        for factor in (1.2, 1.0)
    )
    ratio = one.over(other)
    assert ratio.value == pytest.approx(1.2)
    assert ratio.error < 1e-6 < 0.01 < other.error


def test_frechet_distance_of_gaussians() -> None:
    """Closed form: |m|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])
    second = torch.randn(200_000, 3, generator=generator) * torch.tensor([2.0, 2.0, 1.0])
    distance = frechet_distance(first, second + torch.tensor([0.0, 3.0, 0.0]))
    assert distance == pytest.approx(9 + 1 + 0 + 4, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_only_the_leading_components_count() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 4.0, 0.1, 0.1])
    features = torch.randn(500, 4, generator=generator) * scale
    shifted = features + torch.tensor([0.0, 0.0, 3.0, 0.0])
    assert frechet_distance(features, shifted, dimensions=2) < 0.01
    assert frechet_distance(features, shifted, dimensions=4) == pytest.approx(9, rel=0.01)


def test_paired_stretches_are_left_out_of_both_sides() -> None:
    """Stretches far from one another, each with a made one that is off by the same."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(6, 50, 4, generator=generator).double()
    real += 10 * torch.randn(6, 1, 4, generator=generator)
    reference = FrechetReference(torch.randn(100, 4, generator=generator) * 10)
    made, groups = real + 0.5, np.array([0, 0, 1, 2, 3, 4])
    paired = reference.estimate(made, groups, real)
    assert paired.value == pytest.approx(4 * 0.5**2)
    assert paired.without == pytest.approx([1.0] * 5) and paired.error < 1e-6
    assert reference.estimate(made, groups).error > 1


def test_too_few_samples() -> None:
    features = torch.randn(100, 80)
    with pytest.raises(ValueError, match="64 dimensions needs more samples than that, got 64"):
        FrechetReference(features[:64])
    reference = FrechetReference(features)
    with pytest.raises(ValueError, match="got 10"):
        reference.distance(reference.project(features[:10]))


def test_pixels_that_move() -> None:
    before = np.full((2, 4, 5, 3), 100, np.uint8)
    after = before.copy()
    after[0, 1, 2, 0] += 9
    after[1, 3, 4, 2] -= 9
    after[1, 0, 0] += 8  # as dithering does
    assert np.argwhere(moving_pixels(before, after)).tolist() == [[0, 1, 2], [1, 3, 4]]


def test_what_stands_out_of_the_background() -> None:
    background = np.full((1, 4, 5, 3), 250, np.uint8)
    frames = np.repeat(background, 3, 0)
    frames[1, 2, 2] = 223
    frames[2, 2, 2] = 224
    frames[2, 0, 0, 1] = 0
    assert np.argwhere(standing_out(frames, background)).tolist() == [[1, 2, 2], [2, 0, 0]]


def test_gradient_correlation() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert gradient_correlation(real, real) == pytest.approx(1)
    assert gradient_correlation(real, 255 - real) == pytest.approx(-1)
    assert gradient_correlation(real, real // 2) == pytest.approx(1, abs=1e-3)
    other = rng.integers(0, 256, real.shape, np.uint8)
    assert abs(gradient_correlation(real, other)) < 0.05
    assert np.isnan(gradient_correlation(real, np.zeros_like(real)))


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(40, 6, generator=generator) @ torch.randn(6, 8, generator=generator)
    moved = few + 0.5
    wide = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q[:8]
    # The same samples in a rotated space of more features than samples: the same distance.
    expected = frechet_distance(few, moved, 4)
    assert frechet_distance(few @ wide, moved @ wide, 4) == pytest.approx(expected, rel=1e-3)
