import asyncio
import gc
import io
import json
import os
import resource
import signal
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp")

from nfd_env.cli import main as nfd  # noqa: E402
from nfd_env.data.shards import RecordedDataset  # noqa: E402
from nfd_env.play.commands import ServeConfig  # noqa: E402
from nfd_env.play.web import protocol  # noqa: E402
from nfd_env.play.web import serve as web_serve  # noqa: E402
from nfd_env.play.web.access import is_loopback  # noqa: E402
from nfd_env.play.web.client import Limits  # noqa: E402
from nfd_env.play.web.rooms import world_games  # noqa: E402
from nfd_env.play.web.server import PlayServer, ServeError  # noqa: E402
from tests.clients.action_spaces import ACTION_SPACES  # noqa: E402
from tests.play.scroll_game import ScrollGame  # noqa: E402
from tests.tiny_world import make_tiny_world  # noqa: E402

PATIENCE = 120  # seconds; a machine may be busy


def run(main, seconds=2 * PATIENCE):
    return asyncio.run(asyncio.wait_for(main(), seconds))


async def until(condition, seconds=PATIENCE):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


class Running:
    """``async with Running(...) as (server, http)``."""

    def __init__(self, games=None, **kwargs):
        games = games or {"Scroll": lambda count: ScrollGame(count)}
        self.server = PlayServer(games, port=0, **kwargs)

    async def __aenter__(self):
        await self.server.start()
        self.http = aiohttp.ClientSession()
        return self.server, self.http

    async def __aexit__(self, *_):
        await self.http.close()
        await self.server.stop()


class Client:
    """A page without a page."""

    def __init__(self, server, http, **params):
        self.server, self.http, self.params = server, http, params
        self.headers, self.jpeg = [], b""
        self.gaps, self.arrived = [], 0.0
        self.hello = self.bye = None
        self.seq, self.sent_at, self.latencies = 0, {}, []
        self.answer = True

    async def __aenter__(self):
        url = self.server.url + "ws"
        self.socket = await self.http.ws_connect(url, params=self.params)
        self.task = asyncio.create_task(self.read())
        # A world is loaded first; who is not let in at all has neither.
        await until(lambda: self.hello or self.bye or self.task.done())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await self.socket.close()

    async def send(self, **message):
        await self.socket.send_str(json.dumps(message))

    async def key(self, key, down):
        self.seq += 1
        self.sent_at[self.seq] = time.perf_counter()
        await self.send(t="key", k=key, d=int(down), n=self.seq)

    async def read(self):
        async for message in self.socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                data = json.loads(message.data)
                self.hello = data if data["t"] == "hello" else self.hello
                self.bye = data if data["t"] == "bye" else self.bye
                continue
            (length,) = struct.unpack_from("<I", message.data)
            header = json.loads(message.data[4 : 4 + length])
            now = time.perf_counter()
            if self.headers and not self.headers[-1]["over"]:
                self.gaps.append(now - self.arrived)
            self.headers.append(header)
            self.arrived = now
            self.jpeg = message.data[4 + length :]
            if header["over"] or not header["step"]:
                self.sent_at.clear()
            for seq in [s for s in self.sent_at if s <= header["seq"]]:
                self.latencies.append(time.perf_counter() - self.sent_at.pop(seq))
            if self.answer:
                await self.send(t="ack", n=header["n"])

    async def pictures(self, count, seconds=PATIENCE):
        goal = len(self.headers) + count
        end = time.monotonic() + seconds
        while len(self.headers) < goal and time.monotonic() < end:
            assert self.bye is None, self.bye
            await asyncio.sleep(0.01)
        assert len(self.headers) >= goal
        return self.headers[-1]


