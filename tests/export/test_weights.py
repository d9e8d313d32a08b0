"""Weights in few bits stay in few bits in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nfd_env.export.onnx import _smaller
from nfd_env.models.rounding import round_weights


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_rounded_weights_are_found_again(bits: int, turned: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80)
    seen = torch.randn(64, 48)
    rounded = round_weights(layer, bits, lambda network: network(seen))
    weights = rounded.applied(layer).weight.detach().numpy()
    weights[3] = 0
    if turned:
        weights = np.ascontiguousarray(weights.T)
    found = _smaller(weights)
    assert found is not None
    steps, scale = found
    assert scale is not None and steps.dtype == np.int8 and steps.shape == weights.shape
    assert scale.shape == ((1, 80) if turned else (80, 1))
    np.testing.assert_allclose(steps * scale, weights, rtol=1e-6)


def test_others_stay_as_they_are() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    assert _smaller(weights) is None
    half = weights.astype(np.float16)
    found = _smaller(half.astype(np.float32))
    assert found is not None and found[1] is None and np.array_equal(found[0], half)
    kernel = np.round(weights * 5).clip(-31, 31)
    kernel[:, 0] = 31
    kernel = kernel.reshape(64, 8, 2, 2) * np.float32(0.0137)
    found = _smaller(kernel)
    assert found is not None and found[1] is not None and found[1].shape == (64, 1, 1, 1)
    np.testing.assert_allclose(found[0] * found[1], kernel, rtol=1e-6)
