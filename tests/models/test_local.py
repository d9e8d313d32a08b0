"""The convolutions behind the transformer."""

import pytest
import torch

from nfd_env.models.local import GroupNorm, LocalMotion, Persistence


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_norm_is_torchs_with_and_without_gradients(format: torch.memory_format) -> None:
    norm = GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 8, 5, 6).contiguous(memory_format=format)
    expected = torch.nn.functional.group_norm(x, 4, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected)
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(norm, (x,), (tangent,))
    step = 1e-3
    by_hand = (norm(x + step * tangent) - norm(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(moved, by_hand, atol=1e-2, rtol=1e-2)
    norm.fused = True
    torch.testing.assert_close(norm(x), expected)


def inputs(recent: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    frames = torch.randn(2, 3, recent, 4, 6, 6)
    return torch.randn(2, 3, 5, 6, 6), torch.randn(2, 3, 4, 6, 6), torch.rand(2, 3), frames


def filled(recent: int) -> LocalMotion:
    network = LocalMotion(4, 5, recent, 8, 2, 16).eval()
    network.persistence.change.fill_(0.36)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_a_frame_that_is_all_noise_is_not_looked_at() -> None:
    context, latents, levels, frames = inputs(2)
    condition, network = torch.randn(2, 3, 16), filled(2)
    noise = torch.rand(2, 3, 2).index_fill(2, torch.tensor([1]), 1.0)
    other = frames.clone()
    other[:, :, 1] = torch.randn_like(other[:, :, 1])
    made = network(context, latents, levels, condition, (frames, noise))
    alike = network(context, latents, levels, condition, (other, noise))
    torch.testing.assert_close(alike, made)
    other[:, :, 0] += 1
    unlike, _ = network(context, latents, levels, condition, (other, noise))
    assert not torch.allclose(unlike, made[0])


def test_frames_do_not_mix() -> None:
    context, latents, levels, frames = inputs(1)
    condition, network = torch.randn(2, 3, 16), filled(1)
    noise = torch.rand(2, 3, 1)
    whole = network(context, latents, levels, condition, (frames, noise))
    for row in range(2):
        for frame in range(3):
            one = (slice(row, row + 1), slice(frame, frame + 1))
            before = frames[one], noise[one]
            alone = network(context[one], latents[one], levels[one], condition[one], before)
            torch.testing.assert_close(alone, tuple(part[one] for part in whole))


def test_the_guess_stays_exact_in_half_precision() -> None:
    network = filled(1).to(torch.bfloat16)
    assert network.persistence.change.dtype == torch.float32
    assert network.enter.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("more", [-1e4, -30.0, 0.0, 12.0, 30.0, 1e4])
@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_a_guess_that_is_sure_has_a_slope(more: float, known: float) -> None:
    guess = Persistence(1)
    guess.change.fill_(known)
    logit = torch.full((1, 1, 2, 2), more, requires_grad=True)
    made = guess(torch.tensor([0.5]), torch.tensor([0.03]), logit)
    assert all(bool(part.isfinite().all()) for part in made)
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in made), logit)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("stillness, kept", [(0.0, 1.0), (0.01, 1 / 11), (1e-3, 0.5)])
def test_a_network_does_not_repeat_its_errors_where_nothing_changes(
    stillness: float, kept: float
) -> None:
    network = LocalMotion(1, 5, 1, 8, 1, 16, stillness).eval()
    network.persistence.change.fill_(1e-3)
    assert network.leave.bias is not None
    torch.nn.init.constant_(network.leave.bias[:1], -1.0)  # of the correction, not of the change
    context, condition = torch.zeros(1, 1, 5, 4, 4), torch.zeros(1, 1, 16)
    top, known = torch.ones(1, 1), torch.zeros(1, 1, 1)

    def after(frames: int) -> float:
        frame = torch.zeros(1, 1, 1, 4, 4)
        for _ in range(frames):
            noise = torch.randn_like(frame)
            velocity, _ = network(context, noise, top, condition, (frame[:, :, None], known))
            frame = noise - velocity  # one step from noise to data
        return float(frame.detach().mean())

    assert after(1) == pytest.approx(kept * 1e-3**0.5, rel=1e-3)
    assert after(100) == pytest.approx(kept * 1e-3**0.5 * 97.6, rel=0.01)  # a little is forgotten
    network.train()
    assert after(1) == pytest.approx(1e-3**0.5, rel=1e-3)


def test_beginning_with_another_games_motion() -> None:
    """The same latents in the first channels, and nothing known of a transformer, are alike."""
    learned, network = filled(2), LocalMotion(6, 7, 2, 8, 2, 12).eval()
    network.persistence.change.fill_(0.36)
    network.begin_with(learned)
    context, latents, levels, frames = inputs(2)
    noise = torch.rand(2, 3, 2)
    with torch.no_grad():
        for block in learned.blocks:
            block.film.weight.zero_()  # type: ignore[union-attr]
            block.film.bias.zero_()  # type: ignore[union-attr]
    made, scale = learned(0 * context, latents, levels, torch.randn(2, 3, 16), (frames, noise))
    none = torch.zeros(2, 3, 7, 6, 6)
    more = torch.cat((latents, torch.randn(2, 3, 2, 6, 6)), 2)
    before = torch.cat((frames, torch.randn(2, 3, 2, 2, 6, 6)), 3)
    alike, told = network(none, more, levels, torch.randn(2, 3, 12), (before, noise))
    torch.testing.assert_close(alike[:, :, :4], made)
    torch.testing.assert_close(told[:, :, :4], scale)


def test_motion_of_other_sizes_is_refused() -> None:
    network = LocalMotion(4, 5, 2, 8, 2, 16)
    for other in (LocalMotion(4, 5, 3, 8, 2, 16), LocalMotion(4, 5, 2, 8, 1, 16)):
        with pytest.raises(ValueError, match="has .*local_blocks.*the config asks for"):
            network.begin_with(other)
