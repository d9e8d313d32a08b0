"""The browser player (aiohttp): one page, a WebSocket a player, one batched model a world.

The model runs on an engine's thread, pictures are compressed on another, and the event loop only
passes messages on. A client that falls behind misses pictures; none is queued for it.

Messages from the page are JSON objects with a type "t": ``key`` {k, d, n}, ``release`` {n},
``ack`` {n}, ``control`` {do, value} and ``awake``. Pictures go out as binary messages: the length
of a JSON header (uint32, little endian), the header, the JPEG.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hmac
import io
import ipaddress
import json
import logging
import os
import secrets
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from nfd_env.play.agents import load_agent
from nfd_env.play.engine import Engine, Player, Shown
from nfd_env.play.game import Game
from nfd_env.play.keys import key_name
from nfd_env.play.session import SPEEDS, ControlError, Session, sampling_choices

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
# Close codes of the WebSocket, in the range for applications.
FULL, IDLE, BAD_MESSAGE, TOO_FAST, FAILED, GOING = 4001, 4002, 4003, 4004, 4005, 4006


_GOODBYE_SECONDS = 2.0  # that a client has to take note of the end


class ServeError(RuntimeError):
    """The server cannot be started; the message says what to do."""


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them together, may use.

    Attributes:
        clients: players at a time, all worlds together.
        idle_seconds: without any input the slot is freed.
        message_bytes: largest message from a client.
        messages_per_second: sustained rate of a client's messages; twice that in a burst.
        in_flight: pictures that a client may leave unacknowledged before it misses some.
        heartbeat_seconds: a client that does not answer a ping within half of it has vanished.
        replay_seconds: how much of the play can be downloaded.
    """

    clients: int = 8
    idle_seconds: float = 180.0
    message_bytes: int = 2048
    messages_per_second: float = 200.0
    in_flight: int = 6
    heartbeat_seconds: float = 20.0
    replay_seconds: float = 60.0


class BadMessage(ValueError):
    """A client sent something that the protocol does not have."""


@dataclass(eq=False)
class _Client:
    """One WebSocket."""

    key: str
    socket: web.WebSocketResponse
    session: Session | None = None
    player: Player | None = None
    raw: Shown | None = None
    encoding: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    newest: tuple[int, bytes] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: deque[int] = field(default_factory=deque)
    last_sent: int = 0
    sent: int = 0
    dropped: int = 0
    history: deque[bytes] = field(default_factory=deque)
    allowance: float = 0.0
    refilled: float = field(default_factory=time.monotonic)
    downloading: bool = False


@dataclass
class _Room:
    """A world that is being played."""

    game: Game
    engine: Engine
    agent: Any


