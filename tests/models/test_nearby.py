"""Heads that look at a frame and the one before it by convolutions."""

import pytest
import torch

from nfd_env.models.heads import Heads, HeadsConfig


def heads(shape: list[int]) -> Heads:
    torch.manual_seed(0)
    size = shape[0] * shape[1] * shape[2]
    settings = HeadsConfig(size, 3, 16, [0.0, 1.0], 0.0, latent_shape=shape, nearby=8)
    return Heads(settings).eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [[4, 6, 8], [4, 16, 16], [3, 2, 3], [2, 5, 7], [1, 1, 1]])
def test_steps_are_the_sequence(shape: list[int]) -> None:
    network = heads(shape)
    latents, actions = torch.randn(2, 5, *shape), torch.randn(2, 5, 3)
    logits, last = network(latents, actions, network.initial_state(2))
    state, made = network.initial_state(2), []
    for t in range(5):
        features = network.features(latents[:, t : t + 1], actions[:, t : t + 1], state)[0][:, 0]
        step = network.step(latents[:, t], actions[:, t], state)
        state = step.state
        made.append(step.hazard)
        after = network.features_after(latents[:, t], actions[:, t], state)
        torch.testing.assert_close(after, features)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(torch.stack(made, 1), logits[..., 0].sigmoid())
    assert (
        state.shape == (2, network.memory_size)
        and network.memory_size == 16 + 2 * latents[0, 0].numel()
    )


def test_the_frame_before_is_seen_beyond_the_recurrent_state() -> None:
    network = heads([4, 6, 8])
    frame, action, state = torch.randn(1, 4, 6, 8), torch.randn(1, 3), network.initial_state(1)
    other = state.clone()
    other[:, 16 : 16 + 4 * 6 * 8] = torch.randn(4 * 6 * 8)
    assert network.step(frame, action, state).hazard != network.step(frame, action, other).hazard


def test_what_stands_beside_what_is_told_wherever_it_is() -> None:
    """A thing moved by the second convolution's stride gives the same strongest responses."""
    network = heads([4, 24, 24]).nearby
    assert network is not None
    thing = torch.randn(4, 2, 2)
    pictures = torch.zeros(2, 4, 24, 24)
    pictures[0, :, 8:10, 8:10] = thing
    pictures[1, :, 12:14, 14:16] = thing
    seen = network(pictures, torch.zeros_like(pictures))
    torch.testing.assert_close(seen[0, :8], seen[1, :8])
    assert not torch.allclose(seen[0, 8:], seen[1, 8:])


@pytest.mark.parametrize(
    "wrong",
    [{"nearby": 6}, {"nearby": -4}, {"nearby": 8, "latent_shape": []}]
    + [{"nearby": 8, "latent_shape": [4, 6, 7]}, {"nearby": 8, "latent_shape": [192]}],
)
def test_sizes_that_do_not_fit(wrong: dict) -> None:
    with pytest.raises(ValueError, match="nearby|latent_shape"):
        HeadsConfig(latent_size=192, **wrong)
