from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfd_env.inference.rollout import new_cache
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.layers import FrameRotation, rope_split, rotate
from nfd_env.models.low_rank import with_low_rank
from tests.models.small import WINDOW, random_frames, small_dynamics

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize(
    "wrong",
    [{"patch": 4}, {"width": 30, "heads": 4}, {"width": 24, "heads": 4}, {"window": 1}]
    + [{"recent": 16}, {"recent": -1}, {"local_width": 60}, {"local_blocks": -1}],
)
def test_sizes_that_do_not_divide(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        DynamicsConfig(**wrong)


def test_the_output_starts_at_zero() -> None:
    network = Dynamics(DynamicsConfig(2, 4, 6, 2, 3, 32, 2, 2, WINDOW))
    assert torch.equal(network(*random_frames(2, 3)), torch.zeros(2, 3, 2, 4, 6))


def test_at_the_start_every_block_is_the_identity() -> None:
    network = Dynamics(DynamicsConfig(2, 4, 6, 2, 3, 32, 2, 2, WINDOW))
    seen: list[tuple[Tensor, Tensor]] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    network(*random_frames(2, 3))
    assert len(seen) == 2
    for before, after in seen:
        assert before.abs().max() > 0
        assert torch.equal(before, after)


@pytest.mark.parametrize("which", ["latents", "levels", "actions"])
def test_a_change_in_the_future_leaves_the_past_alone(which: str) -> None:
    network = small_dynamics()
    inputs = dict(zip(("latents", "levels", "actions"), random_frames(2, 7), strict=True))
    before = network(**inputs)
    changed = inputs[which].clone()
    changed[:, 4] += 0.7
    after = network(**{**inputs, which: changed})
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-6)
    for t in (4, 5, 6):
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_a_frame_sees_all_tokens_of_its_own_frame() -> None:
    network = small_dynamics(layers=1)
    latents, levels, actions = random_frames(1, 2)
    before = network(latents, levels, actions)
    changed = latents.clone()
    changed[0, 1, :, 3, 5] += 1.0  # in the last token
    moved = (network(changed, levels, actions) - before).abs().amax(2)[0]
    assert (moved[1] > 1e-6).all()
    assert moved[0].max() <= 1e-6


def test_the_window_ends() -> None:
    network = small_dynamics(layers=1)
    latents, levels, actions = random_frames(1, WINDOW + 2)
    before = network(latents, levels, actions)
    latents = latents.clone()
    latents[:, 0] += 1
    moved = (network(latents, levels, actions) - before).abs().amax((0, 2, 3, 4))
    assert (moved[:WINDOW] > 1e-4).all()
    assert (moved[WINDOW:] < 1e-6).all()


def test_rows_of_the_batch_do_not_mix() -> None:
    network = small_dynamics()
    latents, levels, actions = random_frames(3, 5)
    alone = network(latents[1:2], levels[1:2], actions[1:2])
    torch.testing.assert_close(network(latents, levels, actions)[1:2], alone, **CLOSE)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_two_copies_equal_the_windowed_forward_of_the_last_frame(qk_norm: bool) -> None:
    network = small_dynamics(qk_norm=qk_norm)
    count = WINDOW + 3
    history, history_levels, actions = random_frames(2, count, 0)
    noisy, levels, _ = random_frames(2, count, 1)
    velocities = network.forward_two_copies(history, history_levels, noisy, levels, actions)
    assert velocities.shape == noisy.shape
    for t in range(count):
        expected = network(
            torch.cat((history[:, :t], noisy[:, t : t + 1]), 1),
            torch.cat((history_levels[:, :t], levels[:, t : t + 1]), 1),
            actions[:, : t + 1],
        )[:, t]
        torch.testing.assert_close(velocities[:, t], expected, **CLOSE)


def test_two_copies_have_gradients_in_both_modes() -> None:
    network = small_dynamics()
    history, history_levels, actions = random_frames(1, 3, 0)
    noisy, levels, _ = random_frames(1, 3, 1)
    tangent = torch.randn_like(noisy)

    def function(x: Tensor) -> Tensor:
        return network.forward_two_copies(history, history_levels, x, levels, actions)

    _, forward = torch.func.jvp(function, (noisy,), (tangent,))
    step = 1e-2
    numeric = (function(noisy + step * tangent) - function(noisy - step * tangent)) / (2 * step)
    torch.testing.assert_close(forward, numeric, rtol=0.02, atol=0.01 * float(numeric.std()))


def test_a_low_rank_modulation_of_full_rank_is_the_same_network() -> None:
    network = small_dynamics()
    inputs = random_frames(2, 5)
    actions = torch.eye(3)
    inputs = (*inputs[:2], actions[torch.randint(0, 3, (2, 5))])
    exact, error = with_low_rank(network, actions, 32)
    assert error < 1e-6
    torch.testing.assert_close(exact(*inputs), network(*inputs), rtol=1e-3, atol=1e-4)
    assert exact.config.modulation_rank == 32 and network.config.modulation_rank == 0


