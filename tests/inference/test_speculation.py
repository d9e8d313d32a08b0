from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.inference import speculation
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.speculation import FURTHER_FRAME, advance, worthwhile
from nfd_env.inference.state import Context, Drawn, Transition, WorldState
from nfd_env.inference.world_model import WorldModel
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


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further frames cost nothing, so that drafts are always made."""
    monkeypatch.setattr(speculation, "FURTHER_FRAME", 0.0)


@pytest.fixture
def priced(free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are made where they are expected to pay."""
    monkeypatch.setattr(speculation, "FURTHER_FRAME", FURTHER_FRAME)


class Drafting:
    """A model that draws so many frames in a pass."""

    def __init__(self, model: WorldModel, frames: int) -> None:
        self.model, self.frames = model, frames

    def start(self, begin: list[Context], seeds: list[tuple[int, int]]) -> WorldState:
        return self.model.start(begin, seeds, self.frames)

    def step(self, state: WorldState, actions: Tensor, **kwargs: Any) -> Transition:
        return advance(self.model, state, actions, **kwargs)


def outcome(made: Transition | Drawn) -> list[Tensor]:
    return [made.latents, made.reward, made.terminated, made.hazard, made.memory]


class Reference:
    """A world that never drafts: told what was drawn, it says what follows."""

    def __init__(self, model: WorldModel, row: int, rows: int) -> None:
        begin, seeds = contexts(rows)
        self.model, self.seed = model, seeds[row]
        # Room for as many frames as there are to be drawn, but none is drafted.
        self.state = model.start([begin[row]], [seeds[row]], frames=4)

    def expects(self, action: Tensor, count: int) -> Drawn:
        return self.model.draw(self.state.fork(), action[None], count)

    @torch.inference_mode()
    def happened(self, latents: Tensor, action: Tensor) -> None:
        """Append a frame to the history, one commit at a time."""
        state, level = self.state, self.model.sampling.history_level
        before = state.last.memory
        remembered = state.drawn.remembered[:, :1]
        levels = torch.full((1, 1), level)
        self.model.dynamics.stream(state.cache, remembered, levels, state.action, commit=1)
        noise = noise_of(self.model, self.seed, state.frame[0])[1]
        memory = self.model.heads.step(latents[None], action[None], before).state
        state.drawn = replace(
            state.drawn,
            remembered=torch.lerp(latents[None, None], noise, level),
            memory=memory[:, None],
        )
        state.action = action[None, None]

    @torch.inference_mode()
    def steps(self, action: Tensor) -> Transition:
        """Draw the next frame, alone."""
        drawn = self.expects(action, 1)
        self.happened(drawn.latents[0, 0], action)
        return drawn.transition(0)


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
    speculator = Drafting(model, frames)
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
            for got, want in zip(outcome(made), outcome(drafted), strict=True):
                torch.testing.assert_close(got[row], want[0, place[row]], **CLOSE)
            reference.happened(made.latents[row], acts[t, row])
    assert reused > 20
    assert state.counts[:, 1].sum() == reused


def test_frames_are_the_same_while_drafts_come_and_go(model: WorldModel, priced: None) -> None:
    """Calm and erratic stretches, in which drafts are made and not."""
    model = model.with_sampling(SamplingConfig(1, "consistency"))
    rows, frames = 2, 3
    speculator = Drafting(model, frames)
    state = speculator.start(*contexts(rows))
    references = [Reference(model, row, rows) for row in range(rows)]
    calm = ONE_HOT[[1, 2]].expand(25, -1, -1)
    acts = torch.cat((calm[:9], erratic(rows, 20), calm, erratic(rows, 20)))
    expected: list[Drawn | None] = [None] * rows
    place, ready = [0] * rows, []
    for t, act in enumerate(acts):
        waiting = state.ready > state.used
        made = speculator.step(state, act)
        ready.append(int(state.ready[0]))
        for row, reference in enumerate(references):
            kept = t > 0 and bool(waiting[row]) and torch.equal(act[row], acts[t - 1, row])
            drafted = expected[row]
            if drafted is None or not kept or state.used[row] == 1:
                drafted = reference.expects(act[row], frames)
                expected[row], place[row] = drafted, 0
            else:
                place[row] += 1
            for got, want in zip(outcome(made), outcome(drafted), strict=True):
                torch.testing.assert_close(got[row], want[0, place[row]], **CLOSE)
            reference.happened(made.latents[row], act[row])
    assert sum(a != b for a, b in zip(ready, ready[1:], strict=False)) >= 3
    assert set(ready) == {1, frames}
    assert state.counts[:, 1].min() > 10


