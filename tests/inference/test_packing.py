from __future__ import annotations

import copy
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_env.inference.packing import (
    PackedConv2d,
    PackedLinear,
    PackedSwiGLU,
    pack_convolutions,
    pack_linears,
)
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.layers import SwiGLU
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
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


@pytest.mark.parametrize("count", [1, 3, 16])
def test_packed_convolutions_change_nothing_but_the_speed(count: int) -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(encoder_channels=[8, 16], decoder_channels=[8, 16], latent_channels=5)
    tokenizer = Tokenizer(config).eval().requires_grad_(False)
    for parameter in tokenizer.parameters():  # residual blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    packed = copy.deepcopy(tokenizer)
    pack_convolutions(packed)
    assert sum(isinstance(m, PackedConv2d) for m in packed.modules()) == 2 * (2 * 3 + 1)
    frames, latents = torch.rand(count, 3, 12, 20), torch.randn(count, 5, 3, 5)
    with torch.inference_mode():
        for size in (1, 2):  # another size than the one that it was packed for
            frames, latents = frames.repeat(1, 1, 1, size), latents.repeat(1, 1, 1, size)
            torch.testing.assert_close(
                packed.encode(frames), tokenizer.encode(frames), rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                packed.decode(latents), tokenizer.decode(latents), rtol=1e-4, atol=1e-4
            )
    assert tokenizer.decode(latents).std() > 0.1
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor)


@pytest.mark.parametrize("rows", [5, 200])
def test_a_packed_swiglu_computes_the_same(rows: int) -> None:
    torch.manual_seed(0)
    layer = SwiGLU(24, 40)
    packed = PackedSwiGLU(layer, rows=5)
    x = torch.randn(2, rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)


_FRESH_BYTES = """
import resource, torch
from nfd_env.inference.packing import keep_freed_memory

def fresh():
    for _ in range(3):  # the last time nothing is new
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [torch.zeros(2**20, dtype=torch.uint8) for _ in range(16)]
        del parts
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize()

# The threshold only ever rises, so first as a process begins.
print(fresh(), keep_freed_memory(), fresh())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_large_batches_take_no_fresh_memory() -> None:
    # In a process of its own: what this one has freed before decides what its heap gives back.
    command = [sys.executable, "-c", _FRESH_BYTES]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[-1]) < 2**20, said