class PlayServer:
    """Serves the page and the sockets; see ``serve`` for the usual way in."""

    def __init__(
        self,
        games: Mapping[str, Callable[[int], Game]],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        limits: Limits | None = None,
        agent: Any = None,
        encoders: int = 1,
    ) -> None:
        """Prepare; ``start`` binds.

        Args:
            games: name -> function that makes the game for so many players; the first is the
                page's default. A game is made when somebody first picks it.
            host: address to bind to.
            port: TCP port, 0 for a free one.
            token: whoever knows it may play; required unless ``host`` is a loopback address.
            limits: see ``Limits``.
            agent: whom players can hand over to, see ``load_agent``.
            encoders: threads that compress pictures.

        Raises:
            ServeError: when a token is required, the port is none, or aiohttp is not installed.
        """
        import_aiohttp()
        if not games:
            raise ServeError("there is no world to serve")
        if not 0 <= port <= 65535:
            raise ServeError(f"a port is from 1 to 65535, or 0 for a free one, got {port}")
        self.loopback = is_loopback(host)
        if not self.loopback and not token:
            raise ServeError(
                f"{host} can be reached from other machines: give a token, or stay on 127.0.0.1 "
                "and forward the port with ssh -L"
            )
        self.host, self.port, self.limits = host, port, limits or Limits()
        self._games, self._token, self._agent = dict(games), token, agent
        self._rooms: dict[str, _Room] = {}
        self._making: dict[str, asyncio.Lock] = {}
        self._clients: set[_Client] = set()
        self._encoder = ThreadPoolExecutor(encoders, "jpeg")
        self._films = ThreadPoolExecutor(1, "film")
        self._runner: web.AppRunner | None = None
        self._janitor: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """Where the page is, without a token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ServeError: when the port is in use or the address is not ours.
        """
        from aiohttp import web

        self._loop = asyncio.get_running_loop()
        app = web.Application(middlewares=[self._guard()], client_max_size=4096)
        for path in _FILES:
            app.router.add_get(path, self._file)
        app.router.add_get("/api/worlds", self._worlds)
        app.router.add_get("/ws", self._socket)
        app.router.add_get("/clip/{key}.mp4", self._clip)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self.host, self.port)
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ServeError(_cannot_listen(error, self.host, self.port)) from None
        self.port = self._runner.addresses[0][1]
        self._janitor = asyncio.create_task(self._clean_up())

    async def stop(self) -> None:
        """Say goodbye to everybody and free everything."""
        if self._janitor is not None:
            self._janitor.cancel()
        goodbye = "the server is stopping"
        await asyncio.gather(*(_bye(c.socket, GOING, goodbye) for c in self._clients))
        if self._runner is not None:
            await self._runner.cleanup()
        rooms, self._rooms = list(self._rooms.values()), {}
        for room in rooms:
            await asyncio.get_running_loop().run_in_executor(None, room.engine.close)
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._films.shutdown(wait=False, cancel_futures=True)

    def counts(self) -> dict[str, int]:
        """Players now, and pictures that were sent and dropped for them."""
        return {
            "clients": len(self._clients),
            "seats": sum(len(r.engine.players) for r in self._rooms.values()),
            "sent": sum(c.sent for c in self._clients),
            "dropped": sum(c.dropped for c in self._clients),
        }

    async def open_room(self, name: str) -> _Room:
        """The room of a world, which is loaded if need be.

        Raises:
            KeyError: for an unknown name.
        """
        make = self._games[name]
        async with self._making.setdefault(name, asyncio.Lock()):
            if name in self._rooms and self._rooms[name].engine.error is None:
                return self._rooms[name]
            loop = asyncio.get_running_loop()
            game = await loop.run_in_executor(None, make, self.limits.clients)
            agent = None if self._agent is None else load_agent(self._agent, game.keymap.space)
            engine = Engine(game)
            engine.start()
            self._rooms[name] = _Room(game, engine, agent)
            return self._rooms[name]

    # -- HTTP --------------------------------------------------------------------------------

    def _guard(self) -> Any:
        from aiohttp import web

        @web.middleware
        async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
            # A page of another site must neither open our socket nor, by rebinding its name to
            # 127.0.0.1, pass for ours.
            if self.loopback and _host_name(request.host) not in _LOOPBACK_NAMES:
                raise web.HTTPForbidden(text="this server answers to localhost only\n")
            origin = request.headers.get("Origin")
            if origin not in (None, f"http://{request.host}", f"https://{request.host}"):
                raise web.HTTPForbidden(text="requests from other sites are refused\n")
            if self._token is not None and not self._knows_token(request):
                given = request.query.get("token", "")
                if request.path != "/" or not _same(given, self._token):
                    raise web.HTTPUnauthorized(
                        text="Open the address with ?token=... that nfd serve printed.\n"
                    )
                # The token leaves the address bar at once.
                response = web.HTTPSeeOther("/")
                response.set_cookie(
                    self._cookie, self._token, httponly=True, samesite="Strict", path="/"
                )
                raise response
            response = await handler(request)
            if not response.prepared:
                response.headers.update(_HEADERS)
            return response

        return guard

    @property
    def _cookie(self) -> str:
        return f"nfd_token_{self.port}"

    def _knows_token(self, request: web.Request) -> bool:
        assert self._token is not None
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return _same(request.cookies.get(self._cookie, ""), self._token) or _same(
            bearer, self._token
        )

    async def _file(self, request: web.Request) -> web.Response:
        from aiohttp import web

        name, kind = _FILES[request.path]
        return web.Response(body=(STATIC / name).read_bytes(), content_type=kind, charset="utf-8")

    async def _worlds(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.json_response(
            {
                "worlds": list(self._games),
                "players": len(self._clients),
                "seats": self.limits.clients,
            }
        )

    async def _clip(self, request: web.Request) -> web.Response:
        """The last minute of a player, who alone knows the key, as an MP4."""
        from aiohttp import web

        key = request.match_info["key"]
        client = next((c for c in self._clients if _same(c.key, key)), None)
        room = None if client is None or client.player is None else self._room_of(client.player)
        if client is None or room is None or not client.history:
            raise web.HTTPNotFound(text="there is no such play (any more)\n")
        if client.downloading:
            raise web.HTTPTooManyRequests(text="one film at a time\n")
        client.downloading = True
        try:
            film = await asyncio.get_running_loop().run_in_executor(
                self._films, _film, list(client.history), room.game
            )
        finally:
            client.downloading = False
        return web.Response(
            body=film,
            content_type="video/mp4",
            headers={"Content-Disposition": f'attachment; filename="{room.game.name}.mp4"'},
        )

    # -- WebSocket ---------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        from aiohttp import web

        socket = web.WebSocketResponse(
            max_msg_size=self.limits.message_bytes,
            heartbeat=self.limits.heartbeat_seconds,
            timeout=_GOODBYE_SECONDS,
            compress=False,
        )
        await socket.prepare(request)
        client: _Client | None = None
        sender: asyncio.Task[None] | None = None
        room: _Room | None = None
        try:
            name = request.query.get("world") or next(iter(self._games))
            if name not in self._games:
                await _bye(socket, BAD_MESSAGE, "there is no such world here")
                return socket
            if len(self._clients) >= self.limits.clients:
                await self._say_full(socket)
                return socket
            # Taken before the world is loaded, so that no more come in meanwhile.
            client = _Client(secrets.token_urlsafe(16), socket)
            client.allowance = 2 * self.limits.messages_per_second
            self._clients.add(client)
            await socket.send_json({"t": "loading", "world": name})
            try:
                room = await self.open_room(name)
            except (ValueError, OSError, RuntimeError) as error:
                log.error("world %s: %s", name, error)
                await _bye(socket, FAILED, "this world cannot be loaded; see the server's output")
                return socket
            session = self._seat(client, room, request.query.get("seed"))
            if session is None:
                await self._say_full(socket)
                return socket
            await socket.send_json(self._hello(client, room, name))
            sender = asyncio.create_task(self._send(client))
            await self._listen(client, session, room.engine)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if client is not None:
                self._clients.discard(client)
                if client.player is not None and room is not None:
                    room.engine.leave(client.player)
            if sender is not None:
                sender.cancel()
        return socket

    def _seat(self, client: _Client, room: _Room, seed: str | None) -> Session | None:
        """Give a client a slot; None when there is none."""
        game = room.game
        session = Session(game.keymap, game.default_sampling, game.steps_of, room.agent)
        client.history = deque(maxlen=max(1, int(self.limits.replay_seconds * game.fps)))
        player = room.engine.join(
            session, lambda shown: self._compress(client, shown), _seed_number(seed)
        )
        if player is None:
            return None
        client.session, client.player = session, player
        return session

    def _hello(self, client: _Client, room: _Room, name: str) -> dict[str, Any]:
        game = room.game
        return {
            "t": "hello",
            "key": client.key,
            "world": name,
            "fps": game.fps,
            "aspect": game.display_aspect,
            "keys": sorted(game.keymap.keys),
            "buttons": game.keymap.buttons(),
            "speeds": SPEEDS,
            "steps": sampling_choices(game),
            "has_teacher": game.steps_of is not None,
            "has_agent": room.agent is not None,
            "replay_seconds": self.limits.replay_seconds,
            "idle_seconds": self.limits.idle_seconds,
        }

    async def _say_full(self, socket: web.WebSocketResponse) -> None:
        await _bye(socket, FULL, f"all {self.limits.clients} places are taken")

    async def _listen(self, client: _Client, session: Session, engine: Engine) -> None:
        from aiohttp import WSMsgType

        async for message in client.socket:
            now = time.monotonic()
            rate = self.limits.messages_per_second
            client.allowance += (now - client.refilled) * rate
            client.allowance, client.refilled = min(client.allowance, 2 * rate) - 1, now
            if client.allowance < 0:
                await _bye(client.socket, TOO_FAST, "too many messages")
                return
            try:
                if message.type != WSMsgType.TEXT:
                    raise BadMessage("messages must be text")
                self._receive(client, session, engine, message.data)
            except ControlError as error:
                await client.socket.send_json({"t": "refused", "why": str(error)})
            except BadMessage as error:
                log.warning("a client was let go: %s", error)
                await _bye(client.socket, BAD_MESSAGE, str(error))
                return

    def _receive(self, client: _Client, session: Session, engine: Engine, text: str) -> None:
        """Act on one message.

        Raises:
            BadMessage: when it is not of the protocol.
            ControlError: when a control does not take the value.
        """
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            raise BadMessage("messages must be JSON") from None
        if not isinstance(message, dict):
            raise BadMessage("messages must be JSON objects")
        kind = message.get("t")
        if kind == "key":
            key, down = message.get("k"), message.get("d")
            if not isinstance(key, str) or len(key) > 20 or down not in (0, 1):
                raise BadMessage("key takes k, a key's name, and d, 0 or 1")
            act = session.press if down else session.release
            act(key_name(key), _number(message))
        elif kind == "ack":
            acked = _number(message)
            if acked > client.last_sent:
                raise BadMessage("ack takes the number of a picture that was sent")
            while client.in_flight and client.in_flight[0] <= acked:
                client.in_flight.popleft()
            client.changed.set()
        elif kind == "release":
            session.release_all()
        elif kind == "control":
            value = message.get("value")
            if not isinstance(message.get("do"), str) or not isinstance(
                value, bool | int | float | None
            ):
                raise BadMessage("control takes do, a name, and value, a number or a boolean")
            session.control(message["do"], value)
            engine.wake()
        elif kind == "awake":
            session.last_input = time.monotonic()
        else:
            raise BadMessage("unknown type of message")

    def _compress(self, client: _Client, shown: Shown) -> None:
        """On the engine's thread: let another one make the JPEG."""
        with client.lock:
            if client.raw is not None:
                client.dropped += 1
            client.raw = shown
            if client.encoding:
                return
            client.encoding = True
        try:
            self._encoder.submit(self._encode, client)
        except RuntimeError:  # the server has just been stopped
            pass

    def _encode(self, client: _Client) -> None:
        """On the encoder's thread, as long as there are pictures."""
        while True:
            with client.lock:
                shown, client.raw = client.raw, None
                if shown is None:
                    client.encoding = False
                    return
            packet = self._packet(client, shown)
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._offer, client, shown.number, packet)
            except RuntimeError:  # the loop has just been closed
                return

    def _packet(self, client: _Client, shown: Shown) -> bytes:
        """A picture as it goes over the wire."""
        jpeg = _jpeg(shown.frame)
        client.history.append(jpeg)
        header = {
            **shown.hud,
            "n": shown.number,
            "seq": shown.seq,
            "players": len(self._clients),
            "dropped": client.dropped,
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        return struct.pack("<I", len(text)) + text + jpeg

    def _offer(self, client: _Client, number: int, packet: bytes) -> None:
        if client.newest is not None:
            client.dropped += 1
        client.newest = number, packet
        client.changed.set()

    async def _send(self, client: _Client) -> None:
        """Send the newest picture whenever the client has room for one."""
        while not client.socket.closed:
            await client.changed.wait()
            client.changed.clear()
            if client.newest is None or len(client.in_flight) >= self.limits.in_flight:
                continue
            (number, packet), client.newest = client.newest, None
            client.in_flight.append(number)
            client.last_sent = number
            client.sent += 1
            try:
                await client.socket.send_bytes(packet)
            except (ConnectionError, RuntimeError):
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
                room = self._room_of(player)
                if room is None or room.engine.error is not None:
                    why = "the model failed; see the server's output"
                    await _bye(client.socket, FAILED, why)
                elif now - session.last_input > self.limits.idle_seconds:
                    why = "you were away, so your place was given back"
                    await _bye(client.socket, IDLE, why)

    def _room_of(self, player: Player) -> _Room | None:
        return next((r for r in self._rooms.values() if player in r.engine.players), None)


def import_aiohttp() -> None:
    """Make sure that aiohttp is there.

    Raises:
        ServeError: naming the package to install.
    """
    try:
        import aiohttp.web  # noqa: F401
    except ImportError:
        raise ServeError("nfd serve needs aiohttp: pip install 'nfd-env[serve]'") from None


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def world_games(
    world: str,
    device: str = "auto",
    sampling_steps: int | None = None,
    speculative_frames: int = 1,
    dynamics: str | None = None,
) -> dict[str, Callable[[int], Game]]:
    """The worlds that the page offers: the given one first, then the shipped ones.

    Raises:
        CheckpointError: when the given one is not there or is damaged.
    """
    from nfd_env.play.slots import Slots
    from nfd_env.worlds.format import find_world, read_spec, shipped_worlds

    folders = {read_spec(find_world(world)).name: str(find_world(world))}
    for name in shipped_worlds():
        folders.setdefault(read_spec(find_world(name)).name, name)

    def maker(folder: str) -> Callable[[int], Game]:
        return lambda count: Slots(
            folder,
            count,
            device,
            sampling_steps,
            speculative_frames=speculative_frames,
            dynamics=dynamics,
        )

    return {name: maker(folder) for name, folder in folders.items()}


def serve(
    world: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_clients: int = 8,
    token: str | None = None,
    device: str = "auto",
    sampling_steps: int | None = None,
    speculative_frames: int = 1,
    dynamics: str | None = None,
    agent: Any = None,
    idle_seconds: float = 180.0,
    ready: Callable[[PlayServer], None] | None = None,
) -> None:
    """Serve the browser player until interrupted.

    Args:
        world: a world folder, or the name of a shipped world; the others are offered beside it.
        host: address to bind to. Beyond loopback a token is required: one is made up and printed
            when none is given.
        port: TCP port, 0 for a free one.
        max_clients: players at a time, 1 or more.
        token: whoever knows it may play.
        device: see ``nfd_env.devices.resolve_device``.
        sampling_steps: denoising steps a frame; None for the world's default.
        speculative_frames: frames drawn jointly while the action is kept; with 1 players can still
            switch to 2.
        dynamics: "student" or "teacher"; None for the world's default. Players can switch.
        agent: whom players can hand over to, see ``nfd_env.play.agents.load_agent``.
        idle_seconds: a player without any input for so long loses the slot.
        ready: called once the page can be opened.

    Raises:
        ServeError: when aiohttp is missing or the address cannot be bound.
        CheckpointError: when the world cannot be loaded.
        DeviceError: when the device is not there.
        ValueError: when an argument is out of range.
    """
    if max_clients < 1 or idle_seconds <= 0:
        raise ValueError("max_clients must be at least 1 and idle_seconds above 0")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
    server = PlayServer(
        world_games(world, device, sampling_steps, speculative_frames, dynamics),
        host=host,
        port=port,
        token=token,
        limits=Limits(clients=max_clients, idle_seconds=idle_seconds),
        agent=agent,
    )

    async def main() -> None:
        import signal

        await server.start()
        try:
            await server.open_room(next(iter(server._games)))
            address = server.url + (f"?token={token}" if token else "")
            print(f"Play at {address}   (Ctrl+C stops)", flush=True)
            if server.loopback:
                print(
                    f"From another machine: ssh -L {server.port}:127.0.0.1:{server.port} "
                    f"<this machine>, then open http://127.0.0.1:{server.port}/",
                    flush=True,
                )
            if ready is not None:
                ready(server)
            stopped = asyncio.Event()
            if threading.current_thread() is threading.main_thread():
                loop = asyncio.get_running_loop()
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, stopped.set)
            await stopped.wait()
        finally:
            await server.stop()

    # The engine's thread holds the interpreter in short stretches only, so that the event loop
    # gets its turn quickly.
    sys.setswitchinterval(0.001)
    asyncio.run(main())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nfd serve``."""
    parser.add_argument("world", nargs="?", default="DoomTakeCover", help="name or folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, default=8000, help="TCP port, 0 for a free one")
    parser.add_argument("--max-clients", type=int, default=8, help="players at a time")
    parser.add_argument("--token", help="secret that players need; made up beyond loopback")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps a frame")
    parser.add_argument(
        "--speculative-frames",
        type=int,
        default=1,
        help="frames drawn jointly while the action is kept (default 1; the page can switch to 2)",
    )
    parser.add_argument("--dynamics", help="student or teacher, in a world that has both")
    parser.add_argument("--agent", help="whom players can hand over to, as in nfd play")
    parser.add_argument("--idle-seconds", type=float, default=180.0, help="then a slot is freed")


def run(args: argparse.Namespace) -> int:
    """Run ``nfd serve``; 0, or 2 after one message on stderr."""
    logging.basicConfig(format="nfd serve: %(message)s", level=logging.WARNING)
    try:
        import_aiohttp()
    except ServeError as error:
        print(f"nfd serve: {error}", file=sys.stderr)
        return 2
    from nfd_env.devices import DeviceError

    try:
        serve(
            args.world,
            host=args.host,
            port=args.port,
            max_clients=args.max_clients,
            token=args.token,
            device=args.device,
            sampling_steps=args.sampling_steps,
            speculative_frames=args.speculative_frames,
            dynamics=args.dynamics,
            agent=args.agent,
            idle_seconds=args.idle_seconds,
        )
    except (ServeError, DeviceError, ValueError, OSError) as error:
        print(f"nfd serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode(errors="replace"))


async def _bye(socket: web.WebSocketResponse, code: int, why: str) -> None:
    """Part from a client, which may have gone already, or have stopped reading."""
    try:
        if not socket.closed:
            message = {"t": "bye", "code": code, "why": why}
            await asyncio.wait_for(socket.send_json(message), _GOODBYE_SECONDS)
            await socket.close(code=code, message=why.encode()[:120])
    except (ConnectionError, RuntimeError, asyncio.TimeoutError):
        pass


def _cannot_listen(error: OSError, host: str, port: int) -> str:
    """What is the matter, in the system's words, and which option helps."""
    number = error.errno or 0  # negative: a failed name lookup's, which strerror does not know
    what = os.strerror(number) if number > 0 else error.strerror or error
    option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
    return f"cannot listen on {host} port {port} ({what}); choose another with {option}"


def _host_name(address: str) -> str:
    """The host of a Host header, "" where it is malformed."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def _seed_number(text: str | None) -> int | None:
    """A seed from an address; None where there is none, or none that can be used."""
    if not text or len(text) > 10 or not text.isdecimal():
        return None
    return int(text) if int(text) < 2**32 else None


def _number(message: Mapping[str, Any]) -> int:
    number = message.get("n", 0)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**53:
        raise BadMessage("n must be a whole number")
    return number


def _jpeg(frame: np.ndarray) -> bytes:
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, 92]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)
    assert done
    return data.tobytes()


def _film(jpegs: list[bytes], game: Game) -> bytes:
    import cv2

    from nfd_env.play.recording import display_size, write_video

    def frames() -> Any:
        for jpeg in jpegs:
            picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    first = next(frames())
    target = io.BytesIO()
    write_video(target, frames(), game.fps, display_size(first.shape, game.display_aspect, 288))
    return target.getvalue()