def test_a_low_rank_modulation_is_close_where_conditions_span_little() -> None:
    network = small_dynamics()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    errors = [with_low_rank(network, torch.eye(3), rank)[1] for rank in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01 and errors[3] < 0.3 * errors[0]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    # Fewer parameters, and a network like any other: it streams, is saved and loaded.
    small, _ = with_low_rank(network, torch.eye(3), 4)
    count = [sum(p.numel() for p in n.parameters()) for n in (small, network)]
    assert count[0] < count[1]
    again = Dynamics(small.config).eval()
    again.load_state_dict(small.state_dict())
    inputs = random_frames(1, 3)
    assert torch.equal(again(*inputs), small(*inputs))


def test_patchify_round_trip_and_order() -> None:
    network = small_dynamics()
    latents, _, _ = random_frames(2, 3)
    tokens = network._patchify(latents)
    assert tokens.shape == (2, 3, 6, 8)
    assert torch.equal(network._unpatchify(tokens), latents)
    # Tokens are numbered row by row, as the rotation numbers them.
    assert torch.equal(tokens[0, 0, 4], latents[0, 0, :, 2:4, 2:4].flatten())


def test_rope_split() -> None:
    assert rope_split(64) == (8, 28, 28)
    for width in range(4, 132, 4):
        parts = rope_split(width)
        assert sum(parts) == width
        assert all(p > 0 or width < 8 for p in parts)
        assert all(p % 2 == 0 for p in parts)


def test_rotations_are_relative_at_any_frame_number() -> None:
    rotation = FrameRotation(16, 2, 3)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 5, 6, 2, 16)

    def scores(offset: int) -> Tensor:
        turn = rotation(torch.arange(5)[None] + offset)
        return torch.einsum("bfphc,bgqhc->bhfpgq", rotate(q, turn), rotate(k, turn))

    near = scores(0)
    torch.testing.assert_close(scores(10_000), near, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores(10_000_000), near, rtol=0, atol=2e-5)
    # The positions do matter.
    plain = torch.einsum("bfphc,bgqhc->bhfpgq", q, k)
    assert (plain - near).abs().max() > 0.1
    moved = rotate(k, rotation(torch.arange(5)[None] + 1))
    shifted = torch.einsum("bfphc,bgqhc->bhfpgq", rotate(q, rotation(torch.arange(5)[None])), moved)
    assert (shifted - near).abs().max() > 0.1


def test_rotation_keeps_lengths_and_turns_each_axis() -> None:
    rotation = FrameRotation(16, 2, 3)
    x = torch.ones(1, 2, 6, 1, 16)
    turned = rotate(x, rotation(torch.arange(2)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    time, height, _ = rope_split(16)
    frame, row, column = turned[0, 1, 0], turned[0, 0, 3], turned[0, 0, 1]
    changed = [(v[0] - x[0, 0, 0, 0]).abs() > 1e-6 for v in (frame, row, column)]
    assert changed[0].nonzero().flatten().tolist() == list(range(time))
    assert changed[1].nonzero().flatten().tolist() == list(range(time, time + height))
    assert changed[2].nonzero().flatten().tolist() == list(range(time + height, 16))


def test_the_frame_number_leaves_a_long_stream_alone() -> None:
    network = small_dynamics()
    inputs = random_frames(1, 4 * WINDOW)
    made = []
    for first in (0, 10_000):
        cache = new_cache(network, 1)
        cache.length += first
        velocities = []
        for t in range(4 * WINDOW):
            frame = [x[:, t : t + 1] for x in inputs]
            velocities.append(network.stream(cache, *frame, commit=0))
            network.stream(cache, *frame, commit=1)
        made.append(torch.cat(velocities, 1))
    # Beyond the reach of the empty slots that the second cache takes for frames.
    torch.testing.assert_close(made[0][:, 2 * WINDOW :], made[1][:, 2 * WINDOW :], **CLOSE)


def test_before_training_it_guesses_by_the_frame_before() -> None:
    network = Dynamics(DynamicsConfig(2, 4, 6, 2, 3, 32, 2, 2, WINDOW, recent=2))
    assert network.local is not None
    network.local.persistence.change.fill_(0.19)
    history, _, actions = random_frames(2, 5)
    still, levels = torch.zeros(2, 5), torch.ones(2, 5)
    noise = torch.randn_like(history)
    velocity = network.forward_two_copies(history, still, noise, levels, actions)
    # At level 1 the data is the noise less the velocity: 0.9 times the frame before.
    torch.testing.assert_close((noise - velocity)[:, 1:], 0.9 * history[:, :-1])
    torch.testing.assert_close((noise - velocity)[:, 0], torch.zeros(2, 2, 4, 6))


def test_the_frame_before_is_that_of_the_history() -> None:
    network = small_dynamics(recent=2)
    history, levels, actions = random_frames(2, 4)
    noisy, noisy_levels, _ = random_frames(2, 4, 1)
    made = network.forward_two_copies(history, levels, noisy, noisy_levels, actions)
    alone = [
        network(
            torch.cat((history[:, :t], noisy[:, t : t + 1]), 1),
            torch.cat((levels[:, :t], noisy_levels[:, t : t + 1]), 1),
            actions[:, : t + 1],
        )[:, -1]
        for t in range(4)
    ]
    torch.testing.assert_close(made, torch.stack(alone, 1), rtol=1e-4, atol=2e-5)
