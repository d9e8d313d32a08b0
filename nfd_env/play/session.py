"""One person's play: keys, controls, episode, statistics. Window and browser share all of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from nfd_env.config import is_number
from nfd_env.play.drift import KEPT, RED, Moment
from nfd_env.play.game import Game, Outcome, Sampling
from nfd_env.play.keys import Choice, KeyLatch, Keymap
from nfd_env.players.frames import FramePlayer

log = logging.getLogger(__name__)

SPEEDS = (0.25, 0.5, 1.0, 1.5, 2.0)
MAX_SAMPLING_STEPS = 32
_NOTICED = 6.0  # seconds that a notice is shown for
RESTART_AFTER = 2.0  # seconds that the last frame of an episode is shown for


def agent_for(game: Game, agent: Any, trust: bool = False) -> FramePlayer | None:
    """Whom players of ``game`` can hand over to, see ``FramePlayer``; None for None."""
    if agent is None:
        return None
    world = getattr(game, "world", None)
    return FramePlayer(agent, game.keymap.space, game.frame_shape, world, trust)


class ControlError(ValueError):
    """There is no such control, or it does not take this value."""


class Meter:
    """The last values of something, for a rate and percentiles."""

    def __init__(self, size: int = 200) -> None:
        """Remember ``size`` values."""
        self._values: deque[float] = deque(maxlen=size)
        self._times: deque[float] = deque(maxlen=size)

    def add(self, value: float = 0.0) -> None:
        """Note a value that came about now."""
        self._values.append(value)
        self._times.append(time.perf_counter())

    def rate(self, seconds: float = 2.0) -> float:
        """Values a second over the last ``seconds``."""
        now = time.perf_counter()
        recent = [t for t in tuple(self._times) if now - t <= seconds]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0

    def percentile(self, q: float) -> float | None:
        """The ``q`` percentile (0 to 100), None without values."""
        values = tuple(self._values)
        return float(np.percentile(values, q)) if values else None

    def mean(self) -> float | None:
        """The mean, None without values."""
        values = tuple(self._values)
        return sum(values) / len(values) if values else None


class Session:
    """The state of one person's play, apart from the world itself.

    Keys and controls come from the person's thread; ``choose``, ``began`` and ``took`` are called
    by the engine.
    """

    def __init__(
        self,
        keymap: Keymap,
        sampling: Sampling | None = None,
        steps_of: tuple[int, int] | None = None,
        agent: FramePlayer | None = None,
        drafts: bool = True,
        views: tuple[str, ...] = ("dream",),
    ) -> None:
        """Start with no key down.

        Args:
            keymap: of the game.
            sampling: how frames are drawn; None for a game that is not generated.
            steps_of: denoising steps of (student, teacher); None where there is no choice.
            agent: may take over through the control "agent".
            drafts: whether the game can generate frames ahead.
            views: see ``Game.views``; the first one is shown.
        """
        self.keymap, self.agent = keymap, agent
        self.keys = KeyLatch(keymap.keys, len(keymap.axes))
        self.paused = self.agent_on = self.over = False
        self.speed = 1.0
        self.sampling, self.steps_of = sampling, steps_of
        self.can_draft = self.lookahead = drafts
        self.views, self.view = views, views[0]
        self.shown_view = views[0]  # of the picture: a game takes a while to begin
        self.notice = ""
        self._noticed = 0.0
        self.seed: int | None = None
        self.episode = self.steps = 0
        self.total_reward = self.reward = 0.0
        self.action = ""
        self.info: dict[str, Any] = {}
        self.frame: np.ndarray | None = None  # what agents see and recordings hold
        self.beside: np.ndarray | None = None  # the dream, where both are shown
        self.trail: deque[Moment] = deque(maxlen=KEPT)  # where drift is measured
        self.ended_at = 0.0
        self.frames = Meter(120)
        self.step_times = Meter(120)
        self.latencies = Meter(120)
        self.guesses = Meter(300)
        self.last_choice: Choice | None = None
        self.last_input = time.monotonic()
        self.recorder: Any = None
        self._handed_over = False  # the agent has begun to follow this episode
        self._reset_wanted = False
        self._seed_wanted: int | None = None
        self._single_steps = 0
        self._pressed_at: float | None = None
        self._seq = 0
        self.answering = 0
        self.answering_since: float | None = None
        self._lock = threading.Lock()

    def press(self, key: str, seq: int = 0) -> bool:
        """A key went down; ``seq`` numbers the inputs. Whether the key means anything.

        After the end of an episode it also begins the next one, once the end has been seen.
        """
        if self.over and time.monotonic() - self.ended_at > 0.4 * RESTART_AFTER:
            self.control("reset")
        return self._input(self.keys.press(key), seq)

    def release(self, key: str, seq: int = 0) -> bool:
        """A key went up."""
        return self._input(self.keys.release(key), seq)

    def tilt(self, axis: int, deflection: float, seq: int = 0) -> bool:
        """A stick of a gamepad was moved, see ``Keymap.gamepad``; whether it means anything."""
        return self._input(self.keys.tilt(axis, deflection), seq)

    def release_all(self) -> None:
        """Focus or connection was lost: let go of everything."""
        self.keys.release_all()

    def control(self, name: str, value: Any = None) -> None:
        """Use a control.

        ============== ============================================================
        pause          True, False, or None to toggle
        step           one step while paused (pauses otherwise)
        reset          the next episode
        seed           a new seed: an int from 0 to 2**32 - 1, or None for a random one
        speed          one of ``SPEEDS``
        sampling_steps 1 to ``MAX_SAMPLING_STEPS``
        speculation    True, False or None to toggle: draw frames jointly while keys are held
        teacher        True, False or None to toggle: the many-step dynamics that the world's own
                       were distilled from; begins an episode
        lookahead      True, False or None to toggle: generate the next frames ahead
        agent          True, False or None to toggle: hand over to the agent
        view           "dream", "real", "split" or None for the next one, where the real game is
                       at hand: both are driven by the same keys in the split view
        ============== ============================================================

        Raises:
            ControlError: when there is no such control or it does not take this value.
        """
        self.last_input = time.monotonic()
        if name in ("pause", "lookahead", "agent", "speculation", "teacher"):
            self._switch(name, value)
        elif name == "step":
            with self._lock:
                self._single_steps = min(self._single_steps + (1 if self.paused else 0), 8)
            self.paused = True
        elif name == "reset":
            self._want_reset(None)
        elif name == "seed":
            if value is None:
                value = int(np.random.SeedSequence().generate_state(1)[0])
            if not is_number(value, whole=True) or not 0 <= value < 2**32:
                raise ControlError(f"seed must be from 0 to {2**32 - 1}, got {value!r}")
            self._want_reset(int(value))
        elif name == "view":
            after = self.views[(self.views.index(self.view) + 1) % len(self.views)]
            if len(self.views) < 2:
                only = {"dream": "the dream", "real": "the real game"}[self.view]
                raise ControlError(f"there is only {only} to be seen here")
            if not (value is None or value in self.views):
                raise ControlError(f"there is {' and '.join(self.views)} to be seen, not {value!r}")
            self.view = after if value is None else value
        elif name == "speed":
            if isinstance(value, bool) or value not in SPEEDS:
                raise ControlError(f"speed must be one of {SPEEDS}, got {value!r}")
            self.speed = float(value)
        elif name == "sampling_steps":
            if not is_number(value, whole=True) or not 1 <= value <= MAX_SAMPLING_STEPS:
                raise ControlError(
                    f"sampling_steps must be from 1 to {MAX_SAMPLING_STEPS}, got {value!r}"
                )
            self.sampling = replace(self._generated(), steps=int(value))
        else:
            raise ControlError(f"unknown control {name!r}")

    def _switch(self, name: str, value: Any) -> None:
        """A control that is on or off."""
        if value is not None and not isinstance(value, bool):
            raise ControlError(f"{name} takes true, false or nothing, got {value!r}")
        if name in ("speculation", "teacher"):
            sampling = self._generated()
            wanted = not getattr(sampling, name) if value is None else value
            if name == "teacher":
                self._change_dynamics(wanted)
            else:
                self.sampling = replace(sampling, speculation=wanted)
            return
        attribute = {"pause": "paused", "agent": "agent_on"}.get(name, name)
        wanted = not getattr(self, attribute) if value is None else value
        if name == "agent" and wanted and self.agent is None:
            raise ControlError("no agent was given to hand over to")
        if name == "lookahead" and wanted and not self.can_draft:
            raise ControlError("this game cannot be generated ahead")
        setattr(self, attribute, wanted)

    def _change_dynamics(self, teacher: bool) -> None:
        """Student or teacher, each with its own number of steps, from the seed's first frame."""
        sampling = self._generated()
        if teacher == sampling.teacher:
            return
        if self.steps_of is None:
            raise ControlError("this world has no teacher")
        self.sampling = replace(sampling, teacher=teacher, steps=self.steps_of[teacher])
        self._want_reset(self.seed)

    def _generated(self) -> Sampling:
        if self.sampling is None:
            raise ControlError("this game is not generated: it has no sampling")
        return self.sampling

    @property
    def reset_pending(self) -> bool:
        """Whether a reset was asked for and has not happened yet."""
        return self._reset_wanted

    def _want_reset(self, seed: int | None) -> None:
        """Resets that are asked for faster than they happen become one, with the latest seed."""
        with self._lock:
            self._reset_wanted = True
            self._seed_wanted = self._seed_wanted if seed is None else seed

    def wants_reset(self) -> tuple[bool, int | None]:
        """Whether an episode is to begin now, and with which seed (None: the next episode)."""
        with self._lock:
            wanted, self._reset_wanted = self._reset_wanted, False
            seed, self._seed_wanted = self._seed_wanted, None
        if wanted:
            if seed is not None:
                self.seed = None  # its episodes are counted anew
            return True, seed
        over = self.over and time.monotonic() - self.ended_at >= RESTART_AFTER
        return over and not self.paused, None

    def wants_step(self) -> bool:
        """Whether the game goes on; uses up a single step when paused."""
        if self.over or self.frame is None:
            return False
        if not self.paused:
            return True
        with self._lock:
            ready = self._single_steps > 0
            self._single_steps -= ready
        return ready

    def choose(self) -> Choice:
        """The action of the next step, of the person or the agent."""
        with self._lock:
            self.answering, self.answering_since = self._seq, self._pressed_at
            self._pressed_at = None
        choice = self.keys.consume(self.keymap)
        if self.agent_on and self.agent is not None and self.frame is not None:
            choice = self._ask_agent(self.agent, self.frame) or choice
        else:
            self._handed_over = False
        self.last_choice = choice
        return choice

    def _ask_agent(self, agent: FramePlayer, frame: np.ndarray) -> Choice | None:
        """What the agent chooses; one that fails gives back to the person, who plays on."""
        try:
            if not self._handed_over:
                agent.begin()
                self._handed_over = True
            action = agent(frame)
            if not self.keymap.contains(action):
                raise ValueError(f"it chose {action!r}, which is not in {self.keymap.space}")
            return Choice(action, self.keymap.label(action), frozenset())
        except Exception:
            log.exception("the agent failed; its player plays on")
            self.agent_on = False
            return None

    def guesses_for_next(self, everything: bool) -> list[Any]:
        """Actions to assume for the next step, the likeliest first."""
        likely = self.keymap.choose(self.keys.pressed(), self.keys.deflections()).action
        if self.agent_on and self.agent is not None and self.frame is not None:
            likely = self.last_choice.action if self.last_choice else likely
        if not everything:
            return [likely]
        others = [a for a in self.keymap.all_actions() if a != likely]
        return [likely, *others]

    def say(self, text: str) -> None:
        """A line for the person, shown for some seconds."""
        self.notice, self._noticed = text, time.monotonic()

    def began(self, frame: np.ndarray, seed: int | None, beside: np.ndarray | None = None) -> None:
        """An episode has begun."""
        self.episode = self.episode + 1 if seed == self.seed else 1
        self.seed, self.frame, self.beside, self.over = seed, frame, beside, False
        self._handed_over = False
        self.steps, self.total_reward, self.reward, self.action = 0, 0.0, 0.0, ""
        self.info = {}
        if self.recorder is not None:
            self.recorder.began(frame, seed)

    def took(
        self, choice: Choice, outcome: Outcome, seconds: float, beside: np.ndarray | None = None
    ) -> None:
        """A step was taken; ``seconds`` is how long the person waited for the model."""
        self.beside = beside
        if outcome.error:
            self.say(outcome.error)
            self.view = self.shown_view = self.views[0]
        if outcome.info.get("dream_ended"):
            self.say("the dream ended here; it goes on from the game's frames")
        self.frame, self.reward, self.action = outcome.frame, outcome.reward, choice.label
        self.steps += 1
        self.total_reward += outcome.reward
        if "ood" in outcome.info:
            dream = outcome.frame if beside is None else beside
            moment = dream, np.array(choice.action), outcome.info["ood"], self.episode, self.steps
            self.trail.append(moment)
        self.info = dict(outcome.info)
        self.over = outcome.terminated or outcome.truncated
        if self.over:
            self.ended_at = time.monotonic()
        self.frames.add()
        self.step_times.add(seconds)
        if self.shown_view == "dream":
            self.guesses.add(float(outcome.guessed))
        if self.recorder is not None:
            self.recorder.took(choice.action, outcome, self.agent_on)

    def hud(self) -> dict[str, Any]:
        """What window and page show, plain values; times in milliseconds."""
        rate = self.guesses.mean() if self.lookahead and self.shown_view == "dream" else None
        hazard = self.info.get("hazard")
        acceptance, apart = self.info.get("acceptance"), self.info.get("apart")
        drift = self.info.get("ood")
        return {
            "action": self.action,
            "reward": round(self.reward, 4),
            "return": round(self.total_reward, 3),
            "step": self.steps,
            "episode": self.episode,
            "seed": self.seed,
            "over": self.over,
            "paused": self.paused,
            "speed": self.speed,
            "fps": round(self.frames.rate(), 1),
            "model_ms": _milliseconds(self.step_times.percentile(50)),
            "sampling_steps": None if self.sampling is None else self.sampling.steps,
            "speculation": self.sampling is not None and self.sampling.speculation,
            "teacher": self.sampling is not None and self.sampling.teacher,
            "lookahead": self.lookahead,
            "guessed": None if rate is None else round(rate, 3),
            "acceptance": None if acceptance is None else round(float(acceptance), 3),
            "hazard": None if hazard is None else round(float(hazard), 4),
            "agent": self.agent_on,
            "view": self.shown_view,
            "apart": None if apart is None else round(float(apart), 1),
            "drift": None if drift is None else round(float(drift) / RED, 3),  # red above 1
            "notice": self.notice if time.monotonic() - self._noticed < _NOTICED else "",
        }

    def _input(self, known: bool, seq: int) -> bool:
        self.last_input = time.monotonic()
        with self._lock:
            self._seq = max(self._seq, seq)
            if known and self._pressed_at is None:
                self._pressed_at = time.perf_counter()
        return known


def sampling_choices(game: Game) -> list[int]:
    """Denoising steps worth offering, ascending; none for a game that is not generated."""
    if game.default_sampling is None:
        return []
    return sorted({1, 2, 4, 8, game.default_sampling.steps, *(game.steps_of or ())})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
