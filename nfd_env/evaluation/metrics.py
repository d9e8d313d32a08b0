"""Image and distribution metrics."""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor


def psnr(mean_squared_error: float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for an error of 0."""
    return float("inf") if mean_squared_error == 0 else 10 * np.log10(peak**2 / mean_squared_error)


def ssim(real: np.ndarray, made: np.ndarray) -> float:
    """Mean structural similarity of uint8 frames (..., H, W, 3), frame by frame."""
    height, width = real.shape[-3:-1]
    pairs = zip(real.reshape(-1, height, width, 3), made.reshape(-1, height, width, 3), strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs]))


def frechet_distance(first: Tensor, second: Tensor, dimensions: int = 64) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in the space of the ``first`` set's leading
    principal components, because a covariance of all features would need far more samples.

    Args:
        first: (n, d) features of the reference, n > ``dimensions``.
        second: (m, d) features to compare, m > ``dimensions``.
        dimensions: principal components that are kept.

    Raises:
        ValueError: when there are too few samples.
    """
    dimensions = min(dimensions, first.shape[1])
    if min(len(first), len(second)) <= dimensions:
        raise ValueError(
            f"a Fréchet distance in {dimensions} dimensions needs more samples than that, "
            f"got {len(first)} and {len(second)}"
        )
    a, b = first.double(), second.double()
    centre = a.mean(0)
    basis = torch.linalg.eigh(torch.cov((a - centre).T)).eigenvectors[:, -dimensions:]
    a, b = (a - centre) @ basis, (b - centre) @ basis
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (C1 C2)^(1/2) from the symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * cross)


def sharpness(frames: np.ndarray) -> float:
    """Mean absolute horizontal and vertical difference of uint8 frames (..., H, W, 3)."""
    values = frames.astype(np.int16)
    return float(np.abs(np.diff(values, axis=-2)).mean() + np.abs(np.diff(values, axis=-3)).mean())


def luminance(frames: np.ndarray) -> np.ndarray:
    """Luma of uint8 frames (..., 3) in [0, 255], float32 (...); ITU-R BT.601 weights."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def bright_share(frames: np.ndarray, threshold: float) -> float:
    """The share of pixels of uint8 frames (..., 3) whose luma is above ``threshold``.

    With a high percentile of real frames as threshold this counts rare bright details, such as
    projectiles, which a blurry or forgetful model loses first and which PSNR hardly notices.
    """
    return float((luminance(frames) > threshold).mean())


def events_matched(
    predicted: np.ndarray, happened: np.ndarray, tolerance: int
) -> tuple[float, float]:
    """Precision and recall of predicted moments, each right within ``tolerance`` steps.

    Args:
        predicted: (T,) bool.
        happened: (T,) bool.
        tolerance: allowed distance in steps.

    Returns:
        (precision, recall); NaN where there is nothing to divide by.
    """
    said, was = np.flatnonzero(predicted), np.flatnonzero(happened)

    def share_near(points: np.ndarray, others: np.ndarray) -> float:
        if not len(points):
            return float("nan")
        if not len(others):
            return 0.0
        return float((np.abs(points[:, None] - others[None]).min(1) <= tolerance).mean())

    return share_near(said, was), share_near(was, said)
