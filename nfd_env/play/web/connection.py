"""TCP connections: how many there may be, and how long a request may take."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from nfd_env.play.web.access import SECURITY_HEADERS

log = logging.getLogger(__name__)

_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 10\r\n"
    b"Content-Type: text/plain\r\n"
    + "".join(f"{name}: {value}\r\n" for name, value in SECURITY_HEADERS.items()).encode()
    + b"\r\nToo many connections. Try again later.\n"
)


@dataclass
class Gate:
    """Counts the connections that are open.

    Attributes:
        most: connections at a time.
        most_each: the same for one address.
        seconds: that a client has for the head of a request, and may keep an idle connection.
    """

    most: int
    most_each: int
    seconds: float
    open: Counter[str] = field(default_factory=Counter)

    def enter(self, address: str) -> bool:
        """Whether one more may come from ``address``."""
        if self.open.total() >= self.most or self.open[address] >= self.most_each:
            return False
        self.open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """One that had entered is gone."""
        self.open[address] -= 1
        self.open += Counter()  # forgets addresses without connections


class Connection(web.RequestHandler):
    """One TCP connection to a browser."""

    def __init__(
        self,
        manager: web.Server,
        gate: Gate,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None] | None = None,
    ) -> None:
        """Wait for the connection to be made.

        ``settled`` is called once, when its client has a seat, or asks for none any more.
        """
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=gate.seconds,
            lingering_time=2.0,  # for bodies, which no request of ours has
            access_log=None,  # type: ignore[arg-type]
        )
        self._gate = gate
        self._address: str | None = None
        self._refused = False
        self._late: asyncio.TimerHandle | None = None
        self._settled = settled

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Enter, or be turned away."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        if not self._gate.enter(address):
            self._refused = True
            assert isinstance(transport, asyncio.Transport)
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._address = address
        self._late = self._loop.call_later(self._gate.seconds, self.force_close)
        super().connection_made(transport)

    def head_arrived(self) -> None:
        """The head of a request is there: its client is in earnest."""
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def settle(self) -> None:
        """Its client has a seat now, or will have none."""
        if self._settled is not None:
            settled, self._settled = self._settled, None
            settled()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; those of a connection that was turned away are ignored."""
        if not self._refused:
            super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Leave."""
        self.head_arrived()
        self.settle()
        if self._address is not None:
            self._gate.leave(self._address)
            self._address = None
        if not self._refused:
            super().connection_lost(exc)

    def handle_error(
        self,
        request: Any,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Any:
        """Answer a malformed request: one line in the log, not a traceback."""
        self.head_arrived()
        self.settle()
        if status >= 500:
            response = super().handle_error(request, status, exc, message)
        else:
            what = " ".join(ascii(str(message or exc)).split())[:120]
            log.warning("a malformed request from %s: %s", request.remote, what)
            if request.writer.output_size > 0:
                raise ConnectionError("a part of the answer is sent already")
            response = web.Response(status=status, text="This request is malformed.\n")
            response.force_close()
        response.headers.update(SECURITY_HEADERS)
        return response
