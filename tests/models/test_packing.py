from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.packing import PackedLinear, PackedSwiGLU, pack_linears
from nfd_env.models.weights import load_weights, save_weights
from tests.models.small import random_frames, small_dynamics

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch cannot pack"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_packed_layer_computes_the_same(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias)
    packed = PackedLinear(linear, rows=5)
    x = torch.randn(2, rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-4, atol=1e-5)


def test_packing_a_network_changes_nothing_but_its_speed(tmp_path: Path) -> None:
    network = small_dynamics()
    packed = copy.deepcopy(network)
    pack_linears(packed.blocks, rows=12)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 2 * 3
    assert sum(isinstance(m, PackedSwiGLU) for m in packed.modules()) == 2
    inputs = random_frames(2, 5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)
    # It is saved as if it had not been packed.
    save_weights(tmp_path / "a.safetensors", packed, packed.config)
    again = load_weights(tmp_path / "a.safetensors", Dynamics, DynamicsConfig)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("rank", [0, 4])
def test_folded_norms_change_nothing_but_the_speed(rank: int) -> None:
    torch.manual_seed(0)
    network = Dynamics(replace(small_dynamics().config, modulation_rank=rank)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folded = copy.deepcopy(network)
    folded.fold_norms()
    inputs = random_frames(2, 5)
    with torch.inference_mode():
        expected = network(*inputs)
        torch.testing.assert_close(folded(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
