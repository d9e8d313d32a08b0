"""Image and distribution metrics, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of grey levels from 0 to 255 in dB; infinite for an error of 0."""
    if mean_squared_error == 0:
        return float("inf")
    return float(10 * np.log10(255.0**2 / mean_squared_error))


def ssim(real: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair of uint8 frames (n, H, W, 3), float64 (n,)."""
    from skimage.metrics import structural_similarity  # here, because importing it takes long

    pairs = zip(real, made, strict=True)
    return np.array([structural_similarity(a, b, channel_axis=-1) for a, b in pairs])


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample, and its jackknife (Tukey 1958).

    Attributes:
        value: of the whole sample.
        without: float64 (g,), the figure without each of g groups in turn, whose members may depend
            on one another; empty where there is but one group.
    """

    value: float
    without: np.ndarray

    @classmethod
    def jackknife(cls, figure: Callable[[np.ndarray], float], groups: np.ndarray) -> Estimate:
        """Estimate ``figure`` from samples whose groups are named by ``groups`` (n,).

        ``figure`` is given the samples to use as bool (n,).
        """
        names = np.unique(groups)
        without = [figure(groups != name) for name in names] if len(names) > 1 else []
        return cls(figure(np.ones(len(groups), bool)), np.array(without))

    @property
    def error(self) -> float:
        """Standard error; NaN where there is but one group."""
        count = len(self.without)
        return float(np.sqrt((count - 1) * np.var(self.without))) if count else float("nan")

    def over(self, other: Estimate) -> Estimate:
        """The ratio of two figures of the same groups; what they have in common cancels."""
        return Estimate(self.value / other.value, self.without / other.without)


@dataclass(frozen=True)
class _Gaussian:
    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> _Gaussian:
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"a Fréchet distance in {features.shape[1]} dimensions needs more samples than "
                f"that, got {len(features)}"
            )
        return cls(features.mean(0), torch.cov(features.T))

    def distance(self, other: _Gaussian) -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
        # tr (C1 C2)^(1/2) from the symmetric C1^(1/2) C2 C1^(1/2), with the same eigenvalues.
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        mean = (self.mean - other.mean).square().sum()
        return float(mean + self.covariance.trace() + other.covariance.trace() - 2 * cross)


class FrechetReference:
    """Fréchet distances between Gaussians fitted to sets of features (arXiv 1706.08500).

    In the space of a reference set's leading principal components, because a covariance of all
    features would need far more samples.
    """

    def __init__(self, features: Tensor, dimensions: int = 64) -> None:
        """Fit the reference.

        Args:
            features: (n, d), n > ``dimensions``.
            dimensions: principal components that are kept.

        Raises:
            ValueError: when there are too few samples.
        """
        values = features.double()
        self._centre = values.mean(0)
        count, width = features.shape
        dimensions = min(dimensions, width)
        if count < width:  # a covariance of all features would take minutes, and is singular
            directions = torch.linalg.svd(values - self._centre, full_matrices=False).Vh
            self._basis = directions[:dimensions].T
        else:
            covariance = torch.cov((values - self._centre).T)
            self._basis = torch.linalg.eigh(covariance).eigenvectors[:, -dimensions:]
        self._gaussian = _Gaussian.fit(self.project(features))

    def project(self, features: Tensor) -> Tensor:
        """Features (..., d) -> their principal components, float64 (..., ``dimensions``)."""
        return (features.double() - self._centre) @ self._basis

    def distance(self, projected: Tensor) -> float:
        """The distance of ``projected`` features (n, ``dimensions``) to the reference.

        Raises:
            ValueError: when there are too few samples.
        """
        return self._gaussian.distance(_Gaussian.fit(projected))

    def estimate(
        self, stretches: Tensor, groups: np.ndarray, real: Tensor | None = None
    ) -> Estimate:
        """The distance of projected stretches to the reference, or to ``real`` ones.

        Args:
            stretches: (n, frames, ``dimensions``).
            groups: (n,), see ``Estimate.jackknife``.
            real: like ``stretches``; a group is left out of both.
        """

        def figure(used: np.ndarray) -> float:
            rows = torch.from_numpy(used)
            target = self._gaussian if real is None else _Gaussian.fit(real[rows].flatten(0, 1))
            return target.distance(_Gaussian.fit(stretches[rows].flatten(0, 1)))

        return Estimate.jackknife(figure, groups)


def frechet_distance(first: Tensor, second: Tensor, dimensions: int = 64) -> float:
    """Fréchet distance of features ``second`` (m, d) to ``first`` (n, d), see ``FrechetReference``.

    Raises:
        ValueError: when there are too few samples.
    """
    reference = FrechetReference(first, dimensions)
    return reference.distance(reference.project(second))


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


# Grey levels, of the channel that differs most. Resizing and dithering change pixels by less.
MOVED = 8
# A tenth of the range: more than a decoder of 30 dB errs by (8 levels on average), and less than
# the contrast of what is to be seen.
STANDS_OUT = 26


def moving_pixels(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which pixels of uint8 (..., H, W, 3) changed, by more than ``MOVED``; bool (..., H, W).

    Few pixels move, and they are what a game is about: a tokenizer may lose a ball of three pixels
    and still have a PSNR of 37 dB over all of them.
    """
    return np.abs(after.astype(np.int16) - before).max(-1) > MOVED


def standing_out(frames: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Which pixels of uint8 (..., H, W, 3) are not those of the background; bool (..., H, W).

    Args:
        frames: to look at.
        background: uint8, broadcast against them: the median over time of real frames, in which
            things that move do not show.
    """
    return np.abs(frames.astype(np.int16) - background).max(-1) > STANDS_OUT


def gradient_correlation(real: np.ndarray, made: np.ndarray) -> float:
    """Pearson correlation of the horizontal and vertical differences of uint8 (..., H, W, 3).

    Sharpness alone does not tell edges from noise. NaN where a side has no edges at all.
    """
    sides = []
    for frames in (real, made):
        values = frames.astype(np.float32)
        steps = [np.diff(values, axis=axis).ravel() for axis in (-2, -3)]
        sides.append(np.concatenate(steps))
    if not (sides[0].std() and sides[1].std()):
        return float("nan")
    return float(np.corrcoef(*sides)[0, 1])
