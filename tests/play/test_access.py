"""Who may come in, and what strangers cannot do."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

aiohttp = pytest.importorskip("aiohttp")

from aiohttp.test_utils import make_mocked_request  # noqa: E402

from nfd_env.play.commands import ServeConfig  # noqa: E402
from nfd_env.play.web import access, protocol  # noqa: E402
from nfd_env.play.web.access import check_host  # noqa: E402
from nfd_env.play.web.client import Limits  # noqa: E402
from nfd_env.play.web.serve import serve  # noqa: E402
from nfd_env.play.web.server import PlayServer, ServeError  # noqa: E402
from tests.play.scroll_game import ScrollGame  # noqa: E402
from tests.play.test_server import Client, Running, run  # noqa: E402


async def talk(server, text):
    """What the server answers to these bytes until it closes, sooner than by default."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(text)
    answer = await asyncio.wait_for(reader.read(), 8)
    writer.close()
    return answer


def test_refusals_carry_the_security_headers():
    async def main():
        async with Running(token="s3cret") as (server, http):
            for path, headers in (
                ("", {}),
                ("nothing", {}),
                ("", {"Host": "evil.example"}),
                ("", {"Origin": "http://evil.example"}),
                ("?token=wrong", {}),
                ("clip/x.mp4", {"Authorization": "Bearer s3cret"}),
                ("nothing", {"Authorization": "Bearer s3cret"}),
            ):
                async with http.get(server.url + path, headers=headers) as answer:
                    assert answer.status in (401, 403, 404)
                    for name, value in access.SECURITY_HEADERS.items():
                        assert answer.headers[name] == value, (path, headers)

    run(main)


def test_who_guesses_the_token_waits_and_players_do_not():
    async def main():
        async with Running(token="s3cret") as (server, _):
            jar = aiohttp.CookieJar(unsafe=True)
            async with (
                aiohttp.ClientSession(cookie_jar=jar) as player,
                aiohttp.ClientSession() as guesser,
            ):
                good = server.url + "?token=s3cret&world=Scroll"
                async with player.get(good) as answer:
                    assert answer.status == 200 and answer.url.query_string == "world=Scroll"
                assert all("s3cret" not in cookie.value for cookie in jar)
                seen = []
                for i in range(12):
                    headers = {"Authorization": f"Bearer {i}"} if i % 2 else {}
                    path = server.url if i % 2 else f"{server.url}?token={i}"
                    async with guesser.get(path, headers=headers) as answer:
                        seen.append(answer.status)
                assert seen[:3] == [401] * 3 and seen[-1] == 429
                # Not even the right one is looked at now.
                async with guesser.get(good) as answer:
                    assert answer.status == 429 and int(answer.headers["Retry-After"]) >= 1
                # A made-up cookie is no guess, and who is in stays in.
                async with player.get(server.url) as answer:
                    assert answer.status == 200
                async with Client(server, player) as client:
                    await client.pictures(2)

    run(main)


def test_a_proxys_own_authorization_is_no_token():
    async def main():
        async with Running(token="s3cret") as (server, _):
            headers = {"Authorization": "Basic dXNlcjpwYXNz"}
            jar = aiohttp.CookieJar(unsafe=True)
            async with (
                aiohttp.ClientSession(cookie_jar=jar) as player,
                player.get(server.url + "?token=s3cret", headers=headers) as answer,
            ):
                assert answer.status == 200
            async with aiohttp.ClientSession() as other:
                for scheme, status in (("bearer", 200), ("Bearer", 200), ("Basic", 401)):
                    headers = {"Authorization": f"{scheme} s3cret"}
                    async with other.get(server.url, headers=headers) as answer:
                        assert answer.status == status

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1", "localhost"])
def test_the_address_that_is_listened_at_is_answered(host):
    entered = access.Access(host, None)
    request = make_mocked_request("GET", "/", headers={"Host": f"{host}:8000"})
    entered.check(request, "cookie")
    with pytest.raises(aiohttp.web.HTTPForbidden):
        entered.check(make_mocked_request("GET", "/", headers={"Host": "evil.example"}), "cookie")


