"""Sixteen clients on loopback against a real server process with the shipped world."""

import asyncio
import contextlib
import resource
import signal
import sys
import time

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp")

from nfd_env.play.web import protocol  # noqa: E402
from tests.play.test_server import PATIENCE, Client, run  # noqa: E402

CLIENTS = 16
BUSY = "SKIPPED: this machine is too busy for sixteen players, nothing was measured"
SERVE = "import sys; from nfd_env.cli import main; sys.exit(main(sys.argv[1:]))"


def crowded():
    """Whether other programs leave this one less than half of a core."""
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < 0.5:
        pass
    return time.process_time() - used < 0.25


class ServerProcess:
    """Where it is, what it uses, and what it said."""

    def __init__(self, process, url):
        self.process, self.url = process, url

    def memory(self):
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    async def stop(self):
        """Exit status, and what was written to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        return self.process.returncode, errors.decode()


@contextlib.asynccontextmanager
async def serving(world="DoomTakeCover", clients=CLIENTS, *options, patience=30):
    """A server that can be played on within so many seconds; it does not outlive the block."""
    arguments = f"serve {world} --device cpu --port 0 --max-clients {clients}".split()
    arguments += options
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVE, *arguments), stdout=pipe, stderr=pipe
    )
    try:
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), patience)
        except TimeoutError:
            pytest.skip(BUSY)
        yield ServerProcess(process, line.split()[2].decode().partition("?")[0])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def play(clients, pictures, most_seconds):
    """Until everybody has had so many pictures, but no longer than that.

    Keys go down and up, at other times for each quarter of the clients.
    """
    for client in clients:
        client.latencies.clear(), client.gaps.clear()
    end = time.perf_counter() + most_seconds
    i = 0
    while time.perf_counter() < end and min(len(c.gaps) for c in clients) < pictures:
        for client in clients[i % 4 :: 4]:
            await client.key("left" if i % 16 < 8 else "right", i // 4 % 2 == 0)
        i += 1
        await asyncio.sleep(0.06)


def test_sixteen_players_of_the_shipped_world_get_equal_shares_and_no_picture_is_queued():
    if crowded():
        pytest.skip(BUSY)

    async def main():
        async with serving() as server, aiohttp.ClientSession() as http:
            clients = [Client(server, http, seed=i) for i in range(CLIENTS)]
            await asyncio.gather(*(client.__aenter__() for client in clients))
            # They are let in one after the other, which takes a slow machine twenty seconds.
            await play(clients, 1, PATIENCE)
            await play(clients, 30, 3)
            if 0 < max(len(c.gaps) for c in clients) < 10:
                pytest.skip(BUSY)
            await play(clients, 10**9, 9)  # the allocator's pools fill up for about ten seconds
            memory = server.memory()
            await play(clients, 80, 6)
            grown = server.memory() - memory
            status, said = await server.stop()
            for client in clients:
                await asyncio.wait_for(client.task, PATIENCE)
                assert client.socket.close_code == protocol.GOING
                await client.__aexit__()
            assert status == 0 and "Traceback" not in said, said
            return clients, grown

    clients, grown = run(main)
    # Episodes end, and their last picture stays for a while: that is no tick.
    rates = np.array([1 / np.mean(c.gaps) for c in clients])
    latencies = np.concatenate([c.latencies for c in clients])
    ticks = np.concatenate([c.gaps for c in clients])
    tick, latency = np.percentile(ticks, 95), np.percentile(latencies, 95)
    print(
        f"{CLIENTS} players: {rates.min():.1f} to {rates.max():.1f} frames/s each, "
        f"{rates.sum():.0f} in all; grown by {grown / 2**20:.1f} MiB; tick p50 / p95 "
        f"{1000 * np.median(ticks):.0f} / {1000 * tick:.0f} ms, input to frame "
        f"{1000 * np.median(latencies):.0f} / {1000 * latency:.0f} ms"
    )
    assert rates.min() > 0.8 * rates.max(), rates
    assert grown < 64 * 2**20, grown
    # An input waits for the tick under way and is answered by the next, however busy the machine.
    assert latency < 2 * tick + 0.05, (latency, tick)
