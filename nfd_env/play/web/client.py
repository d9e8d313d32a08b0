"""One player in a browser: a WebSocket, a seat, and the way of the pictures between them.

The model runs on the engine's thread, pictures are compressed on another, and the event loop only
passes messages on. A client that falls behind misses pictures; none is queued for it.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from nfd_env.config import config_class
from nfd_env.play.engine import Engine, Player, Shown
from nfd_env.play.session import Session
from nfd_env.play.web import protocol
from nfd_env.play.web.pictures import compress

_GOODBYE_SECONDS = 2.0  # that a client has to take note of the end


@config_class
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
        connections: TCP connections at a time; a page has one or two, while it loads up to seven.
        connections_each: the same for one address. Everybody behind a proxy shares one.
        head_seconds: that a client has for the head of a request.
    """

    clients: int = 8
    idle_seconds: float = 180.0
    message_bytes: int = 2048
    messages_per_second: float = 200.0
    in_flight: int = 6
    heartbeat_seconds: float = 20.0
    replay_seconds: float = 60.0
    connections: int = 256
    connections_each: int = 96
    head_seconds: float = 10.0


class Client:
    """One WebSocket."""

    def __init__(
        self, socket: web.WebSocketResponse, limits: Limits, encoder: ThreadPoolExecutor
    ) -> None:
        """A client without a seat; ``encoder`` compresses its pictures."""
        self.key = secrets.token_urlsafe(16)
        self.socket, self._limits, self._encoder = socket, limits, encoder
        self.session: Session | None = None
        self.player: Player | None = None
        self.history: deque[bytes] = deque()
        self._pixelated = False
        self.may_download: dict[str, float] = {}  # kind of file -> from when on, time.monotonic
        self.sent = self.dropped = self.players = 0
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._raw: Shown | None = None
        self._encoding = False
        self._newest: tuple[int, bytes] | None = None
        self._changed = asyncio.Event()
        self._in_flight: deque[int] = deque()
        self._last_sent = 0
        self._allowance = 2 * limits.messages_per_second
        self._refilled = time.monotonic()

    def sit(self, session: Session, engine: Engine, seed: int | None) -> bool:
        """Take a seat; whether there was one."""
        pictures = int(self._limits.replay_seconds * engine.game.fps)
        self.history = deque(maxlen=max(1, min(pictures, 10_000)))
        self._pixelated = engine.game.display == "pixelated"
        self.player = engine.join(session, self.publish, seed)
        self.session = session if self.player is not None else None
        return self.player is not None

    def may_speak(self) -> bool:
        """Whether one more message is within the rate."""
        now, rate = time.monotonic(), self._limits.messages_per_second
        self._allowance += (now - self._refilled) * rate
        self._allowance, self._refilled = min(self._allowance, 2 * rate) - 1, now
        return self._allowance >= 0

    def acknowledge(self, number: int) -> None:
        """The client has shown the pictures up to ``number``.

        Raises:
            BadMessage: when that one was never sent.
        """
        if number > self._last_sent:
            raise protocol.BadMessage("ack takes the number of a picture that was sent")
        while self._in_flight and self._in_flight[0] <= number:
            self._in_flight.popleft()
        self._changed.set()

    def publish(self, shown: Shown) -> None:
        """Take a picture on the engine's thread, and let another one compress it."""
        with self._lock:
            if self._raw is not None:
                self.dropped += 1
            self._raw = shown
            if self._encoding:
                return
            self._encoding = True
        try:
            self._encoder.submit(self._encode)
        except RuntimeError:  # the server has just been stopped
            pass

    def _encode(self) -> None:
        """On the encoder's thread, as long as there are pictures."""
        while True:
            with self._lock:
                shown, self._raw = self._raw, None
                if shown is None:
                    self._encoding = False
                    return
            picture = compress(shown.frame, self._pixelated)
            self.history.append(picture)
            header = {
                **shown.hud,
                "n": shown.number,
                "seq": shown.seq,
                "players": self.players,
                "dropped": self.dropped,
            }
            packet = protocol.pack_picture(header, picture)
            try:
                self._loop.call_soon_threadsafe(self._offer, shown.number, packet)
            except RuntimeError:  # the loop has just been closed
                return

    def _offer(self, number: int, packet: bytes) -> None:
        if self._newest is not None:
            self.dropped += 1
        self._newest = number, packet
        self._changed.set()

    async def send_pictures(self) -> None:
        """Send the newest picture whenever the client has room for one."""
        while not self.socket.closed:
            await self._changed.wait()
            self._changed.clear()
            if self._newest is None or len(self._in_flight) >= self._limits.in_flight:
                continue
            (number, packet), self._newest = self._newest, None
            self._in_flight.append(number)
            self._last_sent = number
            self.sent += 1
            try:
                await self.socket.send_bytes(packet)
            except (ConnectionError, RuntimeError):
                return


async def part(socket: web.WebSocketResponse, code: int, why: str) -> None:
    """Part from a client, which may have gone already, or have stopped reading."""
    try:
        if not socket.closed:
            message = {"t": "bye", "code": code, "why": why}
            await asyncio.wait_for(socket.send_json(message), _GOODBYE_SECONDS)
            await socket.close(code=code, message=why.encode()[:120])
    except (TimeoutError, ConnectionError, RuntimeError):
        pass


def new_socket(limits: Limits) -> web.WebSocketResponse:
    """A WebSocket within these limits."""
    return web.WebSocketResponse(
        autoclose=False,  # the handler returns first, and so the seat is free before the answer
        max_msg_size=limits.message_bytes,
        heartbeat=limits.heartbeat_seconds,
        timeout=_GOODBYE_SECONDS,
        compress=False,
    )