def test_after_a_mismatch_everything_equals_a_run_that_never_drafted(model: WorldModel) -> None:
    frames, rows = 4, 2
    speculator = Drafting(model, frames)
    state = speculator.start(*contexts(rows))
    references = [Reference(model, row, rows) for row in range(rows)]

    def agreed(action: Tensor) -> None:
        made = speculator.step(state, action)
        for row, reference in enumerate(references):
            reference.happened(made.latents[row], action[row])

    for _ in range(6):  # two of the second pass's four are used
        agreed(ONE_HOT[[1, 2]])
    assert state.ready.tolist() == [4, 4] and state.used.tolist() == [2, 2]
    changing = [0, 1, 2, 0, 2, 1, 0, 1, 0]
    for index in changing:
        made = speculator.step(state, ONE_HOT[[index, index]])
        for row, reference in enumerate(references):
            plain = reference.steps(ONE_HOT[index])
            for got, want in zip(outcome(made), outcome(plain), strict=True):
                torch.testing.assert_close(got[row], want[0], **CLOSE)
            assert state.frame[row] == reference.state.frame[0]
            torch.testing.assert_close(state.memory[row], reference.state.memory[0], **CLOSE)
            torch.testing.assert_close(
                state.drawn.remembered[row, 0], reference.state.drawn.remembered[0, 0], **CLOSE
            )
    for row, reference in enumerate(references):
        # The ring: what was committed is what the other run committed.
        mine, other = state.cache, reference.state.cache
        length = state.frame[row]
        assert mine.length[row] == other.length[0] == length
        seen = torch.arange(max(0, length - mine.window + 1), length) % mine.ring
        for ours, theirs in ((mine.keys, other.keys), (mine.values, other.values)):
            torch.testing.assert_close(ours[:, row, :, seen], theirs[:, 0, :, seen], **CLOSE)
    # A first draft was right six times, and then every one of three was wrong.
    assert state.report()["accepted"].tolist() == [4, 4]
    assert state.report()["dropped"].tolist() == [2 + 3 * (len(changing) - 1)] * 2


def test_a_hit_runs_no_pass_and_a_miss_one_for_all_rows(
    model: WorldModel, passes: list[tuple[int, int, Any]]
) -> None:
    model = model.with_sampling(SamplingConfig(1, "consistency"))
    speculator = Drafting(model, 3)
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
    speculator = Drafting(model, 4)
    state = speculator.start(begin, seeds)
    plain = model.start(begin, seeds, frames=4)
    action = ONE_HOT[[1] * rows]
    drawn = model.draw(plain, action, 4)
    made = [speculator.step(state, action) for _ in range(1)]
    for row in range(rows):
        ends = drawn.terminated[row].tolist()
        assert state.ready[row] == (ends.index(True) + 1 if True in ends else 4)
    assert len(set(state.ready.tolist())) > 2
    while len(made) < 4:
        active = state.ready > state.used
        before = state.fork()
        made.append(speculator.step(state, action, active=active))
        for row in np.flatnonzero(~active):
            assert state.used[row] == before.used[row] and state.frame[row] == before.frame[row]
        for row in np.flatnonzero(active):
            for got, want in zip(outcome(made[-1]), outcome(drawn), strict=True):
                torch.testing.assert_close(got[row], want[row, len(made) - 1], **CLOSE)
    drafted, accepted, dropped = state.counts.T
    assert (drafted == 3).all() and (accepted + dropped == 3).all() and 0 < dropped.sum()


def flat(state: WorldState) -> list[Any]:
    arrays = [state.used, state.ready, state.counts, state.kept]
    return [
        state.cache.keys,
        state.cache.values,
        *state.cache.ends,
        state.action,
        state.keys,
        *vars(state.drawn).values(),
        *(torch.from_numpy(array) for array in arrays),
    ]


def test_forks_in_the_middle_of_drafts(model: WorldModel) -> None:
    rows = 3
    speculator = Drafting(model, 4)
    state = speculator.start(*contexts(rows))
    acts = held_actions(rows, 30, seed=5)
    for act in acts[:9]:
        speculator.step(state, act)
    assert (state.ready > state.used).any()
    before, fork = state.fork(), state.fork()
    ahead = [speculator.step(fork, act).latents for act in acts[9:]]
    for now, then in zip(flat(state), flat(before), strict=True):
        assert torch.equal(now, then)
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


def erratic(rows: int, steps: int) -> Tensor:
    """Actions that are never kept."""
    return ONE_HOT[(torch.arange(steps)[:, None] + torch.arange(rows)) % 3]


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_what_is_worthwhile(frames: int, priced: None) -> None:
    kept = np.linspace(0, 1, 101)
    counts = worthwhile(kept, 1, frames)
    assert set(counts[kept < 0.35]) == {1} and set(counts[kept > 0.65]) == {frames}
    assert (np.diff(counts) >= 0).all()
    used = (kept[:, None] ** np.arange(frames)).sum(1)
    pays = used >= 1 + FURTHER_FRAME * (frames - 1)
    assert np.array_equal(counts > 1, pays)
    # What is certain is drawn jointly in any case.
    assert set(worthwhile(kept, 2, frames)) <= {2, frames}
    assert set(worthwhile(kept, frames + 3, frames)) == {frames}