def test_a_key_reaches_the_picture_and_the_film_can_be_downloaded(monkeypatch):
    monkeypatch.setattr(ScrollGame, "ood", 2.5)

    async def main():
        async with Running() as (server, http), Client(server, http, seed=5) as client:
            assert client.hello["keys"] == ["a", "d", "left", "right"]
            await client.pictures(5)
            await client.key("right", True)
            await client.pictures(6)
            assert client.headers[-1]["action"] == "right"
            await client.send(t="release", n=client.seq)
            assert (await client.pictures(6))["action"] == "noop"
            assert client.headers[-1]["seed"] == 5
            assert client.jpeg[:2] == b"\xff\xd8"
            async with http.get(f"{server.url}clip/{client.hello['key']}.mp4") as answer:
                assert answer.status == 200 and (await answer.read())[4:8] == b"ftyp"
            # Who wants another one at once waits; what led to a picture unlike real ones is there.
            for kind, status in (("mp4", 429), ("npz", 200)):
                async with http.get(f"{server.url}clip/{client.hello['key']}.{kind}") as answer:
                    assert answer.status == status
                    body = await answer.read()
            kept = np.load(io.BytesIO(body))
            assert client.headers[-1]["drift"] == 1.25 and set(kept["drift"].tolist()) == {2.5}
            assert kept["frames"].shape[1:] == (96, 128, 3) and kept["seed"] == 5
            assert len(kept["actions"]) == len(kept["frames"]) <= 256
            assert (np.diff(kept["steps"]) == 1).all()
            async with http.get(f"{server.url}clip/wrong.mp4") as answer:
                assert answer.status == 404

    run(main)


@pytest.mark.parametrize(
    "garbage",
    [
        "not json",
        "[]",
        '{"t": "fly"}',
        '{"t": "key", "k": 3, "d": 1}',
        '{"t": "key", "k": "a", "d": 7}',
        '{"t": "key", "k": "a", "d": 1, "n": -4}',
        '{"t": "ack", "n": 1000000}',
        '{"t": "control", "do": ["pause"]}',
        "[" * 2000,
        b"binary",
        "x" * 5000,
    ],
)
def test_garbage_ends_that_client_only(garbage):
    async def main():
        async with (
            Running() as (server, http),
            Client(server, http) as good,
            Client(server, http) as bad,
        ):
            await bad.pictures(1)
            if isinstance(garbage, bytes):
                await bad.socket.send_bytes(garbage)
            else:
                await bad.socket.send_str(garbage)
            await asyncio.wait_for(bad.task, PATIENCE)
            assert bad.socket.close_code in (protocol.BAD_MESSAGE, 1009)
            await good.pictures(5)
            assert server.counts()["seats"] == 1

    run(main)


def test_a_refused_control_is_no_reason_to_part():
    async def main():
        async with Running() as (server, http), Client(server, http) as client:
            await client.send(t="control", do="speed", value=77)
            await client.pictures(5)

    run(main)


def test_a_flood_is_cut_off():
    async def main():
        limits = Limits(messages_per_second=50)
        async with Running(limits=limits) as (server, http), Client(server, http) as client:
            for _ in range(300):
                await client.send(t="awake")
            await asyncio.wait_for(client.task, PATIENCE)
            assert client.bye["code"] == protocol.TOO_FAST

    run(main)


def test_full_then_free_again_and_idle_players_lose_their_place():
    async def main():
        limits = Limits(clients=1, idle_seconds=0.6)
        async with Running(limits=limits) as (server, http):
            async with Client(server, http) as first:
                await first.pictures(2)
                async with Client(server, http) as second:
                    assert second.bye["code"] == protocol.FULL
                await asyncio.wait_for(first.task, PATIENCE)
                assert first.bye["code"] == protocol.IDLE
            async with Client(server, http) as third:
                await third.pictures(2)

    run(main)


def test_who_leaves_is_answered_once_the_seat_is_free():
    """Whoever then comes at once must find it, also where another process counts the seats."""

    async def main():
        async with Running() as (server, http), Client(server, http) as client:
            (player,) = server._clients
            tell, answered = server._tell_number, []
            server._tell_number = lambda: (tell(), answered.append(player.socket.closed))
            await client.socket.close()
            assert answered == [False]

    run(main)


