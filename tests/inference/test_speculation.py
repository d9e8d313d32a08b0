from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference.speculation import SpeculativeState, Speculator
from nfd_env.inference.world_model import Context, Drawn, SamplingConfig, WorldModel, WorldState
from nfd_env.models.dynamics import Dynamics
from nfd_env.worlds.load import load_world
from tests.tiny_world import noise_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
ONE_HOT = torch.eye(3)


@pytest.fixture(scope="module")
def model(endless_world: Path) -> WorldModel:
    return load_world(endless_world, "cpu", "fp32").model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Any]]:
    """(rows, frames, frames committed) of each call to ``Dynamics.stream``."""
    seen: list[tuple[int, int, Any]] = []
    stream = Dynamics.stream

    def counted(self, cache, latents, levels, actions, commit):
        seen.append((*latents.shape[:2], commit))
        return stream(self, cache, latents, levels, actions, commit)

    monkeypatch.setattr(Dynamics, "stream", counted)
    return seen


def contexts(rows: int) -> tuple[list[Context], list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 3, 4, 4, 6, generator=generator)
    return (
        [Context(x[: 1 + i % 3], torch.zeros(1 + i % 3, 3)) for i, x in enumerate(latents)],
        [(30 + i, 2) for i in range(rows)],
    )


def always(model: WorldModel, frames: int, **kwargs: Any) -> Speculator:
    return Speculator(model, frames, draft_cost=1.0, **kwargs)


class Reference:
    """A world that never drafts: told what was drawn, it says what follows."""

    def __init__(self, model: WorldModel, row: int, rows: int) -> None:
        begin, seeds = contexts(rows)
        self.model, self.state = model, model.start([begin[row]], [seeds[row]], frames=4)

    def expects(self, action: Tensor, count: int) -> Drawn:
        return self.model.draw(self.state.fork(), action[None], count)

    @torch.inference_mode()
    def happened(self, latents: Tensor, action: Tensor) -> None:
        """Append a frame to the history, one commit at a time."""
        state, level = self.state, self.model.sampling.history_level
        levels = torch.full((1, 1), level)
        self.model.dynamics.stream(state.cache, state.remembered, levels, state.action, commit=1)
        state.frame[0] += 1
        noise = noise_of(self.model, state.seeds[0], state.frame[0])[1]
        state.remembered = torch.lerp(latents[None, None], noise, level)
        state.action = action[None, None]
        state.memory = self.model.heads.step(latents[None], action[None], state.memory).state


def held_actions(rows: int, steps: int, seed: int, longest: int = 7) -> Tensor:
    """Actions held for 1 to ``longest`` steps, (steps, rows, 3)."""
    rng = np.random.default_rng(seed)
    columns = []
    for _ in range(rows):
        column: list[int] = []
        while len(column) < steps:
            column += [int(rng.integers(3))] * int(rng.integers(1, longest + 1))
        columns.append(column[:steps])
    return ONE_HOT[torch.tensor(columns).T]


@pytest.mark.parametrize(
    ("frames", "sampling"),
    [
        (2, SamplingConfig(1, "consistency")),
        (3, SamplingConfig(2, "consistency")),
        (4, SamplingConfig(3, "dpm_solver_pp")),
    ],
)
def test_every_frame_is_what_the_history_alone_gives(
    model: WorldModel, frames: int, sampling: SamplingConfig
) -> None:
    """Before and after each mismatch, at every row's own pace, through the ring and back."""
    model = model.with_sampling(sampling)
    rows, steps = 3, 40
    speculator = always(model, frames)
    state = speculator.start(*contexts(rows))
    references = [Reference(model, row, rows) for row in range(rows)]
    acts = held_actions(rows, steps, seed=frames)
    expected: list[Drawn | None] = [None] * rows
    place = [0] * rows
    reused = 0
    for t in range(steps):
        made = speculator.step(state, acts[t])
        for row, reference in enumerate(references):
            kept = t > 0 and torch.equal(acts[t, row], acts[t - 1, row])
            drafted = expected[row] if kept and place[row] + 1 < frames else None
            if drafted is None:
                drafted = reference.expects(acts[t, row], frames)
                expected[row], place[row] = drafted, 0
            else:
                place[row] += 1
                reused += 1
            for got, want in zip(vars(made).values(), drafted.outcome(), strict=True):
                torch.testing.assert_close(got[row], want[0, place[row]], **CLOSE)
            reference.happened(made.latents[row], acts[t, row])
    assert reused > 20
    assert state.counts[:, 1].sum() == reused


