"""Weights that another network of the same make begins with."""

from __future__ import annotations

import pytest
import torch

from nfd_env.models.begin import begin_with
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig


def tokenizer(channels: list[int], latents: int, blocks: int = 1) -> Tokenizer:
    network = Tokenizer(TokenizerConfig(channels, channels, latents, blocks, blocks))
    for parameter in network.parameters():  # residual branches begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    assert network.normalise.running_mean is not None
    torch.nn.init.normal_(network.normalise.running_mean)
    return network.eval()


def test_more_channels_compute_what_fewer_did() -> None:
    learned, network = tokenizer([8, 12], 4), tokenizer([12, 20], 6)
    begin_with(network, learned)
    frames = torch.rand(2, 3, 16, 24)
    latents = network.encode(frames)
    torch.testing.assert_close(latents[:, :4], learned.encode(frames), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(frames), learned(frames), atol=1e-5, rtol=1e-4)
    # What is new sees the frame, so that it can be learned from.
    assert latents[:, 4:].std() > 0
    network.train()(frames).square().mean().backward()
    new = network.decoder[0].weight.grad
    assert isinstance(new, torch.Tensor) and new[:, 4:].abs().sum() > 0


def test_fewer_channels_begin_with_the_first() -> None:
    learned, network = tokenizer([12, 20], 6), tokenizer([12, 20], 4)
    begin_with(network, learned)
    frames = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(network.encode(frames), learned.encode(frames)[:, :4])


@pytest.mark.parametrize(("channels", "blocks"), [([8], 1), ([8, 8], 2)])
def test_other_levels_or_blocks(channels: list[int], blocks: int) -> None:
    network, other = tokenizer([8, 8], 4), tokenizer(channels, 4, blocks)
    before = [weight.clone() for weight in network.state_dict().values()]
    with pytest.raises(ValueError, match="another number of levels or blocks"):
        begin_with(network, other)
    for weight, kept in zip(network.state_dict().values(), before, strict=True):
        assert torch.equal(weight, kept)
