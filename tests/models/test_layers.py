"""Shortcuts of CPU inference equal what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from nfd_env.models.layers import RMSNorm, attend_packed, sinusoid


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_rms_norm(affine: bool, scale: float) -> None:
    torch.manual_seed(0)
    ours, theirs = (kind(32, eps=1e-6, elementwise_affine=affine) for kind in (RMSNorm, nn.RMSNorm))
    if affine:
        with torch.no_grad():
            ours.weight.normal_(), theirs.weight.copy_(ours.weight)
    x = torch.randn(3, 5, 32) * scale
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert torch.isfinite(ours(torch.zeros(2, 32))).all()
    assert ours(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1.0, 2.5])
def test_attend_packed(batch: int, size: float) -> None:
    torch.manual_seed(0)
    k, v = (size * torch.randn(batch, 2, 9, 16) for _ in range(2))
    q = size / 4 * torch.randn(batch, 2, 2, 2, 16)  # B F P heads c
    hidden = torch.rand(batch, 1, 4, 9) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).repeat(1, 2, 1, 1)
    expected = functional.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2), k, v, attn_mask=~hidden, scale=1.0
    )
    expected = expected.transpose(1, 2).reshape(batch, 2, 2, 32)
    torch.testing.assert_close(attend_packed(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(attend_packed(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def test_attention_stays_finite_whatever_the_scores() -> None:
    q, k, v = 1e4 * torch.randn(3, 2, 2, 2, 16), *(1e4 * torch.randn(2, 3, 2, 9, 16))
    with torch.inference_mode():
        assert attend_packed(q, k, v, torch.zeros(3, 2, 4, 9)).isfinite().all()


def test_sinusoid_tells_levels_apart() -> None:
    levels = torch.linspace(0, 1, 101)
    features = sinusoid(levels)
    assert features.shape == (101, 256)
    assert features.abs().max() <= 1
    distances = torch.cdist(features, features) + 1e3 * torch.eye(101)
    assert distances.min() > 1
