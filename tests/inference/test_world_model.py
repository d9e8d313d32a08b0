from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nfd_env.flow.solvers import level_grid, sample_euler
from nfd_env.inference import cuda_graph
from nfd_env.inference.noise import mix
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.speculation import advance
from nfd_env.inference.state import Context, WorldState
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import load_world
from tests.tiny_world import noise_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(endless_world: Path) -> WorldModel:
    return load_world(endless_world, "cpu", "fp32").model


def context(count: int = 3, seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(
        torch.randn(count, 4, 4, 6, generator=generator),
        torch.randn(count, 3, generator=generator),
    )


def actions(batch: int, steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.one_hot(
        torch.randint(0, 3, (steps, batch), generator=generator), 3
    ).float()


def roll(model: WorldModel, state: WorldState, acts: Tensor) -> Tensor:
    return torch.stack([model.step(state, a).latents for a in acts])


def flat(state: WorldState) -> list[Tensor]:
    return [
        state.cache.keys,
        state.cache.values,
        state.cache.length,
        *vars(state.drawn).values(),
        state.action,
        state.keys,
    ]


def assert_unchanged(state: WorldState, before: WorldState) -> None:
    for now, then in zip(flat(state), flat(before), strict=True):
        assert torch.equal(now, then)
    assert state.frame == before.frame


SEEDS = [(7, 0), (8, 0), (7, 1), (9, 4)]


def start(model: WorldModel, rows: list[int]) -> WorldState:
    return model.start([context(r + 1, r) for r in rows], [SEEDS[r] for r in rows])


def test_same_seed_same_rollout_bit_for_bit(model: WorldModel) -> None:
    acts = actions(3, 12)
    first = roll(model, start(model, [0, 1, 2]), acts)
    torch.manual_seed(123)
    assert torch.equal(roll(model, start(model, [0, 1, 2]), acts), first)
    assert torch.isfinite(first).all()


def test_a_step_equals_the_windowed_forward_over_the_whole_history(model: WorldModel) -> None:
    """The cache, the pending frame and the fused pass together change nothing."""
    model = model.with_sampling(SamplingConfig(3, "euler", 1.0, 0.2))
    begin, seed, acts = context(3), (5, 0), actions(1, 12)
    state = model.start([begin], [seed])
    draws = [noise_of(model, seed, t) for t in range(15)]
    history = [torch.lerp(x, draws[t][1], 0.2) for t, x in enumerate(begin.latents)]
    into = list(begin.actions)
    for t in range(12):
        into.append(acts[t, 0])
        past = torch.stack(history)[None]

        def velocity(x: Tensor, level: float, past: Tensor = past) -> Tensor:
            levels = torch.full((1, past.shape[1] + 1), 0.2)
            levels[:, -1] = level
            return model.dynamics(torch.cat((past, x), 1), levels, torch.stack(into)[None])[:, -1:]

        noise = draws[t + 3][0][None, None]
        expected = sample_euler(velocity, noise, level_grid(3))[0, 0]
        made = model.step(state, acts[t]).latents[0]
        torch.testing.assert_close(made, expected, **CLOSE)
        history.append(torch.lerp(expected, draws[t + 3][1], 0.2))


def test_rewards_and_ends_are_read_off_the_drawn_frames(model: WorldModel) -> None:
    begin, acts = context(3), actions(1, 8)
    state = model.start([begin], [(1, 0)])
    seen = [model.step(state, a) for a in acts]
    latents = torch.cat([begin.latents[1:], *(s.latents for s in seen)])[None]
    into = torch.cat([begin.actions[1:], acts[:, 0]])[None]
    logits, _ = model.heads(latents, into, model.heads.initial_state(1))
    expected = model.heads.reward(logits)[0, 2:]
    torch.testing.assert_close(torch.cat([s.reward for s in seen]), expected, **CLOSE)
    hazard = torch.cat([s.hazard for s in seen])
    torch.testing.assert_close(hazard, logits[0, 2:, 0].sigmoid(), **CLOSE)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_rows_are_independent_of_the_batch(model: WorldModel, batch: int) -> None:
    rows = [i % 4 for i in range(batch)]
    acts = actions(4, 10)
    together = roll(model, start(model, rows), acts[:, rows])
    for place, row in enumerate(rows):
        alone = roll(model, start(model, [row]), acts[:, [row]])[:, 0]
        torch.testing.assert_close(together[:, place], alone, **CLOSE)


def test_noise_is_a_function_of_seed_episode_and_frame_alone(model: WorldModel) -> None:
    first = noise_of(model, (3, 1), 5)
    noise_of(model, (8, 0), 0)
    for a, b in zip(noise_of(model, (3, 1), 5), first, strict=True):
        assert torch.equal(a, b)
    for other in (((4, 1), 5), ((3, 2), 5), ((3, 1), 6), ((1, 3), 5)):
        assert not torch.equal(noise_of(model, *other)[0], first[0])
    assert not torch.equal(first[0], first[1])


def test_noise_and_uniform_numbers_have_their_distributions(model: WorldModel) -> None:
    draws = [noise_of(model, (seed, 0), frame) for seed in range(30) for frame in range(30)]
    noise = torch.stack([d[0] for d in draws])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    uniform = torch.stack([d[2] for d in draws])
    assert 0.45 < uniform.mean() < 0.55 and uniform.min() < 0.01 and uniform.max() > 0.99


def test_rows_of_different_lengths_start_as_they_would_alone(model: WorldModel) -> None:
    contexts = [context(count, seed) for seed, count in enumerate((3, 1, 14, 3))]
    whole, acts = model.start(contexts, SEEDS), actions(4, 6)
    assert whole.keys.tolist() == [mix(*seed) for seed in SEEDS]
    assert whole.frame == [2, 0, 4, 2]  # no more than 5 frames can be seen
    rolled = roll(model, whole, acts)
    for row, (one, seed) in enumerate(zip(contexts, SEEDS, strict=True)):
        alone = model.start([one], [seed])
        torch.testing.assert_close(rolled[:, [row]], roll(model, alone, acts[:, [row]]), **CLOSE)


def test_each_part_of_the_start_matters(model: WorldModel) -> None:
    acts = actions(1, 3)
    base = roll(model, model.start([context(3)], [(1, 0)]), acts)
    same = roll(model, model.start([context(3)], [(1, 0)]), acts)
    assert torch.equal(base, same)
    older = context(3).latents.clone()
    older[0] += 1
    into = context(3).actions.clone()
    into[1] += 1
    for begin, seed in (
        (context(3, 1), (1, 0)),
        (context(3), (2, 0)),
        (context(3), (1, 1)),
        (Context(older, context(3).actions), (1, 0)),
        (Context(context(3).latents, into), (1, 0)),
    ):
        other = roll(model, model.start([begin], [seed]), acts)
        assert (other - base).abs().max() > 1e-4


def test_features_are_what_ends_and_rewards_are_read_off(model: WorldModel) -> None:
    state, acts = model.start([context(3)], [(1, 0)]), actions(1, 4)
    made = [model.step(state, a) for a in acts]
    played = Context(
        torch.cat([context(3).latents, *(m.latents for m in made)]),
        torch.cat([context(3).actions, *acts]),
    )
    along = model.features_along(played)
    assert along.shape == (7, model.feature_size) == (7, 4 * 4 * 6 + model.heads.config.width)
    torch.testing.assert_close(along[:, :96], played.latents.flatten(1))
    memory = model.heads.initial_state(1)
    for number, (latents, into) in enumerate(zip(played.latents, played.actions, strict=True)):
        if number:
            memory = model.remember(latents[None], into[None], memory)
        seen = model.features(latents[None], into[None], memory)
        torch.testing.assert_close(seen[0], along[number], **CLOSE)
    torch.testing.assert_close(made[-1].memory, memory, **CLOSE)
    logits = model.heads.output(along[-1:, 96:])
    torch.testing.assert_close(logits[:, 0].sigmoid(), made[-1].hazard, **CLOSE)
    torch.testing.assert_close(model.heads.reward(logits), made[-1].reward, **CLOSE)


def test_of_a_long_context_frames_need_the_latest_and_heads_remember_all(model: WorldModel) -> None:
    reach = model.dynamics.config.window
    long = context(reach + 4)
    last = Context(long.latents[-reach:], long.actions[-reach:])
    acts = actions(1, 3)
    whole, part = (model.start([c], [(1, 0)]) for c in (long, last))
    into = model.heads(long.latents[None, 1:], long.actions[None, 1:], model.heads.initial_state(1))
    torch.testing.assert_close(whole.memory, into[1])
    assert (whole.memory - part.memory).abs().max() > 1e-4
    assert torch.equal(roll(model, whole, acts), roll(model, part, acts))


def test_stepping_a_fork_leaves_the_original_alone(model: WorldModel) -> None:
    state = start(model, [0, 1, 2])
    roll(model, state, actions(3, 7))
    before, acts = state.fork(), actions(3, 9, 1)
    fork = state.fork()
    ahead = roll(model, fork, acts)
    assert_unchanged(state, before)
    # And the other way round; a restored state replays exactly.
    kept = fork.fork()
    assert torch.equal(roll(model, state, acts), ahead)
    assert_unchanged(fork, kept)


def test_forks_part_where_their_actions_differ(model: WorldModel) -> None:
    state = start(model, [0])
    one, other = state.fork(), state.fork()
    acts = actions(1, 4)
    changed = acts.clone()
    changed[2] = acts[2].roll(1)
    a, b = roll(model, one, acts), roll(model, other, changed)
    assert torch.equal(a[:2], b[:2])
    assert (a[2:] - b[2:]).abs().amax((1, 2, 3, 4)).min() > 1e-5


def test_take(model: WorldModel) -> None:
    state = start(model, [0, 1, 2])
    roll(model, state, actions(3, 6))
    order = [2, 0, 0]
    taken = state.take(order)
    acts = actions(3, 6, 1)
    expected = roll(model, state.fork(), acts)
    made = roll(model, taken, acts[:, order])
    torch.testing.assert_close(made, expected[:, order], **CLOSE)
    assert taken.keys.tolist() == [mix(*SEEDS[i]) for i in order]


def test_put_replaces_its_rows_only(model: WorldModel) -> None:
    state, other = start(model, [0, 1, 2]), start(model, [3])
    roll(model, state, actions(3, 6))
    acts = actions(3, 6, 1)
    undisturbed = roll(model, state.fork(), acts)
    alone = roll(model, other.fork(), acts[:, [1]])
    source = other.fork()
    state.put([1], other)
    assert state.keys.tolist() == [mix(*SEEDS[i]) for i in (0, 3, 2)]
    assert state.frame == [6, 3, 8]
    made = roll(model, state, acts)
    assert torch.equal(made[:, [0, 2]], undisturbed[:, [0, 2]])
    torch.testing.assert_close(made[:, 1], alone[:, 0], **CLOSE)
    assert_unchanged(other, source)


def test_returned_tensors_are_not_views_of_the_state(model: WorldModel) -> None:
    acts = actions(2, 5)
    expected = roll(model, start(model, [0, 1]), acts)
    state, kept = start(model, [0, 1]), []
    with torch.inference_mode():
        for a in acts:
            step = model.step(state, a)
            kept.append(step.latents.clone())
            for tensor in (step.latents, step.reward, step.hazard):
                tensor.fill_(77.0)
            step.terminated.logical_not_()
    assert torch.equal(torch.stack(kept), expected)


def test_ends_are_drawn_with_the_predicted_probability(make_world: Callable[..., Path]) -> None:
    model = load_world(make_world(hazard_bias=-1.0), "cpu", "fp32").model
    state = model.start([context(2)] * 40, [(s, 0) for s in range(40)])
    seen = [model.step(state, a) for a in actions(40, 15)]
    ends = torch.stack([s.terminated for s in seen]).double()
    hazard = torch.stack([s.hazard for s in seen]).double()
    assert 0.05 < hazard.mean() < 0.95
    deviation = (hazard * (1 - hazard)).sum().sqrt()
    assert abs(ends.sum() - hazard.sum()) < 4 * deviation
    assert 0 < ends.sum() < ends.numel()


def test_with_sampling_leaves_the_original_alone(model: WorldModel) -> None:
    acts = actions(1, 3)
    before = roll(model, start(model, [0]), acts)
    finer = model.with_sampling(replace(model.sampling, steps=5))
    assert finer.dynamics is model.dynamics
    assert not torch.equal(roll(finer, start(finer, [0]), acts), before)
    assert torch.equal(roll(model, start(model, [0]), acts), before)


@pytest.mark.parametrize(("steps", "frames"), [(1, 3), (2, 3), (4, 1)])
def test_a_frame_costs_one_pass_a_denoising_step_and_a_reset_none(
    model: WorldModel, steps: int, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.with_sampling(SamplingConfig(steps))
    passes = 0
    run = model.dynamics._run

    def counted(*args):
        nonlocal passes
        passes += 1
        return run(*args)

    monkeypatch.setattr(model.dynamics, "_run", counted)
    state = model.start([context(1)], [(0, 0)])
    assert passes == 0
    roll(model, state, actions(1, frames))
    assert passes == steps * frames


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": -1}, {"sampler": "heun"}])
def test_sampling_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match="sampling_steps|sampler"):
        SamplingConfig(**wrong)


def test_frames_round_trip_shapes(model: WorldModel) -> None:
    frames = model.decode(torch.randn(2, 4, 4, 6))
    assert frames.shape == (2, 32, 48, 3) and frames.dtype == torch.uint8
    assert model.encode(frames).shape == (2, 4, 4, 6)


class Repeated:
    """Takes the place of a captured call where there is no GPU: it goes by its inputs alone."""

    def __call__(self, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
        first, again = (
            [x.clone() for x in function(*(i.clone() for i in inputs))] for _ in range(2)
        )
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        return again


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [3, 1, 0, 2, 2]])
def test_calls_that_are_captured_on_a_gpu_can_be_repeated(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch, rows: list[int], frames: int
) -> None:
    monkeypatch.setattr(cuda_graph, "CapturedCall", Repeated)
    capturing = model.with_sampling(model.sampling)
    capturing.captures = True
    contexts, seeds = [context(3, r) for r in rows], [SEEDS[r] for r in rows]
    mine, other = (m.start(contexts, seeds, frames) for m in (capturing, model))
    assert mine.batch == len(rows)
    acts = actions(len(rows), 12)
    for a in acts:
        drawn, expected = (m.draw(s, a, frames) for m, s in ((capturing, mine), (model, other)))
        for x, y in zip(vars(drawn).values(), vars(expected).values(), strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
        for state, made in ((mine, drawn), (other, expected)):
            state.drawn, state.action = made, a[:, None]
    copies = [state.fork() for state in (mine, other)]
    for a in acts:
        x, y = (advance(m, s, a).latents for m, s in zip((capturing, model), copies, strict=True))
        torch.testing.assert_close(x, y, **CLOSE)


def test_a_state_of_another_world_does_not_fit(
    model: WorldModel, make_world: Callable[..., Path]
) -> None:
    """Though all of its shapes are the same."""
    other = load_world(make_world(seed=1), "cpu", "fp32").model
    state = start(model, [0, 1])
    assert state.fork().world_id == state.take([1]).world_id == model.world_id != other.world_id
    model.check_fits(state, 1)
    with pytest.raises(ValueError, match="of another world"):
        other.check_fits(state, 1)
    with pytest.raises(ValueError, match="saved with speculative_frames=1.*has.*=2"):
        model.check_fits(state, 2)
    state.cache.keys = state.cache.keys.bfloat16()
    with pytest.raises(ValueError, match="use the same precision"):
        model.check_fits(state, 1)


def test_a_state_of_another_dynamics_does_not_fit(
    model: WorldModel, make_world: Callable[..., Path]
) -> None:
    """Though it has the same heads, which tell worlds apart, and the same keys."""
    other = load_world(make_world(recent=1, hazard_bias=-1000.0), "cpu", "fp32").model
    other.world_id = model.world_id
    state = start(model, [0, 1])
    with pytest.raises(ValueError, match="networks of other sizes"):
        other.check_fits(state, 1)
    del state.cache.last  # as in a state of an earlier version
    with pytest.raises(ValueError, match="networks of other sizes"):
        model.check_fits(state, 1)
