"""The world and its real game, switched at the same moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.metrics import psnr
from nfd_env.play.engine import Engine
from nfd_env.play.game import side_by_side
from nfd_env.play.recorder import PlayRecorder
from nfd_env.play.session import ControlError, Session
from nfd_env.play.twin import TwinSlots
from nfd_env.sources.spec import SourceError
from tests.tiny_world import make_tiny_world


class Real(gymnasium.Env):
    """Its brightness counts its steps; it ends after ``end_at`` of them."""

    def __init__(self, shape: tuple[int, ...], end_at: int = 100, fail_at: int = 100) -> None:
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(3)
        self.end_at, self.fail_at, self.closed = end_at, fail_at, False
        self.seeds: list[int | None] = []
        self.actions: list[int] = []

    def _frame(self) -> np.ndarray:
        return np.full(self.observation_space.shape, 10 + len(self.actions), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seeds.append(seed)
        self.actions = []
        return self._frame(), {}

    def step(self, action: Any) -> Any:
        self.actions.append(int(action))
        if len(self.actions) == self.fail_at:
            raise RuntimeError("engine lost")
        return self._frame(), 2.0, len(self.actions) == self.end_at, False, {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_world(tmp_path_factory.mktemp("world") / "tiny", hazard_bias=-30.0)


def twin(world: Path, count: int = 1, **how: int) -> tuple[TwinSlots, list[Real]]:
    made: list[Real] = []

    def make() -> Real:
        made.append(Real(slots.frame_shape, **how))
        return made[-1]

    slots = TwinSlots(make, world, count, "cpu")
    return slots, made


def test_the_dream_goes_on_from_the_games_last_frames(world: Path) -> None:
    slots, made = twin(world, 2)
    slots.reset(0, 5), slots.reset(1, 9)
    frame = slots.set_view(0, "real")
    assert (frame == 10).all() and made[0].seeds == [5]
    for action in (1, 2, 0, 1):
        outcome = slots.step({0: action, 1: 0})
        assert outcome[0].reward == 2 and not outcome[0].dreamed and outcome[1].dreamed
    assert made[0].actions == [1, 2, 0, 1] and (outcome[0].frame == 14).all()
    frame = slots.set_view(0, "dream")
    # What an env makes of these very frames.
    env = NFDVectorEnv(world, 1, "cpu", obs_type="rgb")
    frames = np.stack([np.full(slots.frame_shape, 10 + i, np.uint8) for i in range(5)])
    context = {"frames": frames, "actions": np.array([1, 2, 0, 1])}
    env.reset(seed=[5])
    wanted, _ = env.reset(options={"context": context})
    assert np.abs(frame.astype(int) - wanted[0]).max() <= 1
    wanted = env.step(np.array([2]))[0]
    assert np.abs(slots.step({0: 2})[0].frame.astype(int) - wanted[0]).max() <= 2


def test_the_game_waits_while_the_world_dreams(world: Path) -> None:
    slots, made = twin(world, end_at=6)
    slots.reset(0, 5)
    slots.set_view(0, "real")
    slots.step({0: 1}), slots.step({0: 2})
    slots.set_view(0, "dream")
    slots.step({0: 0})
    slots.reset(0)  # the dream may end and begin again meanwhile
    slots.step({0: 0})
    assert (slots.set_view(0, "real") == 12).all()
    assert made[0].seeds == [5] and made[0].actions == [1, 2]
    assert (slots.step({0: 0})[0].frame == 13).all()
    slots.set_view(0, "dream")
    assert (slots.set_view(0, "split") == 13).all() and slots.beside(0) is not None
    # What the dream goes on from is what it would have been without the change there and back.
    env = NFDVectorEnv(world, 1, "cpu", obs_type="rgb")
    frames = np.stack([np.full(slots.frame_shape, 10 + i, np.uint8) for i in range(4)])
    wanted, _ = env.reset(
        seed=[5], options={"context": {"frames": frames, "actions": np.array([1, 2, 0])}}
    )
    assert np.abs(slots.beside(0).astype(int) - wanted[0]).max() <= 1
    for action in (1, 2, 1):
        over = slots.step({0: action})[0].terminated
    assert over and made[0].seeds == [5]
    slots.set_view(0, "dream")
    assert (slots.set_view(0, "real") == 10).all()  # what has ended begins again
    assert made[0].seeds == [5, 5] and len(made) == 1


def test_another_seed_is_another_episode_of_the_game(world: Path) -> None:
    slots, made = twin(world)
    slots.reset(0, 5)
    slots.set_view(0, "real")
    slots.step({0: 1})
    slots.set_view(0, "dream")
    slots.reset(0, 8)
    assert (slots.set_view(0, "real") == 10).all() and made[0].seeds == [5, 8]


def test_both_are_driven_by_the_same_keys(world: Path) -> None:
    slots, made = twin(world)
    slots.reset(0, 5)
    frame = slots.set_view(0, "split")
    assert (frame == 10).all() and slots.beside(0) is not None
    assert slots.has_draft(0)  # nothing is made ahead
    outcome = slots.step({0: 1})[0]
    beside = slots.beside(0)
    assert made[0].actions == [1] and (outcome.frame == 11).all() and beside is not None
    error = np.square(outcome.frame.astype(float) - beside).mean()
    assert outcome.info["apart"] == pytest.approx(psnr(error), abs=1e-3)
    assert np.array_equal(slots.set_view(0, "dream"), beside)  # it goes on as it is
    assert slots.beside(0) is None and slots.step({0: 1})[0].dreamed
    assert made[0].actions == [1]
    slots.close()
    assert made[0].closed


def test_a_dream_that_ends_before_the_game_goes_on_from_it(tmp_path: Path) -> None:
    ends_always = make_tiny_world(tmp_path / "ends", hazard_bias=30.0)
    slots, made = twin(ends_always, end_at=6)
    person = Person(slots)
    person.session.control("view", "real")
    person.play(2)
    person.session.control("view", "split")
    person.play(3)
    hud = person.pictures[-1].hud
    assert person.engine.error is None and not person.session.over and made[0].actions
    assert hud["notice"].startswith("the dream ended here") and hud["apart"] > 0
    while not person.session.over:
        person.play(1)
    assert len(made[0].actions) == 6  # it is the game that ends
    person.session.control("view", "dream")
    person.play(2)
    assert person.engine.error is None and person.session.view == "dream"


def test_pictures_keep_their_aspect() -> None:
    real, dream = np.full((4, 8, 3), 90, np.uint8), np.full((4, 8, 3), 100, np.uint8)
    picture = side_by_side(real, dream)
    assert picture.shape == (10, 18, 3)
    assert (picture[:4, :8] == 90).all() and (picture[:4, 10:] == 100).all()
    assert (picture[6:, 5:13] == 30).all()


class Person:
    """At an engine that is polled by hand, with a clock of its own."""

    def __init__(self, slots: TwinSlots) -> None:
        self.session = Session(slots.keymap, slots.default_sampling, views=slots.views)
        self.engine, self.pictures = Engine(slots), []
        self.engine.join(self.session, self.pictures.append, 5)

    def play(self, pictures: int) -> None:
        wanted = len(self.pictures) + pictures
        while len(self.pictures) < wanted:
            self.engine.poll()


def test_a_person_switches(world: Path, tmp_path: Path) -> None:
    slots, made = twin(world, end_at=6)
    person = Person(slots)
    session = person.session
    session.control("view", "real")  # before there is a picture
    person.play(4)
    assert session.hud()["view"] == "real" and made
    recorder = PlayRecorder(
        tmp_path / "d", slots.frame_shape, slots.keymap.space, {"env_id": "x"}, 30, print
    )
    recorder.began(session.frame, session.seed)
    session.recorder = recorder
    session.control("view")
    person.play(3)
    assert session.view == "split" and session.hud()["apart"] > 0
    height, width = slots.frame_shape[:2]
    assert person.pictures[-1].frame.shape == (2 * height + 2, 2 * width + 2, 3)
    assert session.frame is not None and session.frame.shape == slots.frame_shape
    while not session.over:
        person.play(1)
    session.control("reset")
    person.play(2)
    assert not session.over and made[0].seeds[-1] is None  # the next episode of the game
    session.control("view")
    person.play(3)
    assert session.view == "dream" and person.pictures[-1].frame.shape == slots.frame_shape
    recorder.close()
    from nfd_env.data.shards import RecordedDataset

    policies = [e.policy for e in RecordedDataset(tmp_path / "d")]
    assert policies[-1] == "person:dream" and set(policies[:-1]) == {"person"}
    with pytest.raises(ControlError, match="dream and real and split"):
        session.control("view", "other")


def test_a_dreamed_picture_is_never_called_real(world: Path) -> None:
    slots, _ = twin(world)
    person = Person(slots)
    person.play(2)
    person.session.control("view", "real")  # between two polls, as from another thread
    assert person.session.hud()["view"] == "dream"
    person.play(1)
    assert person.pictures[-1].hud["view"] == "real" and (person.pictures[-1].frame == 10).all()
    assert person.pictures[-1].hud["guessed"] is None  # a real game is not generated ahead
    person.session.control("view", "dream")
    assert person.session.hud()["view"] == "real"
    person.play(1)
    assert person.pictures[-1].hud["view"] == "dream"


def test_a_game_that_cannot_be_had_is_said(world: Path) -> None:
    slots, _ = twin(world)

    def fail() -> Any:
        raise SourceError("the real game X needs the package 'x'")

    slots._make = fail
    person = Person(slots)
    person.play(2)
    person.session.control("view", "split")
    person.play(3)
    assert person.session.view == "dream" and person.engine.error is None
    assert "needs the package" in person.pictures[-1].hud["notice"]


def test_a_game_that_fails_gives_back_to_the_dream(world: Path) -> None:
    slots, made = twin(world, fail_at=3)
    person = Person(slots)
    person.play(2)
    person.session.control("view", "real")
    person.play(8)
    assert made[0].closed and person.session.view == "dream"
    assert "engine lost" in person.pictures[-1].hud["notice"]
    assert slots.step({0: 0})[0].dreamed


def test_a_game_that_cannot_begin_again_gives_back_to_the_dream(world: Path) -> None:
    slots, made = twin(world)
    person = Person(slots)
    person.play(2)
    person.session.control("view", "split")
    person.play(2)

    def fail(**_: Any) -> Any:
        raise RuntimeError("no more levels")

    made[0].reset = fail
    person.session.control("seed", 8)
    person.play(3)
    assert person.engine.error is None and person.session.view == "dream"
    assert "no more levels" in person.pictures[-1].hud["notice"] and slots.beside(0) is None
    assert person.session.seed == 8


def test_who_takes_the_seat_of_one_who_saw_the_game_begins_with_the_own_seed(world: Path) -> None:
    slots, _ = twin(world)
    first = Person(slots)
    first.play(2)
    first.session.control("view", "real")
    first.play(3)
    first.engine.leave(first.engine.players[0])
    second = Session(slots.keymap, slots.default_sampling, views=slots.views)
    pictures: list[Any] = []
    first.engine.join(second, pictures.append, 5)
    while not pictures:
        first.engine.poll()
    wanted, _ = twin(world)
    assert np.array_equal(pictures[0].frame, wanted.reset(0, 5)) and pictures[0].hud["seed"] == 5


def test_without_a_real_game_there_is_nothing_to_switch(world: Path) -> None:
    session = Session(TwinSlots(lambda: Real((1,)), world, 1, "cpu").keymap)
    with pytest.raises(ControlError):
        session.control("view")
