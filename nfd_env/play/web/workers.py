"""Several processes behind one address: ``nfd serve --workers N``.

The parent alone listens. It looks at the first bytes of a connection without taking them, and
hands the socket itself to a worker, which is a whole server of its own: a player's to the worker
with the most free seats, for as long as it is open. So nothing is passed on afterwards, and no
player can be sent to a worker that is full while another is not.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import re
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from typing import Any

from nfd_env.play.commands import ServeConfig
from nfd_env.play.web.connection import Gate
from nfd_env.play.web.server import ServeError, cannot_listen, page_url

log = logging.getLogger(__name__)

_BACKLOG = 256
_PEEK = 64  # bytes: room for "GET /clip/" and the number of a worker
_WAITING, _WAITING_EACH = 256, 96  # connections without a first line; the same of one address
_AGAIN = 0.02  # seconds until an incomplete first line is looked at again
_LEAVE = 15.0  # seconds that a worker has to say goodbye to its players

# Two numbers, short enough to arrive in one piece. From the parent: what it is, and whether the
# connection is a player's, or how many play elsewhere. From a worker: how many players' connections
# it has looked at since it began, and how many play now.
_MESSAGE = struct.Struct("<II")
_SOCKET, _ELSEWHERE = range(2)


class Channel:
    """A worker's end of the line to the parent."""

    def __init__(self, line: socket.socket) -> None:
        """Over ``line``."""
        self._line = line
        self._received = self._players = 0
        self._telling = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def tell_players(self, players: int) -> None:
        """So many play here now."""
        if players != self._players:  # an answer to each number from the parent would never end
            self._players = players
            self._tell_soon()

    def _tell_soon(self) -> None:
        # Who takes a seat is looked at no more, and both are told at once: a place that is counted
        # twice, or not at all, would send somebody to a full worker while another has room.
        if self._loop is None:
            self._tell()
        elif not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        with suppress(OSError):  # the parent is gone, which ``listen`` notices
            self._line.send(_MESSAGE.pack(self._received, self._players))

    async def listen(
        self,
        accept: Callable[[socket.socket, Callable[[], None]], Awaitable[None]],
        play_elsewhere: Callable[[int], None],
    ) -> None:
        """Say that all is ready, and take connections until the parent closes the line."""
        self._loop = loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def take(connection: socket.socket, plays: int) -> None:
            left = [plays]  # to be counted, once

            def settled() -> None:
                self._received += left.pop() if left else 0
                if plays:
                    self._tell_soon()

            try:
                await accept(connection, settled)
            except OSError:  # it has just been closed
                connection.close()
                settled()

        def read() -> None:
            try:
                data, files, _, _ = socket.recv_fds(self._line, _MESSAGE.size, 1)
            except OSError:
                data, files = b"", []
            if not data:
                ended.set()
                return
            what, number = _MESSAGE.unpack(data)
            if what == _ELSEWHERE:
                play_elsewhere(number)
                return
            for file in files:
                connection = socket.socket(fileno=file)
                connection.setblocking(False)
                tasks.add(task := asyncio.create_task(take(connection, number)))
                task.add_done_callback(tasks.discard)

        loop.add_reader(self._line, read)
        self._tell()
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._line)


class _Worker:
    """A worker as the parent knows it."""

    def __init__(self, number: int, seats: int, process: SpawnProcess, line: socket.socket) -> None:
        self.number, self.seats, self.process, self.line = number, seats, process, line
        self.players = self.handed = self.received = self.elsewhere = 0
        self.ready = asyncio.Event()

    @property
    def free(self) -> int:
        """Seats; who has been handed over and not been counted yet has one."""
        return self.seats - self.players - (self.handed - self.received)

    def hand(self, connection: socket.socket, plays: bool) -> None:
        """Give it a connection; raises OSError when it cannot take any."""
        message = _MESSAGE.pack(_SOCKET, int(plays))
        socket.send_fds(self.line, [message], [connection.fileno()])
        self.handed += plays

    def tell(self, elsewhere: int) -> None:
        """So many play at the others."""
        if elsewhere != self.elsewhere:
            with suppress(OSError):  # it is busy, or gone; the next number will do
                self.line.send(_MESSAGE.pack(_ELSEWHERE, elsewhere))
                self.elsewhere = elsewhere