def test_a_slow_client_misses_pictures_and_none_is_queued_for_it():
    async def main():
        async with Running() as (server, http), Client(server, http) as client:
            await client.pictures(3)
            client.answer = False
            await asyncio.sleep(1.0)
            received, missed = len(client.headers), server.counts()["dropped"]
            await until(lambda: server.counts()["dropped"] > missed + 12)
            assert len(client.headers) == received
            client.answer = True
            await client.send(t="ack", n=client.headers[-1]["n"])
            after = await client.pictures(1)
            # The next picture is the newest, not the oldest one that was missed.
            assert after["n"] - client.headers[received - 1]["n"] > 10
            assert after["dropped"] > 10

    run(main)


def test_other_sites_and_other_names_are_refused():
    async def main():
        async with Running() as (server, http):
            for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example:80"}):
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await http.ws_connect(server.url + "ws", headers=headers)
                assert caught.value.status == 403
            good = {"Origin": server.url.rstrip("/")}
            await (await http.ws_connect(server.url + "ws", headers=good)).close()
            for path in ("server.py", "../server.py", "static/app.js", "%2e%2e/server.py"):
                async with http.get(server.url + path) as answer:
                    assert answer.status == 404
            async with http.get(server.url) as answer:
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]

    run(main)


def test_malformed_addresses_are_refused_and_odd_seeds_ignored():
    async def main():
        async with Running() as (server, http):
            for headers in ({"Host": "["}, {"Origin": "http://["}, {"Origin": "null"}):
                async with http.get(server.url, headers=headers) as answer:
                    assert answer.status == 403
            for seed in ("9" * 5000, "-1", "4294967296", "٣x"):
                async with Client(server, http, seed=seed) as client:
                    await client.pictures(2)

    run(main)


def test_clients_that_stopped_reading_hold_up_neither_the_others_nor_the_end():
    async def main():
        limits = Limits(clients=8, idle_seconds=1.5)
        server = PlayServer({"Scroll": ScrollGame}, port=0, limits=limits)
        await server.start()
        async with aiohttp.ClientSession() as http:
            # These answer nothing, not even the closing handshake.
            dead = [await http.ws_connect(server.url + "ws", autoping=False) for _ in range(5)]
            async with Client(server, http) as alive:
                await alive.pictures(2)
                began = time.monotonic()
                await asyncio.wait_for(alive.task, 6)
                assert alive.bye["code"] == protocol.IDLE
                assert time.monotonic() - began < 4
            dead += [await http.ws_connect(server.url + "ws", autoping=False) for _ in range(2)]
            began = time.monotonic()
            await server.stop()
            assert time.monotonic() - began < 6
            assert server.counts()["clients"] == 0
            for socket in dead:
                await socket.close()

    run(main)


def test_a_client_that_vanishes_while_its_world_is_loaded_leaves_no_slot_taken():
    loading = threading.Event()

    def slow(count):
        loading.wait(PATIENCE)
        return ScrollGame(count)

    async def main():
        limits = Limits(clients=1)
        async with Running({"Slow": slow}, limits=limits) as (server, http):
            socket = await http.ws_connect(server.url + "ws")
            assert (await socket.receive_json())["t"] == "loading"
            assert server.counts()["clients"] == 1
            socket._response.connection.transport.abort()
            loading.set()
            await until(lambda: not server.counts()["clients"])
            assert server.counts()["clients"] == server.counts()["seats"] == 0
            async with Client(server, http) as client:
                await client.pictures(2)

    run(main)


def test_a_token_is_needed_beyond_loopback():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("0.0.0.0")
    with pytest.raises(ServeError, match="token"):
        PlayServer({"x": ScrollGame}, host="0.0.0.0")

    async def main():
        async with Running(token="s3cret") as (server, _):
            jar = aiohttp.CookieJar(unsafe=True)
            async with aiohttp.ClientSession(cookie_jar=jar) as http:
                for path in ("", "?token=wrong", "api/worlds", "app.js", "ws"):
                    async with http.get(server.url + path) as answer:
                        assert answer.status == 401
                async with http.get(server.url + "?token=s3cret") as answer:
                    assert answer.status == 200 and "token" not in str(answer.url)
                async with Client(server, http) as client:
                    await client.pictures(2)

    run(main)