def test_the_pause_grows_and_ends(monkeypatch):
    now = 0.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    throttle = access.Throttle(free=2, first=1.0, most=5.0)
    waits = []
    for _ in range(6):
        throttle.failed("a")
        waits.append(throttle.wait("a"))
        now += waits[-1]
    assert waits == [0, 0, 1, 2, 4, 5] and throttle.wait("b") == 0
    now += 1000
    throttle.failed("a")
    assert throttle.wait("a") == 0
    for i in range(10_000):
        throttle.failed(str(i))
    assert len(throttle._failures) <= 4096
    assert access._network("2001:db8::1") == access._network("2001:db8::2")
    assert access._network("10.0.0.1") != access._network("10.0.0.2")


def test_a_slow_or_idle_connection_is_closed_and_too_many_are_turned_away():
    async def main():
        limits = Limits(head_seconds=0.5, connections_each=3)
        async with Running(limits=limits) as (server, http):
            assert await talk(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ") == b""
            assert await talk(server, b"") == b""
            kept = await talk(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert kept.startswith(b"HTTP/1.1 200")
            open_ones = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
            refused = await talk(server, b"")
            assert refused.startswith(b"HTTP/1.1 503") and b"nosniff" in refused
            for _, writer in open_ones:
                writer.close()
            await asyncio.sleep(0.7)
            # A socket lives on, whatever its first request's time was.
            async with Client(server, http) as client:
                await asyncio.sleep(1.0)
                await client.pictures(3)

    run(main)


def test_a_malformed_request_is_one_line_in_the_log(caplog):
    async def main():
        async with Running() as (server, _):
            for text in (
                b"\x16\x03\x01\x02\x00\x01",
                b"GET / HTTP/9\r\n\r\n",
                b"A\r\nB\n\n\r\n\r\n",
            ):
                answer = await talk(server, text + b"\r\n\r\n")
                assert b" 400 " in answer[:20] and b"nosniff" in answer
            big = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"
            assert b" 400 " in (await talk(server, big))[:30]

    with caplog.at_level(logging.INFO):
        run(main)
    lines = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 4
    assert all(r.exc_info is None and "\n" not in r.getMessage() for r in lines)


def test_a_proxy_must_be_named():
    hub = "https://hub.example.org"

    async def main():
        async with Running(origins=[hub + "/"]) as (server, http):
            for headers, status in (
                ({"Origin": hub}, 200),
                ({"Origin": hub, "Host": "hub.example.org"}, 200),
                ({"Origin": "https://hub.example.org.evil.example"}, 403),
                ({"Origin": "https://evil.example"}, 403),
                ({"Host": "evil.example"}, 403),
            ):
                async with http.get(server.url + "api/worlds", headers=headers) as answer:
                    assert answer.status == status, headers

    run(main)
    for wrong in (
        "*",
        "hub.example.org",
        "https://*.example.org",
        "https://a/b",
        "ftp://a",
        "http://[",
    ):
        with pytest.raises(ServeError, match="allowed origin"):
            PlayServer({"x": ScrollGame}, origins=[wrong])


def test_the_token_may_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text("fr0m-file\n")
    assert access.read_token(None, path) == "fr0m-file"
    monkeypatch.setenv("NFD_TOKEN", "fr0m-env")
    assert access.read_token(None, None) == "fr0m-env"
    assert access.read_token(None, path) == "fr0m-file"
    assert access.read_token("given", None) == "given"
    monkeypatch.delenv("NFD_TOKEN")
    assert access.read_token(None, None) is None
    with pytest.raises(ValueError, match="not both"):
        access.read_token("a", path)
    for wrong in ("", "two words", "two\nlines"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="one line"):
            access.read_token(None, path)
    with pytest.raises(OSError):
        access.read_token(None, tmp_path / "nothing")


def test_a_name_cannot_end_the_header_that_it_stands_in():
    class Odd(ScrollGame):
        name = 'a"; filename="b\r\nSet-Cookie: c=ü'

    async def main():
        async with Running({"Odd": Odd}) as (server, http), Client(server, http) as client:
            await client.pictures(3)
            async with http.get(f"{server.url}clip/{client.hello['key']}.mp4") as answer:
                assert answer.status == 200 and "Set-Cookie" not in answer.headers
                assert answer.content_disposition.filename == Odd.name + ".mp4"

    run(main)


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf")])
def test_a_world_without_a_rate_is_not_opened(fps):
    async def main():
        games = {"Bad": lambda count: ScrollGame(count, fps=fps), "Good": ScrollGame}
        async with Running(games) as (server, http):
            async with Client(server, http) as client:
                assert client.bye["code"] == protocol.FAILED
            async with Client(server, http, world="Good") as client:
                await client.pictures(3)

    run(main)


# -- fuzz ----------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.sampled_from([2**53, 2**64, -1, 0, 1, 0.5, 1e400]),
)
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=30),
    st.sampled_from(["left", "a", "pause", "reset", "seed", "speed", "sampling_steps", "teacher"]),
)
FIELDS = st.sampled_from(["t", "k", "d", "n", "i", "v", "do", "value", "x"])
TYPES = st.sampled_from(["key", "axis", "ack", "release", "control", "awake", "hello", ""])
MESSAGES = st.builds(
    lambda kind, rest: rest | {"t": kind},
    st.one_of(TYPES, LEAVES),
    st.dictionaries(FIELDS, st.one_of(LEAVES, st.lists(LEAVES, max_size=2)), max_size=5),
)
LIKELY = st.one_of(
    st.fixed_dictionaries({"t": st.just("key"), "k": st.text(max_size=21), "d": NUMBERS}),
    st.fixed_dictionaries({"t": st.just("axis"), "i": NUMBERS, "v": NUMBERS}),
    st.fixed_dictionaries({"t": st.just("control"), "do": st.text(max_size=9), "value": NUMBERS}),
    st.fixed_dictionaries(
        {
            "t": st.just("control"),
            "do": st.sampled_from(["pause", "speed", "seed", "sampling_steps", "lookahead"]),
            "value": LEAVES,
        }
    ),
)


