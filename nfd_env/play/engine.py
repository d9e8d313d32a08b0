"""The clock: steps every player at the world's native rate, and generates ahead in between.

Who asks for more than the world's default, by denoising steps or speed, slows down nobody else:
such players are stepped last, and wait between their steps so that all of them together use a
small share of the model's time (``_DEAR_SHARE``) while others play. Resets and changes of the view
are rationed likewise, and so are the first episodes of those who come in.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nfd_env.play.game import Game, Outcome, Sampling, side_by_side
from nfd_env.play.keys import Choice
from nfd_env.play.session import Session
from nfd_env.sources.spec import SourceError

log = logging.getLogger(__name__)

_SETTLE = 0.006  # seconds that a picture needs to be compressed, sent and painted
# Of the model's time, for players who ask for more than the default while others do not: what
# these lose at most. It is lost even where the machine has time to spare, for a step that has
# begun cannot be interrupted.
_DEAR_SHARE = 0.2


@dataclass(frozen=True)
class Shown:
    """One picture for one player.

    Attributes:
        number: counts the player's pictures.
        frame: uint8 (H, W, 3).
        seq: number of the last input that it takes into account.
        hud: see ``Session.hud``.
    """

    number: int
    frame: np.ndarray
    seq: int
    hud: dict[str, Any]


class Player:
    """A seat at an engine."""

    def __init__(self, slot: int, session: Session, publish: Callable[[Shown], None]) -> None:
        """Take ``slot``; ``publish`` gets every picture, on the engine's thread."""
        self.slot, self.session, self._publish = slot, session, publish
        self.due = self.may_begin = time.perf_counter()
        self.shown = 0
        self.gone = False
        self._state: Any = None

    @property
    def must_wait(self) -> bool:
        """Whether the reset that is wanted is not allowed yet: nothing happens until then."""
        return self.session.reset_pending and time.perf_counter() < self.may_begin

    def show(self, seq: int) -> None:
        """Hand a picture to the person."""
        frame, beside = self.session.frame, self.session.beside
        assert frame is not None
        hud = self.session.hud()
        self._state = self.controls()
        self.shown += 1
        shown = frame if beside is None else side_by_side(frame, beside)
        self._publish(Shown(self.shown, shown, seq, hud))

    def controls(self) -> tuple[Any, ...]:
        """What the HUD shows even when no time passes."""
        s = self.session
        return (s.paused, s.speed, s.sampling, s.lookahead, s.agent_on, s.view)

    def refresh(self) -> None:
        """Show the current picture again when a control was changed in a pause."""
        if self._state != self.controls() and self.session.frame is not None:
            self.show(0)


