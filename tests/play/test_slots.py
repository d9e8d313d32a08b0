from dataclasses import replace

import numpy as np
import pytest

from nfd_env.envs.single_env import NFDEnv
from nfd_env.play.game import Sampling
from nfd_env.play.slots import Slots
from tests.tiny_world import make_tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_tiny_world(tmp_path_factory.mktemp("world") / "tiny", hazard_bias=-30.0)


def close(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_a_slot_is_the_single_env_with_its_seed_drafts_or_not(world):
    slots = Slots(world, 3, "cpu")
    env = NFDEnv(world, device="cpu")
    frame, _ = env.reset(seed=7)
    slots.reset(0, 1)
    assert close(slots.reset(2, 7), frame)
    for i, action in enumerate([0, 1, 1, 2, 0, 2]):
        if i % 2:
            slots.draft({0: [0], 2: [0, 1, 2]})
            outcome = slots.take_drafts({2: action})[2]
            assert outcome.guessed
        else:
            outcome = slots.step({2: action, 0: 0})[2]
            assert not outcome.guessed
        frame, reward, *_ = env.step(action)
        assert close(outcome.frame, frame)
        assert outcome.reward == pytest.approx(reward, abs=1e-3)


def test_a_wrong_guess_leaves_no_trace(world):
    slots, plain = Slots(world, 1, "cpu"), Slots(world, 1, "cpu")
    slots.reset(0, 5), plain.reset(0, 5)
    slots.draft({0: [1]})
    assert slots.take_drafts({0: 2}) == {}
    assert not slots.has_draft(0)
    for action in (2, 2, 1):
        wanted = plain.step({0: action})[0].frame
        assert np.array_equal(slots.step({0: action})[0].frame, wanted)


def test_slots_may_sample_differently_in_one_go(world):
    slots = Slots(world, 2, "cpu")
    slots.reset(0, 3), slots.reset(1, 3)
    slots.set_sampling(1, Sampling(4))
    made = slots.step({0: 1, 1: 1})
    assert not np.array_equal(made[0].frame, made[1].frame)


def test_resets_go_on_to_the_next_episode_of_the_seed(world):
    slots = Slots(world, 2, "cpu")
    slots.reset(1, 3)
    slots.reset(1)
    env = NFDEnv(world, device="cpu")
    env.reset(seed=3)
    frame, _ = env.reset()
    assert close(slots.step({1: 0})[1].frame, env.step(0)[0])
    assert slots.seed_of(1) == 3


def test_speculation_goes_on_from_branch_to_branch(world):
    slots = Slots(world, 3, "cpu", speculative_frames=3)
    env = NFDEnv(world, device="cpu", speculative_frames=3)
    env.reset(seed=7)
    slots.reset(0, 1), slots.reset(2, 7)
    for i, action in enumerate([0, 0, 0, 1, 1, 2, 2, 2, 2, 0]):
        if i % 3 == 1:
            slots.draft({0: [0], 2: [0, 1, 2]})
            outcome = slots.take_drafts({2: action})[2]
        else:
            outcome = slots.step({2: action, 0: 0})[2]
        frame, _, _, _, info = env.step(action)
        assert close(outcome.frame, frame)
        counts = info["speculation"]
        known = max(1, counts["accepted"] + counts["dropped"])
        assert outcome.info["acceptance"] == pytest.approx(counts["accepted"] / known)
    assert counts["accepted"] == 5 and counts["dropped"] == 3


def test_speculation_is_switched_on_and_off_while_playing(world):
    slots = Slots(world, 2, "cpu")
    assert slots.default_sampling == Sampling(slots.default_sampling.steps)
    env = NFDEnv(world, device="cpu")
    env.reset(seed=7)
    slots.reset(0, 7), slots.reset(1, 1)
    # Off: what an env without speculation draws, although there is room for drafts.
    for action in (0, 0, 1, 1):
        outcome = slots.step({0: action, 1: 0})[0]
        assert "acceptance" not in outcome.info
        assert close(outcome.frame, env.step(action)[0])
    slots.set_sampling(0, replace(slots.default_sampling, speculation=True))
    rates = [slots.step({0: 2, 1: 0})[0].info["acceptance"] for _ in range(6)]
    assert rates[0] == 0 and rates[-1] == 1
    slots.set_sampling(0, slots.default_sampling)
    made = slots.step({0: 2, 1: 0})
    assert "acceptance" not in made[0].info


def test_a_slot_with_the_teacher_is_the_teachers_env_and_leaves_the_others_alone(tmp_path):
    both = make_tiny_world(tmp_path / "both", hazard_bias=-30.0, distilled=True)
    slots = Slots(both, 2, "cpu")
    steps = slots.steps_of
    assert steps and steps[0] < steps[1]
    slots.set_sampling(1, Sampling(2, teacher=True))
    envs = [
        NFDEnv(both, device="cpu", dynamics=name, sampling_steps=count)
        for name, count in (("student", steps[0]), ("teacher", 2))
    ]
    for slot, env in enumerate(envs):
        frame, _ = env.reset(seed=5)
        assert close(slots.reset(slot, 5), frame)
    for action in (1, 1, 0):
        made = slots.step({0: action, 1: action})
        own, other = np.empty(2), np.empty(2)
        for slot, env in enumerate(envs):
            frame = env.step(action)[0].astype(int)
            own[slot] = np.abs(frame - made[slot].frame).mean()
            other[slot] = np.abs(frame - made[1 - slot].frame).mean()
        assert own.max() < 0.3, own
    assert other.min() > 2 * own.max(), (own, other)