def test_frames_are_the_same_while_drafts_come_and_go(model: WorldModel) -> None:
    """Calm and erratic stretches: the state becomes narrow where drafts do not pay, and wide."""
    model = model.with_sampling(SamplingConfig(1, "consistency"))
    rows, frames = 2, 3
    speculator = Speculator(model, frames, draft_cost=2.3)
    state = speculator.start(*contexts(rows))
    references = [Reference(model, row, rows) for row in range(rows)]
    calm = ONE_HOT[[1, 2]].expand(25, -1, -1)
    acts = torch.cat((calm, random_actions(rows, 30), calm, calm, random_actions(rows, 30, 1)))
    expected: list[Drawn | None] = [None] * rows
    place, rooms = [0] * rows, []
    for t, act in enumerate(acts):
        ready = np.array(state.ready) > state.used
        made = speculator.step(state, act)
        rooms.append(state.room)
        for row, reference in enumerate(references):
            kept = t > 0 and bool(ready[row]) and torch.equal(act[row], acts[t - 1, row])
            drafted = expected[row]
            if drafted is None or not kept or state.used[row] == 1:
                drafted = reference.expects(act[row], frames)
                expected[row], place[row] = drafted, 0
            else:
                place[row] += 1
            for got, want in zip(vars(made).values(), drafted.outcome(), strict=True):
                torch.testing.assert_close(got[row], want[0, place[row]], **CLOSE)
            reference.happened(made.latents[row], act[row])
    assert sum(a != b for a, b in zip(rooms, rooms[1:], strict=False)) >= 3
    assert state.counts[:, 1].min() > 20


def test_rows_of_a_narrow_and_a_wide_state(model: WorldModel) -> None:
    rows = 3
    acts = held_actions(rows, 20, seed=5)
    wide, narrow = always(model, 4), Speculator(model, 4, draft_cost=1e9)
    states = [s.start(*contexts(rows)) for s in (wide, narrow)]
    for act in acts[:9]:
        for speculator, state in zip((wide, narrow), states, strict=True):
            speculator.step(state, act)
    assert [s.room for s in states] == [4, 1]
    kept = [s.fork() for s in states]
    ahead = [
        [speculator.step(state, act).latents for act in acts[9:]]
        for speculator, state in zip((wide, narrow), states, strict=True)
    ]
    for into in (0, 1):
        mixed = kept[into].fork()
        mixed.put([1], kept[1 - into].take([1]))
        assert mixed.room == 4
        row = [wide.step(mixed, act).latents[1] for act in acts[9:]]
        # Drafts may differ from frames drawn alone, but the first one may not.
        torch.testing.assert_close(row[0], ahead[1 - into][0][1], **CLOSE)
    assert [s.room for s in kept] == [4, 1]


