"""Several server processes behind one address: seats, tokens, films, and what ends whom."""

import asyncio
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest

aiohttp = pytest.importorskip("aiohttp")

from nfd_env.play.commands import ServeConfig  # noqa: E402
from nfd_env.play.web import protocol  # noqa: E402
from nfd_env.play.web.serve import serve  # noqa: E402
from nfd_env.play.web.server import ServeError  # noqa: E402
from nfd_env.play.web.workers import Channel, Workers, _Worker  # noqa: E402
from tests.play.no_worker import end_at_once  # noqa: E402
from tests.play.test_load import serving  # noqa: E402
from tests.play.test_server import PATIENCE, Client, run, until  # noqa: E402

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks for processes in /proc"
)
OPTIONS = ("--workers", "2", "--token", "s3cret")


def children(pid):
    """Processes that ``pid`` has started and that run Python's spawned children."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_bytes().rpartition(b")")[2].split()[1]
            if int(parent) == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass
    return found


async def let_in(server):
    """A browser that has shown the token."""
    http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
    async with http.get(server.url, params={"token": "s3cret"}) as answer:
        assert answer.status == 200 and "nfd" in await answer.text()
    return http


def worker_of(client):
    assert client.hello, client.bye
    return int(client.hello["key"].split("-")[0])


def test_seats_are_counted_across_workers_and_a_dead_one_is_replaced(make_world):
    async def main():
        async with serving(str(make_world()), 4, *OPTIONS, patience=300) as server:
            http = await let_in(server)
            async with aiohttp.ClientSession() as stranger:
                for path in ("ws", "", "clip/1-x.mp4"):
                    async with stranger.get(server.url + path) as answer:
                        assert answer.status == 401
            clients = [Client(server, http, seed=i) for i in range(4)]
            await asyncio.gather(*(client.__aenter__() for client in clients))
            assert sorted(map(worker_of, clients)) == [0, 0, 1, 1]
            await until(lambda: all(c.headers and c.headers[-1]["players"] == 4 for c in clients))
            async with http.get(server.url + "api/worlds") as answer:
                about = await answer.json()
                assert (about["players"], about["seats"]) == (4, 4)
            fifth = await Client(server, http).__aenter__()
            assert fifth.bye and (fifth.bye["t"], fifth.bye["code"]) == ("bye", protocol.FULL)
            assert "all 4 places" in fifth.bye["why"]
            for client in clients:
                async with http.get(f"{server.url}clip/{client.hello['key']}.mp4") as answer:
                    assert answer.status == 200 and len(await answer.read()) > 100

            # Whose seat is given back can be taken, wherever it is.
            await clients[0].__aexit__()
            again = await Client(server, http).__aenter__()
            assert worker_of(again) == worker_of(clients[0])
            clients[0] = again

            # One is killed: its players lose the connection, the others do not notice.
            workers = children(server.process.pid)
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            await until(lambda: sum(c.socket.closed for c in clients) == 2)
            stay = [c for c in clients if not c.socket.closed]
            for client in stay:
                await client.pictures(3)
            assert len(set(map(worker_of, stay))) == 1
            await until(lambda: set(children(server.process.pid)) - set(workers))

            for _ in range(2 * PATIENCE):  # there is no room until it is ready
                new = await Client(server, http).__aenter__()
                if new.hello:
                    break
                await asyncio.sleep(0.5)
            assert worker_of(new) != worker_of(stay[0])
            status, said = await server.stop()
            assert status == 0 and "Traceback" not in said, said
            assert "takes its place" in said and "status -9" in said
            await until(lambda: all(c.socket.closed for c in (*stay, new)))
            assert {c.socket.close_code for c in (*stay, new)} == {protocol.GOING}
            await http.close()

    run(main, 700)


def test_a_seat_and_who_takes_it_are_told_at_once():
    """Else a place would be counted twice, or not at all, while somebody else is handed over."""

    async def main():
        parent, line = socket.socketpair()
        client, connection = socket.socketpair()
        for end in (parent, line):
            end.setblocking(False)
        channel, loop = Channel(line), asyncio.get_running_loop()

        async def accept(connection, settled):
            await asyncio.sleep(0)
            channel.tell_players(1)
            settled()
            settled()  # once is enough
            await asyncio.sleep(0.05)
            connection.close()

        listening = asyncio.ensure_future(channel.listen(accept, lambda number: None))
        assert await loop.sock_recv(parent, 8) == struct.pack("<II", 0, 0)
        socket.send_fds(parent, [struct.pack("<II", 0, 1)], [connection.fileno()])
        assert await loop.sock_recv(parent, 64) == struct.pack("<II", 1, 1)
        parent.close()
        await listening
        client.close(), connection.close(), line.close()

    run(main)


def test_workers_do_not_outlive_a_parent_that_is_killed(make_world):
    async def main():
        async with serving(str(make_world()), 2, *OPTIONS, patience=300) as server:
            workers = children(server.process.pid)
            assert len(workers) == 2
            server.process.kill()
            await until(lambda: not any(map(alive, workers)))

    run(main, 500)


def alive(pid):
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def test_a_worker_that_cannot_begin_ends_all():
    async def main():
        workers = Workers(ServeConfig(port=0, workers=2), 1.0, end_at_once)
        with pytest.raises(ServeError, match=r"worker \d ended \(status 3\) before it was ready"):
            await workers.start()
        assert not children(os.getpid())

    run(main)


def test_the_number_of_workers_is_checked_first():
    with pytest.raises(ValueError, match="workers must be from 1 to max_clients, 8, got 9"):
        serve(ServeConfig(workers=9))


def test_who_gets_a_connection():
    async def main():
        server = Workers(ServeConfig(workers=3, max_clients=9), 1.0, end_at_once)
        assert server._choose(b"GET /ws HTTP/1.1\r\n", True) is None
        server._workers = [_Worker(n, 3, None, None) for n in range(3)]
        for worker in server._workers[1:]:
            worker.ready.set()
        first, second = server._workers[1:]
        first.players, second.players = 2, 2
        assert server._choose(b"", True) is first
        first.handed = 1  # on its way
        assert server._choose(b"", True) is second
        first.received, first.players = 1, 1  # and gone again
        assert server._choose(b"", True) is first
        assert server._choose(b"GET / HTTP/1.1\r\n", False) is first
        assert server._choose(b"GET /clip/2-abc.mp4", False) is second
        assert server._choose(b"GET /clip/0-abc.mp4", False) is first  # which has no such film

    run(main)


def test_numbers_are_told_when_they_change_only():
    """An answer to each would go round and round."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0), theirs.settimeout(0)
    channel, worker = Channel(theirs), _Worker(0, 3, None, ours)
    for _ in range(3):
        channel.tell_players(2)
        worker.tell(5)
    assert (len(ours.recv(100)), len(theirs.recv(100))) == (8, 8)
    ours.close(), theirs.close()


def test_a_first_line_in_pieces_is_waited_for():
    async def main():
        server = Workers(ServeConfig(port=0, workers=2), 1.0, end_at_once)
        handed = []

        class Taker(_Worker):
            def hand(self, connection, plays):
                handed.append(plays)

        server._workers = [Taker(0, 3, None, None)]
        server._workers[0].ready.set()
        await server._bind()
        accepting = asyncio.create_task(server._accept(server._listeners[0]))
        for parts in ((b"GET /w", b"s?world=a HTTP/1.1\r\n"), (b"GET /wsx HTTP/1.1\r\n",), (b"",)):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.1)
            writer.close()
        await until(lambda: handed == [True, False])
        await until(lambda: not server._gate.open.total())
        accepting.cancel()
        server._listeners[0].close()

    run(main)