class Workers:
    """The parent: listens, hands over, and keeps as many workers as were asked for."""

    def __init__(
        self, settings: ServeConfig, head_seconds: float, work: Callable[..., None]
    ) -> None:
        """Prepare; ``start`` binds and starts the workers.

        Args:
            settings: of ``nfd serve``; ``max_clients`` is of all workers together.
            head_seconds: that a client has for the first bytes.
            work: what a worker's process runs.

        Raises:
            ServeError: where sockets cannot be handed over.
        """
        if not hasattr(socket, "send_fds"):
            raise ServeError("--workers needs Linux or macOS: leave it out")
        self._settings, self._work = settings, work
        self.host, self.port = settings.host, settings.port
        self._secret = secrets.token_urlsafe(32)
        self._workers: list[_Worker] = []
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._gate = Gate(_WAITING, _WAITING_EACH, head_seconds)
        self._failed: asyncio.Future[None] | None = None

    @property
    def url(self) -> str:
        """Where the page is, without a token."""
        return page_url(self.host, self.port)

    async def start(self) -> None:
        """Bind, start the workers, and serve once all of them are ready.

        Raises:
            ServeError: when the address cannot be bound, or a worker ends before it is ready.
        """
        self._failed = asyncio.get_running_loop().create_future()
        try:
            await self._bind()
            # Together, as each takes seconds to load the world.
            self._workers = [self._begin(n) for n in range(self._settings.workers)]
            ready = asyncio.gather(*(w.ready.wait() for w in self._workers))
            await asyncio.wait([ready, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                ready.cancel()
                with suppress(asyncio.CancelledError):
                    await ready
                self._failed.result()
            for listener in self._listeners:
                self._spawn(self._accept(listener))
        except BaseException:
            await self.stop()
            raise

    async def serve_until(self, stopped: asyncio.Event) -> None:
        """Wait for ``stopped``.

        Raises:
            ServeError: when a worker has ended and another one cannot take its place.
        """
        assert self._failed is not None
        waiting = asyncio.ensure_future(stopped.wait())
        await asyncio.wait([waiting, self._failed], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._failed.done():
            self._failed.result()

    async def stop(self) -> None:
        """Stop listening, let the workers say goodbye, and end those that do not."""
        for task in self._tasks:
            task.cancel()
        for listener in self._listeners:
            listener.close()
        loop = asyncio.get_running_loop()
        for worker in self._workers:
            if worker.line.fileno() >= 0:  # it has not ended by itself
                loop.remove_reader(worker.line)
                worker.line.close()
        for worker in self._workers:
            await loop.run_in_executor(None, worker.process.join, _LEAVE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    # -- The address -------------------------------------------------------------------------

    async def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, address in dict.fromkeys(found):
                listener = socket.socket(family, kind, protocol)
                self._listeners.append(listener)
                listener.setblocking(False)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # the other family has a socket of its own
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # The same port at all addresses, also where any free one will do.
                listener.bind((address[0], self.port, *address[2:]))
                listener.listen(_BACKLOG)
                self.port = listener.getsockname()[1]
        except OSError as error:
            raise ServeError(cannot_listen(error, self.host, self.port)) from None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, or a client that left at once
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            if self._gate.enter(peer[0]):
                self._spawn(self._place(connection, peer[0]))
            else:
                connection.close()

    async def _place(self, connection: socket.socket, address: str) -> None:
        """Hand a connection over, once it has said what it wants."""
        try:
            async with asyncio.timeout(self._gate.seconds):
                head = await _peek(connection)
            plays = re.match(rb"GET /ws[? ]", head) is not None
            worker = self._choose(head, plays)
            if worker is not None:
                worker.hand(connection, plays)
        except (OSError, TimeoutError):  # it is gone, too slow, or the worker is
            pass
        finally:
            self._gate.leave(address)
            connection.close()  # the worker has its own handle

    def _choose(self, head: bytes, plays: bool) -> _Worker | None:
        """Whose it is; None while there is no worker."""
        ready = [w for w in self._workers if w.ready.is_set()]
        if plays:
            return max(ready, key=lambda w: w.free, default=None)
        # The film of a player's last minute is where the player is. All else goes to one worker,
        # which so sees all wrong tokens of an address.
        film = re.match(rb"GET /clip/(\d{1,4})-", head)
        owner = [w for w in ready if film and w.number == int(film[1])]
        return next(iter(owner or ready), None)

    # -- The workers -------------------------------------------------------------------------

    def _begin(self, number: int) -> _Worker:
        """Start a worker."""
        settings, count = self._settings, self._settings.workers
        seats = settings.max_clients // count + (number < settings.max_clients % count)
        ours, theirs = socket.socketpair()
        own = replace(settings, max_clients=seats, port=self.port)
        process = multiprocessing.get_context("spawn").Process(
            target=self._work,
            args=(own, number, self._secret, settings.max_clients, theirs),
            name=f"nfd serve, worker {number}",
        )
        # A worker that is still starting must not be ended by the terminal either.
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            process.start()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        theirs.close()
        ours.setblocking(False)
        worker = _Worker(number, seats, process, ours)
        asyncio.get_running_loop().add_reader(ours, self._hear, worker)
        return worker

    def _hear(self, worker: _Worker) -> None:
        """A worker has said something, or ended."""
        try:
            data = worker.line.recv(_MESSAGE.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended(worker)
            return
        worker.received, worker.players = _MESSAGE.unpack(data)
        worker.ready.set()
        self._tell_numbers()

    def _tell_numbers(self) -> None:
        total = sum(w.players for w in self._workers)
        for worker in self._workers:
            worker.tell(total - worker.players)

    def _ended(self, worker: _Worker) -> None:
        """Its players are let go by the system, and their pages come again by themselves."""
        assert self._failed is not None
        asyncio.get_running_loop().remove_reader(worker.line)
        worker.line.close()
        worker.process.join(1.0)
        worker.process.kill()  # in case that it has lost the line only
        worker.process.join()
        status = worker.process.exitcode
        if not worker.ready.is_set():
            if not self._failed.done():
                text = f"worker {worker.number} ended (status {status}) before it was ready"
                self._failed.set_exception(ServeError(text))
            return
        log.warning(
            "worker %d ended (status %s): its players were let go, and another takes its place",
            worker.number,
            status,
        )
        self._workers[self._workers.index(worker)] = self._begin(worker.number)
        self._tell_numbers()

    def _spawn(self, work: Any) -> None:
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)


async def _peek(connection: socket.socket) -> bytes:
    """The first bytes of a request, which stay to be read.

    Raises:
        ConnectionError: when there are none.
    """
    connection.setblocking(False)
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    while True:
        head = connection.recv(_PEEK, socket.MSG_PEEK)
        if not head:
            raise ConnectionError("closed")
        if len(head) == _PEEK or b"\r\n" in head:
            return head
        await asyncio.sleep(_AGAIN)