@pytest.mark.parametrize("frames", [2, 4])
def test_erratic_actions_are_hardly_drafted_for(
    model: WorldModel, frames: int, priced: None
) -> None:
    """A new episode is thought to be calm until its actions say otherwise."""
    speculator = Drafting(model, frames)
    state = speculator.start(*contexts(2))
    acts = erratic(2, 40)
    for act in acts[:15]:
        speculator.step(state, act)
    begun = state.counts[:, 0].copy()
    assert (begun > 0).all()
    for act in acts[15:]:
        speculator.step(state, act)
    assert np.array_equal(state.counts[:, 0], begun)
    for _ in range(40):  # until it has calmed down
        speculator.step(state, acts[0])
    assert (state.counts[:, 1] >= 10).all()


@pytest.mark.parametrize("frames", [2, 4])
def test_rollouts_depend_on_ones_own_seed_and_actions_alone(
    model: WorldModel, frames: int, priced: None
) -> None:
    """Not on time, on other draws or on the neighbours: what is drafted, and what is drawn."""
    speculator = Drafting(model, frames)
    begin, seeds = contexts(4)
    # Rows of every temper, so that some draft while others do not.
    tempers = [held_actions(1, 40, seed=row, longest=2 * row)[:, 0] for row in range(1, 4)]
    tempers = [erratic(1, 40)[:, 0], *tempers]
    runs: dict[tuple[int, ...], tuple[list[Tensor], np.ndarray]] = {}

    def play(rows: list[int]) -> tuple[list[Tensor], np.ndarray]:
        state = speculator.start([begin[r] for r in rows], [seeds[r] for r in rows])
        acts = torch.stack([tempers[r] for r in rows], 1)
        made = [speculator.step(state, act).latents for act in acts]
        return made, state.counts

    for rows in ([0, 1, 2, 3], [3, 0], [2], [1, 1, 2], [0]):
        for repeat in range(2):
            torch.manual_seed(repeat)
            made, counts = play(rows)
            first = runs.setdefault(tuple(rows), (made, counts))
            assert all(torch.equal(a, b) for a, b in zip(made, first[0], strict=True))
            assert np.array_equal(counts, first[1])
    whole, counts = runs[0, 1, 2, 3]
    assert counts[:, 1].max() > 10 > counts[:, 1].min()
    for rows, (made, mine) in runs.items():
        assert np.array_equal(mine, counts[list(rows)])
        for a, b in zip(made, whole, strict=True):
            torch.testing.assert_close(a, b[list(rows)], **CLOSE)


def test_nothing_is_drafted_where_it_is_switched_off(model: WorldModel) -> None:
    speculator = Drafting(model, 4)
    state, plain = speculator.start(*contexts(3)), model.start(*contexts(3))
    for _ in range(6):
        made = speculator.step(state, ONE_HOT, drafting=False)
        expected = model.step(plain, ONE_HOT)
        torch.testing.assert_close(made.latents, expected.latents, **CLOSE)
    assert not state.counts.any()


# ---------------------------------------------------------------------------------------- as an env


def make(world: Path, num_envs: int = 3, **kwargs: Any) -> NFDVectorEnv:
    values = {"device": "cpu", "precision": "fp32", "obs_type": "latent", **kwargs}
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
    env = NFDEnv(endless_world, "cpu", speculative_frames=2)
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


def test_single_env(endless_world: Path) -> None:
    env = NFDEnv(
        endless_world,
        "cpu",
        speculative_frames=2,
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
    endless_world: Path, passes: list[tuple[int, int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "FURTHER_FRAME", 1.0)
    env = make(endless_world, 1, frame_skip=2, speculative_frames=4, sampling_steps=1)
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
            assert single._now is not None
            whole = single._now.world.fork()  # goes on behind the ends, for the hazard
            for k in range(skip):
                single._now.ended[:] = False
                codes = single.world.codec.encode(torch.tensor(action))
                survival *= 1 - advance(single.model, whole, codes, skip - k).hazard.numpy()
                made = advance(single.model, single._now.world, codes, 1, alive.copy())
                total[alive] += made.reward.numpy()[alive]
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
    env.sampling = SamplingConfig(1, "consistency")
    env.reset(seed=0)
    passes.clear()
    for step, a in enumerate(env_actions(num_envs, 8), 1):
        env.step(a)
        assert passes == [(num_envs, 2, 1)] * step
