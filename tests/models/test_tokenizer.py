from __future__ import annotations

import pytest
import torch

from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig, float_to_frames, frames_to_float

SMALL = TokenizerConfig(encoder_channels=[8, 8], decoder_channels=[8, 8], latent_channels=5)


def small_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(SMALL).eval()


def random_frames(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 12, 20, 3), dtype=torch.uint8, generator=generator)


def test_shapes() -> None:
    tokenizer, frames = small_tokenizer(), random_frames()
    assert SMALL.downsampling == 4
    latents = tokenizer.encode_frames(frames)
    assert latents.shape == (3, 5, 3, 5) and latents.dtype == torch.float32
    decoded = tokenizer.decode_frames(latents)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    assert tokenizer(frames_to_float(frames)).shape == (3, 3, 12, 20)


def test_the_default_downsamples_by_16() -> None:
    assert TokenizerConfig().downsampling == 16


def test_frames_round_trip_all_values() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    frames[1] = 255 - frames[1]
    images = frames_to_float(frames)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(float_to_frames(images), frames)


def test_out_of_range_images_are_clipped_not_wrapped() -> None:
    images = torch.tensor([-3.0, -1.01, 1.01, 3.0]).reshape(1, 1, 2, 2).repeat(1, 3, 1, 1)
    assert float_to_frames(images)[0, ..., 0].tolist() == [[0, 0], [255, 255]]


def test_channels_and_pixels_keep_their_places() -> None:
    frames = torch.zeros(1, 4, 6, 3, dtype=torch.uint8)
    frames[0, 1, 2, 0] = 255
    assert (frames_to_float(frames) > 0).nonzero().tolist() == [[0, 0, 1, 2]]


def test_conversion_does_not_touch_its_input() -> None:
    frames = random_frames()
    before = frames.clone()
    images = frames_to_float(frames)
    kept = images.clone()
    float_to_frames(images)
    assert torch.equal(frames, before) and torch.equal(images, kept)


def test_evaluation_is_deterministic_and_training_is_noisy() -> None:
    tokenizer, images = small_tokenizer(), frames_to_float(random_frames())
    assert torch.equal(tokenizer(images), tokenizer(images))
    tokenizer.train()
    assert not torch.equal(tokenizer(images), tokenizer(images))


def test_latents_have_unit_variance_on_the_data_they_were_trained_on() -> None:
    tokenizer, images = small_tokenizer(), frames_to_float(random_frames(8))
    tokenizer.train()
    with torch.no_grad():
        raw = tokenizer.encoder(images)
        for _ in range(1500):
            tokenizer.normalise(raw)
        latents = tokenizer.eval().encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(5), rtol=0, atol=0.05)


def test_frames_are_encoded_alone() -> None:
    tokenizer, frames = small_tokenizer(), random_frames()
    alone = tokenizer.encode_frames(frames[1:2])
    torch.testing.assert_close(tokenizer.encode_frames(frames)[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", [[], [8, 8, 8]])
def test_levels_that_do_not_meet(encoder: list[int]) -> None:
    with pytest.raises(ValueError, match="same number of levels"):
        TokenizerConfig(encoder_channels=encoder, decoder_channels=[8, 8])


def filled(channels: list[int], latents: int, blocks: int = 1) -> Tokenizer:
    network = Tokenizer(TokenizerConfig(channels, channels, latents, blocks, blocks))
    for parameter in network.parameters():  # residual branches begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    assert network.normalise.running_mean is not None
    torch.nn.init.normal_(network.normalise.running_mean)
    return network.eval()


def test_beginning_with_more_channels_computes_what_fewer_did() -> None:
    learned, network = filled([8, 12], 4), filled([12, 20], 6)
    network.begin_with(learned)
    frames = torch.rand(2, 3, 16, 24)
    latents = network.encode(frames)
    torch.testing.assert_close(latents[:, :4], learned.encode(frames), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(frames), learned(frames), atol=1e-5, rtol=1e-4)
    # What is new sees the frame, so that it can be learned from.
    assert latents[:, 4:].std() > 0
    network.train()(frames).square().mean().backward()
    new = network.decoder[0].weight.grad
    assert isinstance(new, torch.Tensor) and new[:, 4:].abs().sum() > 0


def test_beginning_with_fewer_channels_takes_the_first() -> None:
    learned, network = filled([12, 20], 6), filled([12, 20], 4)
    network.begin_with(learned)
    frames = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(network.encode(frames), learned.encode(frames)[:, :4])


@pytest.mark.parametrize(("channels", "blocks"), [([8], 1), ([8, 8], 2)])
def test_beginning_with_other_levels_or_blocks_is_refused(channels: list[int], blocks: int) -> None:
    network, other = filled([8, 8], 4), filled(channels, 4, blocks)
    before = [weight.clone() for weight in network.state_dict().values()]
    with pytest.raises(ValueError, match="another number of levels or blocks"):
        network.begin_with(other)
    for weight, kept in zip(network.state_dict().values(), before, strict=True):
        assert torch.equal(weight, kept)
