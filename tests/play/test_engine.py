import time

import numpy as np
import pytest

from nfd_env.play import engine as engine_module
from nfd_env.play import session as session_module
from nfd_env.play.engine import Engine
from nfd_env.play.game import Sampling
from nfd_env.play.session import ControlError, Session, agent_for
from tests.play.scroll_game import ScrollGame


class Seat:
    """A player whose engine is polled by hand."""

    def __init__(self, engine, **kwargs):
        self.engine, self.pictures = engine, []
        game = engine.game
        self.session = Session(game.keymap, game.default_sampling, game.steps_of, **kwargs)
        self.player = engine.join(self.session, self.pictures.append, seed=3)

    def play(self, pictures, seconds=120.0):  # a machine may be busy
        goal, end = len(self.pictures) + pictures, time.monotonic() + seconds
        while len(self.pictures) < goal and time.monotonic() < end:
            time.sleep(self.engine.poll())
        assert len(self.pictures) >= goal
        return self.pictures[goal - pictures : goal]


class Clock:
    """Stands in for the engine's ``time``: moves when it is told to, whatever the machine does."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(engine_module, "time", self)

    def perf_counter(self):
        return self.now

    def play(self, engine, seconds):
        """Poll as often as the engine wants."""
        end = self.now + seconds
        while self.now < end:
            wait = engine.poll()  # first: it moves the clock itself
            self.now += wait


class Dear(ScrollGame):
    """Takes its time, and notes when it generated ahead."""

    def __init__(self, clock, **kwargs):
        super().__init__(1, **kwargs)
        self.clock, self.drafted_at = clock, []

    def cost(self, rows):
        return 0.004

    def draft(self, guesses):
        self.drafted_at.append(self.clock.now)
        self.clock.now += 0.004
        super().draft(guesses)


def test_native_rate_and_every_picture_is_a_right_guess(monkeypatch):
    clock = Clock(monkeypatch)
    seat = Seat(Engine(ScrollGame(1, fps=40)))
    clock.play(seat.engine, 2.0)
    # The first picture is the reset's.
    assert len(seat.pictures) == pytest.approx(1 + 2 * 40, abs=1)
    assert seat.pictures[-1].hud["guessed"] == 1.0


def test_pictures_are_sent_before_the_next_ones_are_generated(monkeypatch):
    clock = Clock(monkeypatch)
    game = Dear(clock, fps=40)
    shown_at = []
    engine = Engine(game)
    engine.join(Session(game.keymap, Sampling(2)), lambda _: shown_at.append(clock.now), 1)
    clock.play(engine, 1.0)
    pauses = [min(d - s for s in shown_at if s <= d) for d in game.drafted_at[1:]]
    assert len(pauses) > 30 and min(pauses) >= 0.006
    # And they are ready in time all the same.
    assert np.diff(shown_at).max() < 1.01 / 40


def test_no_time_is_lost_when_generating_ahead_takes_all_of_it(monkeypatch):
    clock = Clock(monkeypatch)
    game = Dear(clock, fps=1 / 0.0046)
    seat = Seat(Engine(game))
    clock.play(seat.engine, 1.0)
    assert len(game.drafted_at) > 150 and seat.pictures[-1].hud["guessed"] == 1.0


def test_without_lookahead_the_pictures_are_the_same():
    blues = []
    for ahead in (True, False):
        seat = Seat(Engine(ScrollGame(1, fps=200)))
        seat.session.control("lookahead", ahead)
        seat.play(3)
        seat.session.press("left")
        seat.play(4)
        seat.session.release("left")
        seat.play(2)
        blues.append([int(p.frame[0, 0, 2]) for p in seat.pictures])
    assert blues[0] == blues[1]
    assert blues[0][-1] == 256 - 8


@pytest.mark.parametrize("apart", [0.0, 0.0073, 0.013, 0.03])  # of 0.02 seconds a frame
def test_who_comes_in_when_others_play_shares_their_batches(monkeypatch, apart):
    clock = Clock(monkeypatch)
    engine = Engine(ScrollGame(4, fps=50))
    seats = []
    for _ in range(4):
        seats.append(Seat(engine))
        seats[-1].session.control("lookahead", False)
        clock.play(engine, apart)
    clock.play(engine, 0.1)
    engine.game.batches.clear()
    before = [len(s.pictures) for s in seats]
    clock.play(engine, 1.0)
    assert set(engine.game.batches) == {4}
    counts = [len(s.pictures) - b for s, b in zip(seats, before, strict=True)]
    assert set(counts) <= {49, 50, 51} and max(counts) - min(counts) <= 1


def test_a_machine_that_was_away_keeps_everybody_in_one_batch(monkeypatch):
    clock = Clock(monkeypatch)
    engine = Engine(ScrollGame(3, fps=50))
    seats = [Seat(engine) for _ in range(3)]
    for seat in seats:
        seat.session.control("lookahead", False)
    seats[1].session.control("speed", 2.0)
    clock.play(engine, 0.2)
    engine.game.batches.clear()
    clock.now += 0.5
    clock.play(engine, 1.0)
    # One of them is due twice as often: alone, then with the others, and no burst of lost frames.
    assert set(engine.game.batches) == {1, 3} and len(engine.game.batches) <= 103


def test_a_full_game_and_a_freed_slot():
    engine = Engine(ScrollGame(1))
    seat = Seat(engine)
    assert engine.join(Session(engine.game.keymap), print) is None
    engine.leave(seat.player)
    assert Seat(engine).player is not None


def test_pause_single_step_speed_and_reset():
    seat = Seat(Engine(ScrollGame(1, fps=100)))
    seat.play(5)
    control = seat.session.control
    control("pause", True)
    while (p := seat.play(1)[0]) and not p.hud["paused"]:
        pass
    step = seat.pictures[-1].hud["step"]
    for _ in range(20):
        seat.engine.poll()
        time.sleep(0.005)
    assert seat.pictures[-1].hud["step"] == step
    control("step")
    assert seat.play(1)[0].hud["step"] == step + 1
    control("pause", False)
    control("speed", 0.5)
    began = time.perf_counter()
    seat.play(20)
    assert time.perf_counter() - began > 0.35
    control("seed", 11)
    seat.play(3)
    assert seat.pictures[-1].hud["seed"] == 11 and seat.pictures[-1].hud["episode"] == 1
    control("reset")
    seat.play(3)
    assert seat.pictures[-1].hud["seed"] == 11 and seat.pictures[-1].hud["episode"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fly", None),
        ("speed", 3),
        ("speed", True),
        ("speed", float("nan")),
        ("seed", -1),
        ("seed", 1.5),
        ("sampling_steps", 0),
        ("sampling_steps", 1000),
        ("pause", 1),
        ("agent", True),
        ("teacher", True),
        ("speculation", "on"),
    ],
)
def test_controls_that_cannot_be(name, value):
    session = Session(ScrollGame(1).keymap, Sampling(2))
    with pytest.raises(ControlError):
        session.control(name, value)


def test_speculation_and_the_teacher_are_chosen_while_playing():
    game = ScrollGame(1, fps=200)
    seat = Seat(Engine(game))
    seat.play(3)
    seat.session.control("speculation", True)
    seat.play(2)
    assert game.sampling[0] == Sampling(2, speculation=True)
    assert seat.pictures[-1].hud["speculation"]
    seat.session.control("sampling_steps", 4)
    # Other dynamics begin the seed's first episode again, with their own number of steps.
    seat.session.control("teacher")
    seat.play(4)
    assert game.sampling[0] == Sampling(6, speculation=True, teacher=True)
    hud = seat.pictures[-1].hud
    assert hud["teacher"] and (hud["seed"], hud["episode"]) == (3, 1) and hud["step"] < 10
    seat.session.control("teacher", False)
    seat.play(2)
    assert game.sampling[0] == Sampling(2, speculation=True)


def test_the_agent_takes_over_and_gives_back():
    game = ScrollGame(1, fps=200)
    agent = agent_for(game, lambda frame: np.int64(1))
    seat = Seat(Engine(game), agent=agent)
    seat.play(3)
    seat.session.control("agent", True)
    seat.play(5)
    assert seat.pictures[-1].hud["action"] == "right"
    seat.session.control("agent", False)
    seat.play(3)
    assert seat.pictures[-1].hud["action"] == "noop"


@pytest.mark.parametrize("agent", [lambda frame: 1 // 0, lambda frame: 99])
def test_an_agent_that_fails_gives_back_and_the_play_goes_on(agent):
    game = ScrollGame(1, fps=200)
    seat = Seat(Engine(game), agent=agent_for(game, agent))
    seat.session.control("agent", True)
    seat.session.press("left")
    seat.play(4)
    hud = seat.pictures[-1].hud
    assert hud["action"] == "left" and hud["step"] >= 2 and not hud["agent"]


def test_resets_asked_for_at_once_are_one():
    game = ScrollGame(1, fps=200)
    seat = Seat(Engine(game))
    seat.play(2)
    for _ in range(50):
        seat.session.control("seed", 9)
        seat.session.control("reset")
    assert [p.hud["step"] for p in seat.play(5)] == [0, 1, 2, 3, 4]
    assert game.seeds == [9]


def test_agents_by_name():
    game = ScrollGame(1)
    assert agent_for(game, None) is None
    chosen = {agent_for(game, "random")(np.zeros((4, 4, 3), np.uint8)) for _ in range(3)}
    assert chosen <= {0, 1, 2}
    for wrong in ("nobody", "no.such:Thing", "/no/such/agent.zip"):
        with pytest.raises(ValueError):
            agent_for(game, wrong)


def test_after_the_end_the_next_episode_begins(monkeypatch):
    monkeypatch.setattr(session_module, "RESTART_AFTER", 0.1)

    class Short(ScrollGame):
        def outcome(self, slot, action, guessed):
            made = super().outcome(slot, action, guessed)
            ended = self.steps_taken[slot] >= 4
            return made.__class__(made.frame, 1.0, ended, False, {}, guessed)

    seat = Seat(Engine(Short(1, fps=100)))
    shown = seat.play(12)
    assert [p.hud["over"] for p in shown].count(True) == 2
    assert shown[-1].hud["episode"] >= 2


def test_a_failing_model_stops_the_engine_and_says_so():
    engine = Engine(ScrollGame(1, fps=200, fail_at=3))
    Seat(engine)
    engine.start()
    end = time.monotonic() + 120
    while engine.error is None and time.monotonic() < end:
        time.sleep(0.02)
    assert "on purpose" in str(engine.error)
    engine.close()


class Timed(ScrollGame):
    """A step takes 3 ms and 1 ms a denoising step, whatever the batch; a reset or view 20 ms."""

    views = ("dream", "real")

    def __init__(self, clock, count, **kwargs):
        super().__init__(count, **kwargs)
        self.clock, self.resets = clock, [0] * count
        self.shown = ["dream"] * count

    def view(self, slot):
        return self.shown[slot]

    def set_view(self, slot, view):
        self.shown[slot] = view
        return self.reset(slot)

    def cost(self, rows):
        steps = {self.sampling[slot].steps for slot in rows}
        return sum(0.003 + 0.001 * n for n in steps)

    def step(self, actions):
        self.clock.now += self.cost(actions)
        return super().step(actions)

    def draft(self, guesses):
        self.clock.now += self.cost(guesses)
        super().draft(guesses)

    def reset(self, slot, seed=None):
        self.clock.now += 0.020
        self.resets[slot] += 1
        return super().reset(slot, seed)


def rates(clock, engine, seats, seconds=8.0):
    before = [len(s.pictures) for s in seats]
    clock.play(engine, seconds)
    return [(len(s.pictures) - b) / seconds for s, b in zip(seats, before, strict=True)]


# At 150 frames a second the default takes three quarters of the time, at 400 more than all of it.
@pytest.mark.parametrize("fps", [30, 150, 400])
@pytest.mark.parametrize("modest", [1, 3])
def test_who_asks_for_more_slows_himself_not_the_others(monkeypatch, fps, modest):
    clock = Clock(monkeypatch)
    engine = Engine(Timed(clock, modest + 2, fps=fps))
    seats = [Seat(engine) for _ in range(modest)]
    alone = min(rates(clock, engine, seats))
    for _ in range(2):
        greedy = Seat(engine)
        greedy.session.control("teacher", True)
        greedy.session.control("sampling_steps", 32)
        greedy.session.control("speed", 2.0)
        seats.append(greedy)
    *beside, first, second = rates(clock, engine, seats)
    assert min(beside) > 0.75 * alone, (alone, beside)
    # They play on all the same, with the same share each; and alone as fast as it goes.
    assert min(first, second) > 1.5 and abs(first - second) < 1
    for seat in (*seats[:modest], seats[-1]):
        engine.leave(seat.player)
    (free,) = rates(clock, engine, [seats[-2]])
    assert free == pytest.approx(min(2 * fps, 1 / 0.035), rel=0.1)


@pytest.mark.parametrize("how", ["reset", "view", "join"])
def test_who_begins_anew_all_the_time_slows_himself_not_the_others(monkeypatch, how):
    clock = Clock(monkeypatch)
    engine = Engine(Timed(clock, 2, fps=60))
    seat, other = Seat(engine), Seat(engine, views=Timed.views)
    (alone, _) = rates(clock, engine, [seat, other])
    end, before, begun = clock.now + 8, len(seat.pictures), engine.game.resets[1]
    while clock.now < end:
        if how == "join":
            engine.leave(other.player)
            other = Seat(engine)
        else:
            other.session.control("seed" if how == "reset" else how, 5 if how == "reset" else None)
        for _ in range(2):
            clock.play(engine, 1e-9)
    assert (len(seat.pictures) - before) / 8 > 0.75 * alone
    assert engine.game.resets[1] - begun > 20
    # Now and then it is done at once.
    clock.play(engine, 1.0)
    began = clock.now
    other.session.control("seed", 6)
    clock.play(engine, 0.1)
    assert other.pictures[-1].hud["seed"] == 6 and clock.now - began < 0.2


def test_a_dear_draft_keeps_nobody_from_generating_ahead(monkeypatch):
    clock = Clock(monkeypatch)
    engine = Engine(Timed(clock, 2, fps=30))
    seat, other = Seat(engine), Seat(engine)
    other.session.control("sampling_steps", 32)
    clock.play(engine, 4.0)
    assert seat.pictures[-1].hud["guessed"] > 0.7
    # Nor does one of a player who takes a rest.
    other.session.control("pause", True)
    other.session.control("sampling_steps", 31)
    (rate,) = rates(clock, engine, [seat], 4.0)
    assert rate > 29


@pytest.mark.parametrize("fps", [0.0, -5.0, float("nan"), float("inf")])
def test_a_game_without_a_rate_is_refused(fps):
    with pytest.raises(ValueError, match="frames a second"):
        Engine(ScrollGame(1, fps=fps))