def test_after_a_mismatch_everything_equals_a_run_that_never_drafted(model: WorldModel) -> None:
    frames, rows = 4, 2
    speculator = always(model, frames)
    state = speculator.start(*contexts(rows))
    references = [Reference(model, row, rows) for row in range(rows)]

    def agreed(action: Tensor) -> None:
        made = speculator.step(state, action)
        for row, reference in enumerate(references):
            reference.happened(made.latents[row], action[row])

    for _ in range(6):  # two of the second pass's four are used
        agreed(ONE_HOT[[1, 2]])
    assert state.ready == [4, 4] and state.used == [2, 2]
    changing = [0, 1, 2, 0, 2, 1, 0, 1, 0]
    for index in changing:
        made = speculator.step(state, ONE_HOT[[index, index]])
        for row, reference in enumerate(references):
            plain = model.step(reference.state, ONE_HOT[[index]])
            for got, want in zip(vars(made).values(), vars(plain).values(), strict=True):
                torch.testing.assert_close(got[row], want[0], **CLOSE)
            assert state.frame[row] == reference.state.frame[0]
            torch.testing.assert_close(state.memory[row, 0], reference.state.memory[0], **CLOSE)
            torch.testing.assert_close(
                state.remembered[row, 0], reference.state.remembered[0, 0], **CLOSE
            )
    for row, reference in enumerate(references):
        # The ring: what was committed is what the other run committed.
        mine, other = state.cache, reference.state.cache
        assert mine.length[row] == other.length[0] == state.frame[row]
        length = state.frame[row]
        sight = mine.sight
        seen = torch.arange(max(0, length - sight.window + 1), length) % mine.ring
        far = torch.arange(max(0, length - sight.reach + 1), length)
        far = far[far % sight.stride == 0] // sight.stride % mine.far_ring
        assert len(far)
        seen = torch.cat((seen, mine.ring + far))
        for ours, theirs in ((mine.keys, other.keys), (mine.values, other.values)):
            torch.testing.assert_close(ours[:, row, :, seen], theirs[:, 0, :, seen], **CLOSE)
    # A first draft was right six times, and then every one of three was wrong.
    assert state.report()["accepted"].tolist() == [4, 4]
    assert state.report()["dropped"].tolist() == [2 + 3 * (len(changing) - 1)] * 2


def test_a_hit_runs_no_pass_and_a_miss_one_for_all_rows(
    model: WorldModel, passes: list[tuple[int, int, Any]]
) -> None:
    model = model.with_sampling(SamplingConfig(1, "consistency"))
    speculator = always(model, 3)
    state = speculator.start([contexts(1)[0][0]] * 3, contexts(3)[1])
    passes.clear()
    speculator.step(state, ONE_HOT[[0, 1, 2]])
    assert passes == [(3, 1 + 3, 1)]
    speculator.step(state, ONE_HOT[[0, 1, 2]])
    assert len(passes) == 1
    speculator.step(state, ONE_HOT[[0, 1, 1]])
    assert passes[1:] == [(1, 2 + 3, 2)]
    # The first two rows used all three, the last its one: one pass, padded.
    speculator.step(state, ONE_HOT[[0, 1, 0]])
    assert passes[2:] == [(3, 3 + 3, [3, 3, 1])]


def test_an_end_drops_what_follows_it(make_world: Callable[..., Path]) -> None:
    model = load_world(make_world(hazard_bias=-1.0), "cpu", "fp32").model
    rows = 24
    begin = [contexts(1)[0][0]] * rows
    seeds = [(i, 0) for i in range(rows)]
    speculator = always(model, 4)
    state = speculator.start(begin, seeds)
    plain = model.start(begin, seeds, frames=4)
    action = ONE_HOT[[1] * rows]
    drawn = model.draw(plain, action, 4)
    made = [speculator.step(state, action) for _ in range(1)]
    for row in range(rows):
        ends = drawn.terminated[row].tolist()
        assert state.ready[row] == (ends.index(True) + 1 if True in ends else 4)
    assert len(set(state.ready)) > 2
    while len(made) < 4:
        active = np.array(state.ready) > state.used
        before = state.fork()
        made.append(speculator.step(state, action, active=active))
        for row in np.flatnonzero(~active):
            assert state.used[row] == before.used[row] and state.frame[row] == before.frame[row]
        for row in np.flatnonzero(active):
            for got, want in zip(vars(made[-1]).values(), drawn.outcome(), strict=True):
                torch.testing.assert_close(got[row], want[row, len(made) - 1], **CLOSE)
    drafted, accepted, dropped = state.counts.T
    assert (drafted == 3).all() and (accepted + dropped == 3).all() and 0 < dropped.sum()


def flat(state: WorldState) -> list[Any]:
    values = [state.cache.keys, state.cache.values, state.cache.length, state.action]
    if isinstance(state, SpeculativeState):
        values += [*vars(state.block).values(), state.used, state.ready, state.counts.tolist()]
    return [*values, state.seeds, state.frame]


