"""Input-to-frame latency and frame rate of the browser player, with and without looking ahead.

    python -m tests.play.measure_latency WORLD [--sampling-steps 1] [--presses 60] [--browser]

The server runs in a process of its own. Without --browser a client on loopback stands in for the
page (latency up to the received picture); with it a headless Chromium measures on its canvas.
The rest between two episodes counts neither as frame time nor as latency.
Prints one JSON line a setting.
"""

import argparse
import asyncio
import json
import os
import random
import sys

import aiohttp
import numpy as np

from tests.play.browser import Browser, find_chromium
from tests.play.test_server import Client


class _There:
    """Where the server's process listens, for ``Client``."""

    def __init__(self, url):
        self.url = url


async def by_client(url, presses, ahead):
    async with aiohttp.ClientSession() as http, Client(_There(url), http, seed=1) as client:
        await client.send(t="control", do="lookahead", value=ahead)
        await client.pictures(60, 120)
        client.latencies.clear()
        client.gaps.clear()
        rng = random.Random(0)
        for i in range(presses):
            await client.key("left" if i % 4 < 2 else "right", i % 2 == 0)
            await asyncio.sleep(rng.uniform(0.06, 0.2))
        rate = len(client.gaps) / sum(client.gaps)
        return rate, [1000 * x for x in client.latencies], client.headers[-1]


async def by_browser(url, presses, ahead):
    async with Browser(find_chromium()) as browser:
        tab = await browser.tab(url)
        await tab.size(1280, 800)
        await tab.until("window.nfd && nfd.hello && nfd.hud.step > 60", 120)
        if not ahead:
            await tab.evaluate("document.querySelector('[data-do=lookahead]').click()")
        await asyncio.sleep(1)
        await tab.evaluate("nfd.latencies.length = nfd.gaps.length = 0")
        rng = random.Random(0)
        for i in range(presses):
            await tab.key("left" if i % 4 < 2 else "right", i % 2 == 0)
            await asyncio.sleep(rng.uniform(0.06, 0.2))
        return (
            await tab.evaluate("nfd.fps"),
            json.loads(await tab.evaluate("JSON.stringify(nfd.latencies)")),
            await tab.evaluate("nfd.hud"),
        )


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("world")
    parser.add_argument("--sampling-steps", type=int)
    parser.add_argument("--presses", type=int, default=60)
    parser.add_argument("--browser", action="store_true")
    args = parser.parse_args()
    code = (
        "import sys; from nfd_env.play.commands import ServeConfig, serve; "
        "serve(ServeConfig(sys.argv[1], port=0, sampling_steps=int(sys.argv[2]) or None))"
    )
    command = [sys.executable, "-c", code, args.world, str(args.sampling_steps or 0)]
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        url = (await server.stdout.readline()).split()[2].decode()
        for ahead in (True, False):
            measure = by_browser if args.browser else by_client
            rate, latencies, hud = await measure(url, args.presses, ahead)
            p50, p95 = np.percentile(latencies, [50, 95]).round(1)
            result = {
                "lookahead": ahead,
                "browser": args.browser,
                "frames_per_second": round(rate, 1),
                "input_to_frame_p50_ms": float(p50),
                "input_to_frame_p95_ms": float(p95),
                "inputs": len(latencies),
                "guessed": hud["guessed"],
                "model_ms": hud["model_ms"],
                "threads": os.environ.get("OMP_NUM_THREADS", "default"),
                "load": os.getloadavg()[0],
            }
            print(json.dumps(result), flush=True)
    finally:
        server.terminate()
        await server.wait()


if __name__ == "__main__":
    asyncio.run(main())
