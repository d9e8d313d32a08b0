"""The server of the browser player: the page, the sockets, and who sits where."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import WSMsgType, web

from nfd_env.play import PlayError
from nfd_env.play.engine import Engine
from nfd_env.play.game import Game
from nfd_env.play.recorder import PlayRecorder
from nfd_env.play.session import ControlError, Session, sampling_choices
from nfd_env.play.web import STATIC, protocol
from nfd_env.play.web.access import SECURITY_HEADERS, Access, check_host, is_loopback
from nfd_env.play.web.client import Client, Limits, new_socket, part
from nfd_env.play.web.connection import Connection, Gate
from nfd_env.play.web.pictures import film, trail_bytes
from nfd_env.play.web.rooms import Room, Rooms
from nfd_env.play.web.saving import Saver

log = logging.getLogger(__name__)

_FILM_REST = 4  # times as long as a film took, until its player may have another one
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class ServeError(PlayError):
    """The server cannot be started; the message says what to do."""


@dataclass(frozen=True)
class Place:
    """A worker's, among several that serve one address.

    Attributes:
        number: which of them it is, from 0.
        secret: of the cookie that a browser is given for the token, the same in all of them.
        seats: of all of them together.
        tell: is called with the number of players here whenever it changes.
    """

    number: int
    secret: str
    seats: int
    tell: Callable[[int], None]


class PlayServer:
    """Serves the page and the sockets; see ``serve.serve`` for the usual way in."""

    def __init__(
        self,
        games: Mapping[str, Callable[[int], Game]],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        origins: Sequence[str] = (),
        limits: Limits | None = None,
        agent: Any = None,
        trust: bool = False,
        encoders: int = 1,
        save: str | Path | None = None,
        place: Place | None = None,
    ) -> None:
        """Prepare; ``start`` binds.

        Args:
            games: name -> function that makes the game for so many players; the first is the
                page's default. A game is made when somebody first picks it.
            host: address to bind to.
            port: TCP port, 0 for a free one.
            token: whoever knows it may play; required unless ``host`` is a loopback address.
            origins: addresses that the page may be opened at beside the server's own, such as
                "https://hub.example.org": those of a proxy.
            limits: see ``Limits``.
            agent: whom players can hand over to, see ``nfd_env.players.frames.FramePlayer``.
            trust: see there.
            encoders: threads that compress pictures.
            save: folder of data sets that everybody's play is appended to, see ``Saver``; the page
                tells its player.
            place: of a worker among others, which gets its sockets by ``accept``.

        Raises:
            ServeError: when a token is required, or the port or an origin is none.
        """
        if not games:
            raise ServeError("there is no world to serve")
        if not 0 <= port <= 65535:
            raise ServeError(f"a port is from 1 to 65535, or 0 for a free one, got {port}")
        try:
            host = check_host(host)
        except ValueError as error:
            raise ServeError(str(error)) from None
        if not is_loopback(host) and not token:
            raise ServeError(
                f"{host} can be reached from other machines: give a token, or stay on 127.0.0.1 "
                "and forward the port with ssh -L"
            )
        self.host, self.port, self.limits = host, port, limits or Limits()
        try:
            self._access = Access(host, token, origins, place.secret if place else "")
        except ValueError as error:
            raise ServeError(str(error)) from None
        self.rooms = Rooms(games, self.limits.clients, agent, trust)
        self._place = place
        self._saver = None if save is None else Saver(save, f"{place.number}_" if place else "")
        self._elsewhere = 0
        self._clients: set[Client] = set()
        self._encoder = ThreadPoolExecutor(encoders, "pictures")
        self._films = ThreadPoolExecutor(1, "film")
        self._runner: web.AppRunner | None = None
        self._connect: Callable[..., Connection] | None = None
        self._listener: asyncio.Server | None = None
        self._janitor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the page is, without a token."""
        return page_url(self.host, self.port)

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ServeError: when the port is in use or the address is not ours.
        """
        app = web.Application(middlewares=[self._guard()], client_max_size=4096)
        app.on_response_prepare.append(self._secure)
        for path in STATIC.iterdir():
            app.router.add_get("/" if path.name == "index.html" else f"/{path.name}", self._file)
        app.router.add_get("/api/worlds", self._worlds)
        app.router.add_get("/ws", self._socket)
        app.router.add_get("/clip/{key}.{kind:mp4|npz}", self._kept)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
        await self._runner.setup()
        assert self._runner.server is not None
        limits = self.limits
        gate = Gate(limits.connections, limits.connections_each, limits.head_seconds)
        loop, manager = asyncio.get_running_loop(), self._runner.server
        self._connect = partial(Connection, manager, gate, loop)
        if self._place is None:
            await self._listen_at(self._connect)
        self._janitor = asyncio.create_task(self._clean_up())

    async def _listen_at(self, connect: Callable[..., Connection]) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(connect, self.host, self.port)
        except OSError as error:
            assert self._runner is not None
            await self._runner.cleanup()
            raise ServeError(cannot_listen(error, self.host, self.port)) from None
        self.port = self._listener.sockets[0].getsockname()[1]

    async def accept(self, connection: socket.socket, settled: Callable[[], None]) -> None:
        """Serve a connection that another process has accepted; for ``settled`` see there."""
        assert self._connect is not None
        make = partial(self._connect, settled)
        await asyncio.get_running_loop().connect_accepted_socket(make, connection)

    async def stop(self) -> None:
        """Say goodbye to everybody and free everything."""
        if self._janitor is not None:
            self._janitor.cancel()
        if self._listener is not None:
            self._listener.close()
        goodbye = "the server is stopping"
        await asyncio.gather(*(part(c.socket, protocol.GOING, goodbye) for c in self._clients))
        if self._runner is not None:
            await self._runner.cleanup()
        await self.rooms.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._films.shutdown(wait=False, cancel_futures=True)

    def counts(self) -> dict[str, int]:
        """Players now, and pictures that were sent and dropped for them."""
        return {
            "clients": len(self._clients),
            "seats": self.rooms.taken,
            "sent": sum(c.sent for c in self._clients),
            "dropped": sum(c.dropped for c in self._clients),
        }

    def play_elsewhere(self, players: int) -> None:
        """So many play at other workers now."""
        self._elsewhere = players
        self._tell_number()

    @property
    def _seats(self) -> int:
        return self._place.seats if self._place else self.limits.clients

    async def _secure(self, request: web.Request, response: web.StreamResponse) -> None:
        """Every answer carries the security headers, refusals too."""
        response.headers.update(SECURITY_HEADERS)
        if self._place is not None:  # the next request may be another worker's
            response.force_close()

    # -- HTTP --------------------------------------------------------------------------------

    def _guard(self) -> Any:
        @web.middleware
        async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
            if isinstance(request.protocol, Connection):
                request.protocol.head_arrived()
            try:
                self._access.check(request, f"nfd_token_{self.port}")
                return await handler(request)
            finally:
                _settle(request)

        return guard

    async def _file(self, request: web.Request) -> web.Response:
        path = STATIC / (request.path.strip("/") or "index.html")
        kind = _KINDS[path.suffix]
        return web.Response(body=path.read_bytes(), content_type=kind, charset="utf-8")

    async def _worlds(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "worlds": self.rooms.names,
                "players": len(self._clients) + self._elsewhere,
                "seats": self._seats,
            }
        )

    async def _kept(self, request: web.Request) -> web.Response:
        """A player's last minute as an MP4, or ``save_trail``'s; the player alone knows the key."""
        key = request.match_info["key"].encode(errors="replace")
        client = next(
            (c for c in self._clients if secrets.compare_digest(c.key.encode(), key)), None
        )
        room = None if client is None or client.player is None else self.rooms.of(client.player)
        if client is None or room is None or not client.history or client.session is None:
            raise web.HTTPNotFound(text="There is no such play (any more).\n")
        kind = request.match_info["kind"]
        if kind == "npz" and not client.session.trail:
            raise web.HTTPNotFound(text="There is no drift to keep yet.\n")
        began = time.monotonic()
        if began < client.may_download.get(kind, 0.0):
            raise web.HTTPTooManyRequests(text="One file at a time; wait a little.\n")
        client.may_download[kind] = math.inf
        try:
            make = partial(film, list(client.history), room.game)
            if kind == "npz":
                make = partial(trail_bytes, tuple(client.session.trail), client.session.seed)
            body = await asyncio.get_running_loop().run_in_executor(self._films, make)
        finally:
            # Who asks all the time leaves the processor to the others for most of it.
            now = time.monotonic()
            client.may_download[kind] = now + _FILM_REST * (now - began)
        name = quote(f"{room.game.name}.{kind}", safe="")
        return web.Response(
            body=body,
            content_type={"mp4": "video/mp4", "npz": "application/octet-stream"}[kind],
            headers={"Content-Disposition": f"attachment; filename*=UTF-8''{name}"},
        )

    # -- WebSocket ---------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = new_socket(self.limits)
        await socket.prepare(request)
        client: Client | None = None
        sender: asyncio.Task[None] | None = None
        room: Room | None = None
        recorder: PlayRecorder | None = None
        try:
            name = request.query.get("world") or self.rooms.names[0]
            if name not in self.rooms.names:
                await part(socket, protocol.BAD_MESSAGE, "there is no such world here")
                return socket
            if len(self._clients) >= self.limits.clients:
                await self._say_full(socket)
                return socket
            # Taken before the world is loaded, so that no more come in meanwhile.
            client = Client(socket, self.limits, self._encoder)
            if self._place is not None:
                client.key = f"{self._place.number}-{client.key}"
            self._clients.add(client)
            self._tell_number()
            _settle(request)
            await socket.send_json({"t": "loading", "world": name})
            room = await self._open(socket, name)
            if room is None:
                return socket
            game = room.game
            # Which remembers an episode of its own.
            agent = room.agent and room.agent.fork()
            session = Session(
                game.keymap, game.default_sampling, game.steps_of, agent, views=game.views
            )
            recorder = session.recorder = await self._record(name, game)
            if not client.sit(session, room.engine, _seed_number(request.query.get("seed"))):
                await self._say_full(socket)
                return socket
            hello = self._hello(client, room, name)
            await socket.send_json(hello | {"saving": recorder is not None})
            sender = asyncio.create_task(client.send_pictures())
            await self._listen(client, session, room.engine)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if client is not None:
                self._clients.discard(client)
                self._tell_number()
                if client.player is not None and room is not None:
                    room.engine.leave(client.player)
            if recorder is not None and self._saver is not None:
                loop = asyncio.get_running_loop()
                await asyncio.shield(loop.run_in_executor(None, self._saver.end, recorder))
            if sender is not None:
                sender.cancel()
        return socket

    async def _record(self, name: str, game: Game) -> PlayRecorder | None:
        """A player's recording, where the server keeps them."""
        if self._saver is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._saver.begin, name, game)
        except (ValueError, OSError, RuntimeError) as error:
            log.error("a player is not recorded: %s", error)
            return None

    async def _open(self, socket: web.WebSocketResponse, name: str) -> Room | None:
        try:
            return await self.rooms.open(name)
        except (ValueError, OSError, RuntimeError) as error:
            log.error("world %s: %s", name, error)
        except Exception:
            log.exception("world %s cannot be loaded", name)
        why = "this world cannot be loaded; see the server's output"
        await part(socket, protocol.FAILED, why)
        return None

    def _hello(self, client: Client, room: Room, name: str) -> dict[str, Any]:
        game = room.game
        size = (game.frame_shape[1], game.frame_shape[0])
        shown = game.display_aspect, game.display, size
        return protocol.about_game(name, game.fps, *shown, game.keymap) | {
            "key": client.key,
            "steps": sampling_choices(game),
            "has_ahead": True,
            "has_teacher": game.steps_of is not None,
            "has_agent": room.agent is not None,
            "views": game.views,
            "replay_seconds": self.limits.replay_seconds,
            "idle_seconds": self.limits.idle_seconds,
        }

    async def _say_full(self, socket: web.WebSocketResponse) -> None:
        await part(socket, protocol.FULL, f"all {self._seats} places are taken")

    def _tell_number(self) -> None:
        for client in self._clients:
            client.players = len(self._clients) + self._elsewhere
        if self._place is not None:
            self._place.tell(len(self._clients))

    async def _listen(self, client: Client, session: Session, engine: Engine) -> None:
        async for message in client.socket:
            if not client.may_speak():
                await part(client.socket, protocol.TOO_FAST, "too many messages")
                return
            try:
                if message.type != WSMsgType.TEXT:
                    raise protocol.BadMessage("messages must be text")
                _act(client, session, engine, protocol.parse(message.data))
            except ControlError as error:
                await client.socket.send_json({"t": "refused", "why": str(error)})
            except protocol.BadMessage as error:
                log.warning("a client was let go: %s", error)
                await part(client.socket, protocol.BAD_MESSAGE, str(error))
                return

    async def _clean_up(self) -> None:
        """Free the slots of players who have gone away, and of broken worlds."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle_seconds / 4))
            now = time.monotonic()
            for client in list(self._clients):
                session, player = client.session, client.player
                if session is None or player is None:
                    continue
                room = self.rooms.of(player)
                if room is None or room.engine.error is not None:
                    why = "the model failed; see the server's output"
                    await part(client.socket, protocol.FAILED, why)
                elif now - session.last_input > self.limits.idle_seconds:
                    why = "you were away, so your place was given back"
                    await part(client.socket, protocol.IDLE, why)


def _settle(request: web.Request) -> None:
    """Whoever asks has a seat now, or will have none, see ``Connection``."""
    if isinstance(request.protocol, Connection):
        request.protocol.settle()


def _act(client: Client, session: Session, engine: Engine, message: protocol.Message) -> None:
    """Do what a message says.

    Raises:
        BadMessage: when it cannot be.
        ControlError: when a control does not take the value.
    """
    if isinstance(message, protocol.Key):
        act = session.press if message.down else session.release
        act(message.key, message.number)
    elif isinstance(message, protocol.Tilt):
        session.tilt(message.entry, message.deflection, message.number)
    elif isinstance(message, protocol.Ack):
        client.acknowledge(message.number)
    elif isinstance(message, protocol.Release):
        session.release_all()
    elif isinstance(message, protocol.Control):
        session.control(message.name, message.value)
        engine.wake()
    else:
        session.last_input = time.monotonic()


def page_url(host: str, port: int) -> str:
    """Where the page is, without a token."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def cannot_listen(error: OSError, host: str, port: int) -> str:
    """What is the matter, in the system's words, and which option helps."""
    number = error.errno or 0  # negative: a failed name lookup's, which strerror does not know
    what = os.strerror(number) if number > 0 else error.strerror or error
    option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
    return f"cannot listen on {host} port {port} ({what}); choose another with {option}"


def _seed_number(text: str | None) -> int | None:
    """A seed from an address; None where there is none, or none that can be used."""
    if not text or len(text) > 10 or not text.isdecimal():
        return None
    return int(text) if int(text) < 2**32 else None