def test_forks_in_the_middle_of_drafts(model: WorldModel) -> None:
    rows = 3
    speculator = always(model, 4)
    state = speculator.start(*contexts(rows))
    acts = held_actions(rows, 30, seed=5)
    for act in acts[:9]:
        speculator.step(state, act)
    assert any(r > u for r, u in zip(state.ready, state.used, strict=True))
    before, fork = state.fork(), state.fork()
    ahead = [speculator.step(fork, act).latents for act in acts[9:]]
    for now, then in zip(flat(state), flat(before), strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then
    again = [speculator.step(state, act).latents for act in acts[9:]]
    assert all(torch.equal(a, b) for a, b in zip(ahead, again, strict=True))
    order = [2, 0, 0]
    taken = before.take(order)
    made = [speculator.step(taken, act[order]).latents for act in acts[9:]]
    for a, b in zip(made, ahead, strict=True):
        torch.testing.assert_close(a, b[order], **CLOSE)
    # Into other rows, which go on as if nothing had been there.
    other = speculator.start(*contexts(rows))
    for act in acts[:3]:
        speculator.step(other, act)
    other.put([0, 2], before.take([1, 0]))
    made = [speculator.step(other, act[[1, 1, 0]]).latents for act in acts[9:]]
    for a, b in zip(made, ahead, strict=True):
        torch.testing.assert_close(a[[0, 2]], b[[1, 0]], **CLOSE)


# ------------------------------------------------------------------------- when it is not worth it


class Priced(WorldModel):
    """Draws nothing; its passes cost what they are told to on a clock of their own."""

    def __init__(self, model: WorldModel, price: Callable[[int, int], float]) -> None:
        self.__dict__.update(model.__dict__)
        self.price, self.time, self.drafting = price, 0.0, 0

    def draw(self, state, actions, count=1, pending_counts=None) -> Drawn:
        self.time += self.price(len(actions), count)
        self.drafting += count > 1
        zeros = torch.zeros(len(actions), count)
        frames = torch.zeros(len(actions), count, *self.dynamics.config.latent_shape)
        memory = torch.zeros(len(actions), count, state.memory.shape[-1])
        return Drawn(frames, zeros, zeros.bool(), zeros, frames, memory)


def seconds(
    model: WorldModel,
    price: Callable[[int, int], float],
    acts: Tensor,
    frames: int,
    cost: float | None = None,
) -> tuple[float, Priced]:
    priced = Priced(model, price)
    speculator = Speculator(priced, frames, draft_cost=cost, clock=lambda: priced.time)
    state = speculator.start(*contexts(acts.shape[1]))
    for act in acts:
        speculator.step(state, act)
    return priced.time, priced


def random_actions(rows: int, steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ONE_HOT[torch.randint(0, 3, (steps, rows), generator=generator)]


def price(rows: int, frames: int) -> float:
    """As on a small machine: a little for the pass, and much for each frame."""
    return 0.3 + rows * (0.2 + 0.5 * frames)


@pytest.mark.parametrize(("rows", "frames"), [(1, 2), (1, 4), (8, 2), (8, 4)])
def test_erratic_actions_cost_next_to_nothing(model: WorldModel, rows: int, frames: int) -> None:
    acts = random_actions(rows, 1500)
    took, priced = seconds(model, price, acts, frames)
    assert took <= 1.05 * price(rows, 1) * len(acts)
    assert priced.drafting < 0.05 * len(acts)


def test_parts_of_a_batch_that_cost_more_do_not_make_drafts_look_cheap(model: WorldModel) -> None:
    """Only drafts leave parts of a batch to draw; without them it is drawn whole."""

    def moving(rows: int, frames: int) -> float:
        return price(rows, frames) + (0 if rows == 8 else 24)

    acts = random_actions(8, 1500)
    took, priced = seconds(model, moving, acts, 4)
    assert took <= 1.05 * price(8, 1) * len(acts)
    assert priced.drafting < 0.05 * len(acts)


def test_drafts_that_promise_more_than_they_keep_are_refused(model: WorldModel) -> None:
    """Cheap while all rows draw together, and dear once they run out at different times."""

    def scattered(rows: int, frames: int) -> float:
        return price(rows, frames) / (1.5 if frames > 1 and rows == 8 else 1) + 4 * (rows < 8)

    acts = held_actions(8, 2000, seed=0, longest=20)
    took, priced = seconds(model, scattered, acts, 4)
    assert took <= 1.05 * price(8, 1) * len(acts)
    assert priced.drafting > 5
    always_drafting, _ = seconds(model, scattered, acts, 4, cost=1.0)
    assert always_drafting > 1.2 * price(8, 1) * len(acts)


@pytest.mark.parametrize("rows", [1, 8])
def test_kept_actions_are_drafted_for(model: WorldModel, rows: int) -> None:
    acts = held_actions(rows, 600, seed=0, longest=30)
    took, _ = seconds(model, price, acts, 2)
    whole, _ = seconds(model, price, acts, 2, cost=1.0)
    assert took <= 1.03 * whole < 0.95 * price(rows, 1) * len(acts)


def test_drafting_begins_again_when_the_actions_calm_down(model: WorldModel) -> None:
    erratic, calm = random_actions(1, 800), ONE_HOT[:1].expand(800, 1, -1)
    _, first = seconds(model, price, erratic, 4)
    _, both = seconds(model, price, torch.cat((erratic, calm)), 4)
    assert both.drafting - first.drafting > 180  # of the 200 that there could be


def test_a_change_of_the_machine_is_noticed(model: WorldModel) -> None:
    """Drafts that cost nothing while the machine is idle and much once it is not."""
    acts = held_actions(1, 1600, seed=1)
    passes = 0

    def changing(rows: int, frames: int) -> float:
        nonlocal passes
        passes += 1
        return 1.0 if passes < 300 or frames == 1 else 6.0

    _, priced = seconds(model, changing, acts, 4)
    assert 100 < priced.drafting < 400


def test_a_given_cost_decides_without_a_clock(model: WorldModel) -> None:
    acts = random_actions(2, 60)

    def broken() -> float:
        raise AssertionError("the clock was asked for")

    for cost, drafting in ((1.0, 60), (100.0, 0)):
        priced = Priced(model, price)
        speculator = Speculator(priced, 3, draft_cost=cost, clock=broken)
        state = speculator.start(*contexts(2))
        for act in acts:
            speculator.step(state, act)
        assert (priced.drafting > 0.8 * drafting) == (drafting > 0)


# ---------------------------------------------------------------------------------------- as an env


def make(world: Path, num_envs: int = 3, **kwargs: Any) -> NFDVectorEnv:
    values = {"device": "cpu", "precision": "fp32", "obs_type": "latent", **kwargs}
    values.setdefault("draft_cost", 1.0)
    return NFDVectorEnv(world, num_envs, **values)


def env_actions(rows: int, steps: int, seed: int = 0) -> np.ndarray:
    return held_actions(rows, steps, seed).argmax(-1).numpy()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_same_seed_same_rollout_and_slots_are_independent(hasty_world: Path, mode: str) -> None:
    acts = env_actions(3, 40)
    runs = []
    for count in (3, 3, 1):
        env = make(hasty_world, count, speculative_frames=3, autoreset_mode=mode)
        env.reset(seed=5)
        runs.append([env.step(a[:count]) for a in acts])
    for one, other, alone in zip(*runs, strict=True):
        for a, b, c in zip(one[:4], other[:4], alone[:4], strict=True):
            assert np.array_equal(a, b)
            np.testing.assert_allclose(a[0], c[0], rtol=1e-3, atol=1e-4)
    ends = np.array([step[2] for step in runs[0]])
    assert ends.sum() > 5
    report = runs[0][-1][4]["speculation"]
    assert report["accepted"].min() > 0
    assert (report["drafted"] >= report["accepted"] + report["dropped"]).all()
    assert all(v.dtype == np.int64 and v.shape == (3,) for v in report.values())


def test_a_new_episode_knows_nothing_of_the_drafts_before(endless_world: Path) -> None:
    env, fresh = (
        make(endless_world, 2, speculative_frames=4, autoreset_mode="Disabled") for _ in range(2)
    )
    env.reset(seed=1)
    env.step([1, 1])
    fresh.reset(seed=9)
    env.reset(seed=[9, 10])
    for a in ([1, 1], [1, 1], [0, 1]):
        one, other = env.step(a), fresh.step(a)
        for x, y in zip(one[:4], other[:4], strict=True):
            assert np.array_equal(x, y)
        for name, count in one[4]["speculation"].items():
            assert np.array_equal(count, other[4]["speculation"][name])
    # Without a seed the slot goes on counting, and what waited is dropped.
    env.reset(options={"reset_mask": np.array([True, False])})
    counts = env.step([0, 1])[4]["speculation"]
    assert counts["drafted"].tolist() == [9, 3] and counts["accepted"].tolist() == [1, 3]
    assert counts["dropped"].tolist() == [2 + 3, 0]


def test_gymnasiums_check(endless_world: Path) -> None:
    env = NFDEnv(endless_world, "cpu", speculative_frames=2, draft_cost=1.0)
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("frames", [2, 4])
def test_saved_states_in_the_middle_of_drafts(endless_world: Path, frames: int) -> None:
    acts = env_actions(3, 40, 3)
    env = make(endless_world, speculative_frames=frames)
    env.reset(seed=0)
    for a in acts[:13]:
        env.step(a)
    saved = env.save_state()
    some = env.save_state([2, 0])
    ahead = [env.step(a)[0] for a in acts[13:]]
    env.restore_state(saved)
    again = [env.step(a)[0] for a in acts[13:]]
    assert all(np.array_equal(a, b) for a, b in zip(ahead, again, strict=True))
    branch = make(endless_world, 2, speculative_frames=frames)
    branch.restore_state(some)
    for a, want in zip(acts[13:], ahead, strict=True):
        np.testing.assert_allclose(branch.step(a[[2, 0]])[0], want[[2, 0]], rtol=1e-3, atol=1e-4)
    env.restore_state(branch.save_state([1]), rows=[1])
    assert env.frames().shape == (3, 32, 48, 3)


def test_states_of_other_speculation_do_not_fit(endless_world: Path) -> None:
    plain, two = make(endless_world), make(endless_world, speculative_frames=2)
    for env in (plain, two):
        env.reset(seed=0)
    for env, other in ((plain, two), (two, plain)):
        before = env.frames()
        with pytest.raises(ValueError, match="speculative_frames"):
            env.restore_state(other.save_state())
        with pytest.raises(ValueError, match="speculative_frames"):
            env.restore_state(other.save_state([0]), rows=[1])
        assert torch.equal(env.frames(), before)


@pytest.mark.parametrize("frames", [0, -1, 5, 100, 1.5, None])
def test_frames_out_of_range(endless_world: Path, frames: Any) -> None:
    with pytest.raises(
        ValueError, match="speculative_frames must be a whole number from 1 .* to 4"
    ):
        make(endless_world, speculative_frames=frames)


@pytest.mark.parametrize("cost", [0, -1.0])
def test_costs_out_of_range(endless_world: Path, cost: float) -> None:
    with pytest.raises(ValueError, match="draft_cost"):
        make(endless_world, speculative_frames=2, draft_cost=cost)


def test_single_env(endless_world: Path) -> None:
    env = NFDEnv(
        endless_world,
        "cpu",
        speculative_frames=2,
        draft_cost=1.0,
        obs_type="latent",
        precision="fp32",
    )
    vector = make(endless_world, 1, speculative_frames=2)
    env.reset(seed=3)
    vector.reset(seed=3)
    for a in env_actions(1, 12):
        one, many = env.step(int(a[0])), vector.step(a)
        assert np.array_equal(one[0], many[0][0])
    assert one[4]["speculation"] == {
        k: int(v[0]) for k, v in many[4]["speculation"].items() if not k.startswith("_")
    }
    assert one[4]["speculation"]["accepted"] > 2


# -------------------------------------------------------------------------------------- frame skip


@pytest.mark.parametrize(("skip", "frames", "per_step"), [(4, 4, 1), (4, 2, 2), (2, 4, 0.5)])
def test_a_frame_skip_is_drawn_jointly(
    endless_world: Path,
    passes: list[tuple[int, int, Any]],
    skip: int,
    frames: int,
    per_step: float,
) -> None:
    env = make(endless_world, 2, frame_skip=skip, speculative_frames=frames, sampling_steps=1)
    env.reset(seed=0)
    passes.clear()
    for _ in range(6):
        info = env.step([0, 1])[4]
    assert len(passes) == 6 * per_step
    assert info["speculation"]["dropped"].tolist() == [0, 0]


def test_a_skip_is_drawn_jointly_even_where_speculation_does_not_pay(
    endless_world: Path, passes: list[tuple[int, int, Any]]
) -> None:
    env = make(
        endless_world, 1, frame_skip=2, speculative_frames=4, sampling_steps=1, draft_cost=100.0
    )
    env.reset(seed=0)
    passes.clear()
    for a in (0, 1, 2):
        info = env.step([a])[4]
    assert [frames - commit for _, frames, commit in passes] == [2, 2, 2]
    assert info["speculation"]["dropped"].tolist() == [0]


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_rewards_hazards_and_ends_inside_a_joint_skip(hasty_world: Path, frames: int) -> None:
    """A skip of k equals k steps of one, summed up to the end, whatever is drawn jointly."""
    skip = 4
    env = make(
        hasty_world, 3, frame_skip=skip, speculative_frames=frames, autoreset_mode="Disabled"
    )
    single = make(hasty_world, 3, speculative_frames=frames, autoreset_mode="Disabled")
    inside = 0
    for episode in range(6):
        start = 10 * episode
        env.reset(seed=start)
        single.reset(seed=start)
        for action in ([0, 1, 2], [0, 2, 2], [1, 1, 0]):
            latents, rewards, terminated, _, info = env.step(action)
            total, alive = np.zeros(3), np.ones(3, bool)
            survival, last = np.ones(3), latents.copy()
            for k in range(skip):
                single._ended[:] = False
                assert isinstance(single._state, SpeculativeState)
                assert single._speculator is not None
                codes = single.world.codec.encode(torch.tensor(action))
                made = single._speculator.step(single._state, codes, 1, alive.copy())
                total[alive] += made.reward.numpy()[alive]
                survival[alive] *= 1 - made.hazard.numpy()[alive]
                last[alive] = made.latents.numpy()[alive]
                ended = made.terminated.numpy() & alive
                inside += int(ended.sum()) if k < skip - 1 else 0
                alive &= ~ended
            np.testing.assert_allclose(rewards, total, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(info["hazard"], 1 - survival, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(latents, last, rtol=1e-3, atol=1e-4)
            assert np.array_equal(terminated, ~alive)
            if terminated.any():
                break
    assert inside >= 3


def test_frames_after_an_end_inside_a_skip_leave_no_trace(hasty_world: Path) -> None:
    """The episode after it is the one that a fresh env plays."""
    kwargs: dict[str, Any] = {
        "frame_skip": 4,
        "speculative_frames": 4,
        "autoreset_mode": "SameStep",
    }
    env = make(hasty_world, 1, **kwargs)
    env.reset(seed=0)
    acts = env_actions(1, 200, 2)
    for t in range(100):
        if env.step(acts[t])[2][0]:
            break
    follows = [env.step(a) for a in acts[t + 1 : t + 8]]
    fresh = make(hasty_world, 1, **kwargs)
    fresh.reset(seed=0)
    fresh.reset()
    for a, want in zip(acts[t + 1 : t + 8], follows, strict=True):
        got = fresh.step(a)
        for x, y in zip(got[:4], want[:4], strict=True):
            assert np.array_equal(x, y)


# ------------------------------------------------------------------------------------ passes a step


@pytest.mark.parametrize("num_envs", [1, 3])
def test_one_consistency_step_is_exactly_one_pass_an_env_step(
    endless_world: Path, passes: list[tuple[int, int, Any]], num_envs: int
) -> None:
    env = make(endless_world, num_envs)
    env.model = env.model.with_sampling(SamplingConfig(1, "consistency"))
    env.reset(seed=0)
    passes.clear()
    for step, a in enumerate(env_actions(num_envs, 8), 1):
        env.step(a)
        assert passes == [(num_envs, 2, 1)] * step