@given(st.one_of(MESSAGES, LIKELY, LEAVES, st.text(max_size=60)))
def test_every_message_is_read_or_refused(message):
    import json

    text = message if isinstance(message, str) else json.dumps(message)
    try:
        read = protocol.parse(text)
    except protocol.BadMessage as error:
        assert "\n" not in str(error)
        return
    if isinstance(read, protocol.Tilt):
        assert -1 <= read.deflection <= 1 and read.entry >= 0
    if isinstance(read, protocol.Control) and isinstance(read.value, float):
        assert abs(read.value) < float("inf")


@given(st.lists(st.one_of(LIKELY, MESSAGES), min_size=1, max_size=12))
def test_whatever_one_client_sends_the_others_play_on(messages):
    import json

    async def main():
        async with (
            Running() as (server, http),
            Client(server, http, seed=1) as good,
            Client(server, http, seed=2) as odd,
        ):
            for message in messages:
                if odd.socket.closed:
                    break
                await odd.socket.send_str(json.dumps(message))
            before = len(good.headers)
            await good.pictures(4)
            assert [h["seed"] for h in good.headers[before:]] == [1] * len(good.headers[before:])
            assert good.bye is None
            # Either it is refused in words and keeps its seat, or it is let go by the protocol.
            if odd.bye is not None:
                assert odd.bye["code"] == protocol.BAD_MESSAGE
            else:
                assert server.counts()["seats"] == 2

    run(main)


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("localhost", "localhost"),
        ("my-host.example.org.", "my-host.example.org."),
        *((bad, None) for bad in ("", " ", "http://127.0.0.1", "127.0.0.1:8000", "a b", "*")),
        *((bad, None) for bad in ("a..b", "x" * 64, "[localhost]", "127.0.0.1 ", "a/b", "::1]")),
    ],
)
def test_hosts(host: str, expected: str | None) -> None:
    if expected is not None:
        assert check_host(host) == expected
        return
    with pytest.raises(ValueError, match="a host is an address or a name"):
        check_host(host)
    with pytest.raises(ServeError, match="a host is an address or a name"):
        PlayServer({"Scroll": lambda count: ScrollGame(count)}, host=host, token="secret")
    with pytest.raises(ValueError, match="a host is an address or a name"):
        serve(ServeConfig(host=host))
