"""``nfd serve``: a server as the command line describes it, alone or with workers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from socket import socket
from typing import Any

import torch

from nfd_env.config import check_ranges
from nfd_env.play.commands import ServeConfig
from nfd_env.play.web.access import check_host, is_loopback, read_token
from nfd_env.play.web.client import Limits
from nfd_env.play.web.rooms import world_games
from nfd_env.play.web.server import Place, PlayServer
from nfd_env.play.web.workers import Channel, Workers
from nfd_env.stopping import told_by_signals

log = logging.getLogger(__name__)

# The engine's thread holds the interpreter in short stretches only, so that the event loop gets
# its turn quickly.
_SWITCH_SECONDS = 0.001


def serve(settings: ServeConfig) -> None:
    """Serve the browser player until interrupted; the other shipped worlds are offered too.

    Raises:
        ServeError: when the address cannot be bound, an origin is none, or workers fail.
        CheckpointError: when the world cannot be loaded.
        DeviceError: when the device is not there.
        ValueError: when an argument is out of range.
        OSError: when the token's file cannot be read.
    """
    check_ranges(settings, max_clients="[1, inf)", idle_seconds="(0, inf)")
    if not 1 <= settings.workers <= settings.max_clients:
        raise ValueError(
            f"workers must be from 1 to max_clients, {settings.max_clients}, got {settings.workers}"
        )
    settings = replace(settings, host=check_host(settings.host))
    secret = read_token(settings.token, settings.token_file)
    made_up = secret is None and not is_loopback(settings.host)
    if made_up:
        secret = secrets.token_urlsafe(16)
    settings = replace(settings, token=secret, token_file=None)
    server = alone = make_server(settings)
    if settings.workers > 1:
        server = Workers(settings, alone.limits.head_seconds, work)

    async def main() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        # Not by the loop's own handlers, which Windows does not have. From the start: a container's
        # first process hears no signal that it has no handler for.
        with told_by_signals(lambda *_: loop.call_soon_threadsafe(stopped.set)):
            await server.start()
            try:
                if server is alone and await _stopped_before(
                    alone.rooms.open(alone.rooms.names[0]), stopped
                ):
                    return
                # A token that is somebody's own is known to them, and need not be in a log.
                query = f"?token={secret}" if made_up else "?token=..." if secret else ""
                print(f"Play at {server.url}{query}   (Ctrl+C stops)", flush=True)
                if is_loopback(settings.host):
                    where = server.url.removeprefix("http://").rstrip("/")
                    print(
                        f"From another machine: ssh -L {server.port}:{where} <this machine>, then "
                        f"open http://127.0.0.1:{server.port}/",
                        flush=True,
                    )
                if isinstance(server, Workers):
                    await server.serve_until(stopped)
                else:
                    await stopped.wait()
            finally:
                await server.stop()

    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(main())


async def _stopped_before(work: Coroutine[Any, Any, Any], stopped: asyncio.Event) -> bool:
    """Whether ``stopped`` was set before ``work`` was done; raises what ``work`` does."""
    doing, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (doing, stopping):
        if not task.done():
            task.cancel()
    if doing.done() and not doing.cancelled():
        doing.result()
    return stopped.is_set()


def make_server(settings: ServeConfig, place: Place | None = None) -> PlayServer:
    """The server that ``settings`` describe, not started yet; raises what ``serve`` does."""
    usual = Limits()
    return PlayServer(
        world_games(settings.world, settings.sampling(), settings.real, settings.trust),
        host=settings.host,
        port=settings.port,
        token=settings.token,
        origins=settings.allow_origin,
        limits=Limits(
            clients=settings.max_clients,
            idle_seconds=settings.idle_seconds,
            connections=max(usual.connections, 8 * settings.max_clients),
            connections_each=max(usual.connections_each, 8 * settings.max_clients),
        ),
        agent=settings.agent,
        trust=settings.trust,
        save=settings.save,
        place=place,
    )


def work(settings: ServeConfig, number: int, secret: str, seats: int, line: socket) -> None:
    """Be worker ``number`` until the parent, at the other end of ``line``, is gone.

    Args:
        settings: of this worker: its own seats, the port that the parent listens at.
        number: see ``Place``, as ``secret`` and ``seats``.
        secret: see there.
        seats: see there.
        line: connected to the parent.
    """
    logging.basicConfig(format=f"nfd serve, worker {number}: %(message)s", level=logging.WARNING)
    # The terminal tells everybody, but it is the parent who says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_SECONDS)
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
    channel = Channel(line)

    async def main() -> None:
        server = make_server(settings, Place(number, secret, seats, channel.tell_players))
        await server.start()
        try:
            await server.rooms.open(server.rooms.names[0])
            await channel.listen(server.accept, server.play_elsewhere)
        finally:
            await server.stop()

    try:
        asyncio.run(main())
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        log.error("%s", error)
        raise SystemExit(1) from None