def test_a_broken_model_lets_its_players_go_and_the_server_lives_on():
    async def main():
        bad = [ScrollGame(16, fail_at=3) for _ in range(2)]
        left = iter(bad)
        games = {
            "Good": lambda count: ScrollGame(count),
            "Bad": lambda count: next(left),
            "Missing": lambda count: (_ for _ in ()).throw(ValueError("no such file")),
        }
        async with Running(games) as (server, http):
            for _ in bad:
                async with Client(server, http, world="Bad") as client:
                    await asyncio.wait_for(client.task, PATIENCE)
                    assert client.bye["code"] == protocol.FAILED
            assert bad[0].closed  # when it was made anew
            for world in ("Missing", "../etc"):
                async with Client(server, http, world=world) as client:
                    assert client.bye is not None
            async with Client(server, http, world="Good") as client:
                await client.pictures(5)

    run(main)


def test_sixteen_players_are_served_fairly_without_growing():
    async def main():
        limits = Limits(clients=16, replay_seconds=1)
        async with Running(limits=limits) as (server, http):
            clients = [Client(server, http) for _ in range(16)]
            for client in clients:
                await client.__aenter__()
            await asyncio.sleep(2)
            gc.collect()
            before, memory = [len(c.headers) for c in clients], _memory()
            for i in range(12):
                await asyncio.gather(*(c.key("left", i % 2 == 0) for c in clients))
                await asyncio.sleep(0.25)
            counts = [len(c.headers) - b for c, b in zip(clients, before, strict=True)]
            gc.collect()
            grown = _memory() - memory
            assert min(counts) > 0.6 * max(counts) and min(counts) > 20, counts
            assert grown < 30e6, grown
            for client in clients:
                await client.__aexit__()
            await until(lambda: not server.counts()["clients"])
            assert server.counts()["clients"] == server.counts()["seats"] == 0
            latencies = np.array([x for c in clients for x in c.latencies]) * 1000
            return min(counts) / 3, np.percentile(latencies, [50, 95])

    rate, (p50, p95) = run(main)
    print(f"16 players: at least {rate:.1f} frames/s, input to frame {p50:.0f} / {p95:.0f} ms")


def test_two_players_of_one_world_have_worlds_of_their_own(tmp_path):
    world = str(make_tiny_world(tmp_path / "tiny", hazard_bias=-30.0))

    async def main():
        games = world_games(world, {"device": "cpu"})
        limits = Limits(clients=2)
        async with (
            Running(games, limits=limits) as (server, http),
            Client(server, http, seed=1) as a,
            Client(server, http, seed=2) as b,
        ):
            await a.pictures(10)
            await b.pictures(3)
            assert a.headers[-1]["seed"] == 1 and b.headers[-1]["seed"] == 2
            assert a.jpeg != b.jpeg
            await a.send(t="control", do="sampling_steps", value=4)
            assert (await a.pictures(5))["sampling_steps"] == 4

    run(main)


def test_a_player_changes_to_the_real_game_and_another_dreams_on(tmp_path):
    pytest.importorskip("pygame", reason="CartPole draws by it")
    world = str(make_tiny_world(tmp_path / "tiny", hazard_bias=-30.0))

    async def main():
        games = world_games(world, {"device": "cpu"}, real=True)
        limits = Limits(clients=2)
        async with (
            Running(games, limits=limits) as (server, http),
            Client(server, http, seed=1) as a,
            Client(server, http, seed=2) as b,
        ):
            assert a.hello["views"] == ["dream", "real", "split"]
            await a.pictures(3)
            for view in ("real", "split"):
                await a.send(t="control", do="view")
                while a.headers[-1]["view"] != view:
                    await a.pictures(1)
            while not a.headers[-1]["apart"]:
                await a.pictures(1)
            cv2 = pytest.importorskip("cv2")
            assert cv2.imdecode(np.frombuffer(a.jpeg, np.uint8), 1).shape == (66, 98, 3)
            assert (await b.pictures(3))["view"] == "dream"

    run(main)