class Engine:
    """Steps players together; ``poll`` it, or let ``start`` do so on a thread of its own.

    The model is used by the polling thread only.
    """

    def __init__(self, game: Game, all_actions: int = 8) -> None:
        """Play ``game``; every action is generated ahead when there are ``all_actions`` at most.

        Raises:
            ValueError: when the game's rate is no number above 0.
        """
        if not (math.isfinite(game.fps) and game.fps > 0):
            raise ValueError(f"{game.name}: frames a second must be above 0, got {game.fps}")
        self.game, self._all_actions = game, all_actions
        self._seats: list[Player | None] = [None] * game.count
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._showed = self._may_join = 0.0
        self._beat = 0.0  # when a batch was last due
        self.error: BaseException | None = None

    @property
    def players(self) -> list[Player]:
        """Who plays now."""
        return [p for p in self._seats if p is not None]

    def join(
        self, session: Session, publish: Callable[[Shown], None], seed: int | None = None
    ) -> Player | None:
        """Give a session a slot, and begin its first episode.

        Returns:
            The seat, or None when the game is full.
        """
        with self._changed:
            free = [i for i, p in enumerate(self._seats) if p is None]
            if not free or self._closing:
                return None
            player = Player(free[0], session, publish)
            session.control("seed", seed)
            self._seats[free[0]] = player
            self._changed.notify()
        return player

    def leave(self, player: Player) -> None:
        """Free a slot; nothing is published to it from now on."""
        with self._changed:
            player.gone = True
            if self._seats[player.slot] is player:
                self._seats[player.slot] = None
            self._changed.notify()

    def wake(self) -> None:
        """A control was used: look at it now, not only at the next tick."""
        with self._changed:
            self._changed.notify()

    def start(self) -> None:
        """Poll on a daemon thread until ``close``."""
        self._thread = threading.Thread(
            target=self._run, name=f"play {self.game.name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, waiting for the batch under way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(30)

    def _run(self) -> None:
        while not self._closing:
            try:
                wait = self.poll()
            except Exception as error:
                log.exception("the model failed; all players of %s are let go", self.game.name)
                self.error = error
                return
            if wait > 0:
                with self._changed:
                    if not self._closing:
                        self._changed.wait(wait)

    def poll(self) -> float:
        """Do what is due now: step, else generate ahead.

        Returns:
            Seconds until there is something to do; 0 when it should be called again at once.
        """
        players = self.players
        for player in players:
            self._controls(player)
        now = time.perf_counter()
        period = 1 / self.game.fps
        # Players whose tick is near share a batch.
        due = [p for p in players if p.due <= now + 0.1 * period]
        if due and min(p.due for p in due) <= now:
            self._tick(due, now)
            return 0.0
        next_due = min((p.due for p in players), default=now + 0.5)
        begin = self._draft(players, now, next_due)
        return max(0.0, min(begin, next_due) - time.perf_counter())

    def _controls(self, player: Player) -> None:
        session, began = player.session, time.perf_counter()
        joins = session.frame is None
        if player.must_wait or (joins and began < self._may_join):
            return
        if session.view != self.game.view(player.slot) and began >= player.may_begin:
            self._change_view(player)
            self._ration(player, began)
        # Asked first: a reset for other dynamics is wanted after they were chosen.
        reset, seed = session.wants_reset()
        if session.sampling is not None:
            self.game.set_sampling(player.slot, session.sampling)
        if reset:
            try:
                frame = self.game.reset(player.slot, seed)
            except SourceError as error:
                self._dream_again(player, error, seed)
                return
            session.began(frame, self.game.seed_of(player.slot), self.game.beside(player.slot))
            player.due = self._first_due(player)
            self._ration(player, began)
            if joins:  # somebody may come in again and again
                self._may_join = player.may_begin
            if not player.gone:
                player.show(0)
        elif session.paused:
            player.refresh()

    def _ration(self, player: Player, began: float) -> None:
        """What a player has begun since ``began`` is paid for by not beginning anew for a while."""
        now = time.perf_counter()
        player.may_begin = now + self._rest(player, now - began)

    def _change_view(self, player: Player) -> None:
        """World, real game, or both; a game that cannot be had is said, and nothing changes."""
        session, slot = player.session, player.slot
        if session.frame is None:  # its first episode comes first
            if session.view == session.views[0]:  # who sat here before saw something else
                self.game.set_view(slot, session.view)
            return
        try:
            frame = self.game.set_view(slot, session.view)
        except SourceError as error:
            session.view = self.game.view(slot)
            session.say(str(error))
        else:
            session.began(frame, self.game.seed_of(slot), self.game.beside(slot))
        session.shown_view = self.game.view(slot)
        player.due = self._first_due(player)
        if not player.gone:
            player.show(0)

    def _dream_again(self, player: Player, error: SourceError, seed: int | None) -> None:
        """A real game that cannot begin an episode gives its player back to the dream.

        Raises:
            SourceError: the given one, where there is no dream.
        """
        session = player.session
        if self.game.view(player.slot) == session.view:
            raise error
        session.view = session.shown_view = self.game.view(player.slot)
        session.say(str(error))
        session.control("reset" if seed is None else "seed", seed)

    def _first_due(self, player: Player) -> float:
        """When the picture now shown has been seen for long enough, and others are due too.

        Who begins in between would stay out of step with the others, and so out of their batches.
        """
        soonest = time.perf_counter() + self._period(player)
        if not any(p is not player and p.session.frame is not None for p in self.players):
            return soonest
        return soonest + (self._beat - soonest) % (1 / self.game.fps)

    def _period(self, player: Player) -> float:
        return 1 / (self.game.fps * player.session.speed)

    def _demand(self, sampling: Sampling | None, speed: float = 1.0) -> float:
        """How much of the model's time is asked for, relative to the world's default."""
        default = self.game.default_sampling
        if default is None or sampling is None:
            return speed
        # Decoding and the heads cost about as much as one more denoising step.
        return speed * (sampling.steps + 1) / (default.steps + 1)

    def _is_dear(self, player: Player) -> bool:
        return self._demand(player.session.sampling, player.session.speed) > 1

    def _rest(self, player: Player, seconds: float) -> float:
        """How long a player leaves the model to the others after using it for ``seconds``."""
        others = [
            p for p in self.players if p is not player and not p.session.paused and not p.gone
        ]
        if not others:
            return 0.0
        share = 1 / (len(others) + 1)
        modest = [p for p in others if not self._is_dear(p)]
        if modest:
            share = min(share, _DEAR_SHARE / (len(others) + 1 - len(modest)))
        return seconds / share - seconds

    def _tick(self, due: list[Player], now: float) -> None:
        began = time.perf_counter()
        # Everybody on one grid, so that batches stay together; time that is lost is not caught up
        # with.
        self._beat = min(p.due for p in due)
        if now - self._beat > 2 * min(self._period(p) for p in due):
            self._beat = now
        choices: dict[int, Choice] = {}
        going: dict[int, Player] = {}
        for player in due:
            player.due = self._beat + self._period(player)
            if not player.must_wait and player.session.wants_step():
                choices[player.slot] = player.session.choose()
                going[player.slot] = player
        actions = {slot: choice.action for slot, choice in choices.items()}
        ready = self.game.take_drafts(actions)
        self._finish(ready, choices, going, began)
        batches: dict[Sampling | None, dict[int, Any]] = {}
        for slot, action in actions.items():
            if slot not in ready:
                batches.setdefault(going[slot].session.sampling, {})[slot] = action
        # Each batch is shown before a dearer one is begun.
        for sampling in sorted(batches, key=self._demand):
            batch, began = batches[sampling], time.perf_counter()
            self._finish(self.game.step(batch), choices, going, began)
            now = time.perf_counter()
            for player in (going[slot] for slot in batch):
                if self._is_dear(player):
                    rest = self._rest(player, (now - began) / len(batch))
                    player.due = max(player.due, now + rest)

    def _finish(
        self,
        outcomes: Mapping[int, Outcome],
        choices: Mapping[int, Choice],
        going: Mapping[int, Player],
        began: float,
    ) -> None:
        for slot, outcome in outcomes.items():
            player = going[slot]
            if player.gone:
                continue
            now = time.perf_counter()
            session = player.session
            if session.answering_since is not None:
                session.latencies.add(now - session.answering_since)
            session.took(choices[slot], outcome, now - began, self.game.beside(slot))
            player.show(session.answering)
        self._showed = time.perf_counter()

    def _draft(self, players: list[Player], now: float, next_due: float) -> float:
        """Generate ahead for those who want it, as much as fits into the idle time.

        Returns:
            When to look again.
        """
        waiting = [
            p
            for p in players
            if p.session.lookahead
            and not p.session.over
            and p.session.frame is not None
            and not p.session.reset_pending
            and not self.game.has_draft(p.slot)
        ]
        if not waiting:
            return next_due
        batches: dict[Sampling | None, list[Player]] = {}
        for player in waiting:
            batches.setdefault(player.session.sampling, []).append(player)
        # A paused player's frames can be made at leisure, if nobody else plays.
        running = any(not p.session.paused for p in players)
        since = max(self._showed, now - _SETTLE)
        room = max(next_due - since, 0.7 / self.game.fps) if running else 1.0
        for sampling in sorted(batches, key=self._demand):
            batch = batches[sampling]
            every = len(batch[0].session.keymap.all_actions())
            for everything in (True, False):
                if everything and not 1 < every <= self._all_actions:
                    continue
                cost = self.game.cost({p.slot: every if everything else 1 for p in batch})
                if cost <= 0.9 * room:
                    # The pictures just shown are on their way, and need the cores more.
                    begin = self._showed + min(_SETTLE, max(0.0, room - cost) / 2)
                    if begin > now:
                        return begin
                    guesses = {p.slot: p.session.guesses_for_next(everything) for p in batch}
                    self.game.draft(guesses)
                    return now
        return next_due
