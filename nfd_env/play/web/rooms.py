"""The worlds that are played: each is loaded when somebody first picks it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nfd_env.play.engine import Engine, Player
from nfd_env.play.game import Game
from nfd_env.play.session import agent_for
from nfd_env.players.frames import FramePlayer

log = logging.getLogger(__name__)


@dataclass
class Room:
    """A world that is being played, and whom its players can hand over to."""

    game: Game
    engine: Engine
    agent: FramePlayer | None

    def close(self) -> None:
        """Stop the engine, and let go of the game."""
        self.engine.close()
        self.game.close()


class Rooms:
    """All of them, by the name of the world."""

    def __init__(
        self,
        games: Mapping[str, Callable[[int], Game]],
        seats: int,
        agent: Any,
        trust: bool = False,
    ) -> None:
        """Offer ``games``, each with so many seats; ``agent`` is of the first one at least."""
        self._games, self._seats = dict(games), seats
        self._agent, self._trust = agent, trust
        self._open: dict[str, Room] = {}
        self._making: dict[str, asyncio.Lock] = {}

    @property
    def names(self) -> list[str]:
        """What can be played; the first is the page's default."""
        return list(self._games)

    @property
    def taken(self) -> int:
        """Seats that are taken."""
        return sum(len(room.engine.players) for room in self._open.values())

    async def open(self, name: str) -> Room:
        """The room of a world, which is loaded if need be.

        Raises:
            KeyError: for an unknown name.
            Exception: whatever loading the world raised.
        """
        make = self._games[name]
        async with self._making.setdefault(name, asyncio.Lock()):
            room = self._open.get(name)
            if room is None or room.engine.error is not None:
                loop = asyncio.get_running_loop()
                if room is not None:  # its model failed: let go of it and of its real games
                    del self._open[name]
                    await loop.run_in_executor(None, room.close)
                room = await loop.run_in_executor(None, self._make, name, make)
                room.engine.start()
                self._open[name] = room
            return room

    def _make(self, name: str, make: Callable[[int], Game]) -> Room:
        game = make(self._seats)
        agent = None
        try:
            agent = agent_for(game, self._agent, self._trust)
        except ValueError as error:
            # It was made for the world that was named; the others are only offered beside it.
            if name == self.names[0]:
                raise
            log.warning("world %s is played without the agent: %s", name, error)
        return Room(game, Engine(game), agent)

    def of(self, player: Player) -> Room | None:
        """Where a player sits."""
        return next((r for r in self._open.values() if player in r.engine.players), None)

    async def close(self) -> None:
        """Stop all engines."""
        rooms, self._open = list(self._open.values()), {}
        for room in rooms:
            await asyncio.get_running_loop().run_in_executor(None, room.close)


def world_games(
    world: str, sampling: Mapping[str, Any], real: bool = False, trust: bool = False
) -> dict[str, Callable[[int], Game]]:
    """The worlds that the page offers: the given one first, then the shipped ones.

    Args:
        world: a folder or a shipped name; "" for the first shipped one.
        sampling: arguments of ``Slots``, for all of them.
        real: players may change to the real game, which runs here.
        trust: see ``nfd_env.worlds.load.make_real``.

    Raises:
        CheckpointError: when the given one is not there or is damaged.
    """
    from nfd_env.play.slots import Slots
    from nfd_env.play.twin import TwinSlots
    from nfd_env.worlds.format import read_spec
    from nfd_env.worlds.load import find_world, make_real, shipped_worlds

    names = ([world] if world else []) + list(shipped_worlds())
    folders: dict[str, str] = {}
    for name in names:
        folders.setdefault(read_spec(find_world(name)).name, name)

    def make(folder: str, count: int) -> Game:
        if real:
            return TwinSlots(lambda: make_real(folder, trust=trust), folder, count, **sampling)
        return Slots(folder, count, **sampling)

    return {name: partial(make, folder) for name, folder in folders.items()}