def test_everybodys_play_is_kept(tmp_path):
    folder = tmp_path / "kept"

    async def main():
        async with (
            Running(limits=Limits(clients=2), save=folder) as (server, http),
            Client(server, http, seed=1) as a,
            Client(server, http, seed=2) as b,
        ):
            assert a.hello["saving"] and b.hello["saving"]
            await asyncio.gather(a.pictures(12), b.pictures(12))

    run(main)
    (world,) = folder.iterdir()
    data = RecordedDataset(world)
    assert sorted(e.seed for e in data) == [1, 2]
    assert all(len(e) > 8 and e.truncated[-1] and e.policy == "person" for e in data)


def test_a_bad_start_is_one_clear_message(capsys, tmp_path):
    assert nfd(["serve", "NoSuchWorld"]) == 1
    said = capsys.readouterr().err
    assert "unknown world 'NoSuchWorld'" in said and said.count("\n") == 1
    world = str(make_tiny_world(tmp_path / "tiny"))

    async def main():
        async with Running() as (server, _):
            arguments = ["serve", world, "--port", str(server.port), "--device", "cpu"]
            return await asyncio.to_thread(nfd, arguments)

    assert run(main) == 1
    said = capsys.readouterr().err
    assert "choose another with --port" in said and said.count("\n") == 1
    for wrong, meant in (
        (["--port", "70000"], "65535"),
        (["--port", "0", "--host", "203.0.113.7"], "choose another with --host"),
        (["--port", "0", "--max-clients", "0"], "max_clients"),
        (["--port", "0", "--allow-origin", "*"], "allowed origin"),
        (["--port", "0", "--token-file", str(tmp_path / "nothing")], "nothing"),
    ):
        assert nfd(["serve", world, "--device", "cpu", *wrong]) == 1
        said = capsys.readouterr().err
        assert meant in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_every_action_space_is_served(make_world, name):
    world = str(make_world(action_space=ACTION_SPACES[name], hazard_bias=-30.0))

    async def main():
        games = world_games(world, {"device": "cpu"})
        async with Running(games) as (server, http), Client(server, http, seed=1) as client:
            seen = {str((await client.pictures(3))["action"])}
            for key in client.hello["keys"]:
                await client.key(key, True)
                seen.add(str((await client.pictures(6))["action"]))
                await client.key(key, False)
                await client.pictures(6)
            assert client.bye is None
            assert len(seen) > 1  # some key does something

    run(main)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("loading", [False, True])
def test_a_signal_ends_the_server_in_order(monkeypatch, name, loading):
    """Also while its world is loaded: a first process hears only what it has handlers for."""
    number, done = getattr(signal, name), []

    class Served:
        url, port = "http://here", 1

        def __init__(self, *args, **kwargs):
            self.rooms = SimpleNamespace(names=["a"], open=self.open)

        async def start(self):
            done.append("started")

        async def open(self, world):
            loop = asyncio.get_running_loop()
            loop.call_later(0.2, os.kill, os.getpid(), number)
            await asyncio.sleep(60 * loading)

        async def stop(self):
            done.append("stopped")

    monkeypatch.setattr(web_serve, "PlayServer", Served)
    monkeypatch.setattr(web_serve, "world_games", lambda *args: {})
    # Windows has none, so it must not be called.
    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", None)
    # Whoever started the tests may ignore some of them, as a shell does for "command &".
    before = signal.signal(number, signal.SIG_DFL)
    try:
        web_serve.serve(ServeConfig())
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(number, before)
    assert done == ["started", "stopped"]


def _memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
