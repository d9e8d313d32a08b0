"""Frames a second of a page without a server, in a headless Chromium on this machine.

    python -m tests.export.measure_page BigFish [--seconds 60] [--backend webgpu] [--one-thread]

Exports the world, serves the page, plays it with keys that go down and up, and prints one line of
JSON. Frame times are those between two pictures that the page shows; the rest between two episodes
counts as none. At double speed, because no page is faster than its world's rate. "core ms" is the
browser's processor time a frame, which is to be trusted on a machine that does other things too,
with --one-thread (several wait for each other in loops).
"""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from nfd_env.export.page import export_web
from tests.export.test_web import CHROMIUM, ISOLATED, PACKAGE, hosting
from tests.play.browser import FLAGS, Browser, run


async def measure(url, settings):
    # A GPU, where the machine has one; --backend webgpu takes also one that is a program.
    flags = FLAGS.replace("--disable-gpu ", "") + " --enable-unsafe-webgpu"
    assert CHROMIUM is not None, "apt-get install chromium"
    async with Browser(CHROMIUM, FLAGS if settings.backend == "wasm" else flags) as browser:
        tab = await browser.tab(f"{url}?seed=1&backend={settings.backend}")
        await tab.until("window.nfd && nfd.hello && nfd.gaps.length > 30", 600)
        speed = f"import('./small.js').then((page) => page.control('speed', {settings.speed}))"
        await tab.evaluate(speed)
        await tab.evaluate("nfd.gaps.length = nfd.latencies.length = 0")
        keys = await tab.evaluate("nfd.hello.buttons.map((button) => button.key)")
        rng, gaps, latencies = np.random.default_rng(0), [], []
        used, step = browser.seconds_used(), await tab.evaluate("nfd.hud.n")
        for _ in range(settings.seconds):
            key = json.dumps(str(rng.choice(keys)))
            for act in (f"press('measure', {key})", "release('measure')"):
                await tab.evaluate(f"import('./input.js').then((input) => input.{act})")
                await asyncio.sleep(0.5)
            # Every second, because the page forgets the older ones.
            gaps += await tab.evaluate("nfd.gaps.splice(0)")
            latencies += await tab.evaluate("nfd.latencies.splice(0)")
        used = browser.seconds_used() - used
        step = await tab.evaluate("nfd.hud.n") - step
        where = await tab.evaluate("document.getElementById('status').innerText")
        fps = await tab.evaluate("nfd.hello.fps")
        return {
            "world": settings.world,
            "computed by": where,
            "cores": len(os.sched_getaffinity(0)),
            "load before": settings.load,
            "native frames/s": fps * settings.speed,
            "frames/s": round(1000 / np.mean(gaps), 1),
            "frame ms p50 p95": np.percentile(gaps, [50, 95]).round(1).tolist(),
            "key to picture ms p50 p95": np.percentile(latencies, [50, 95]).round().tolist(),
            "core ms a frame": round(1000 * used / step, 1),
            "frames": len(gaps),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--backend", default="wasm", choices=["wasm", "webgpu"])
    parser.add_argument("--speed", type=float, default=2.0, help="as in the page")
    parser.add_argument("--one-thread", action="store_true", help="as a host without the headers")
    settings = parser.parse_args()
    settings.load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        page = export_web(settings.world, str(Path(folder) / "page"), str(PACKAGE))
        with hosting(page, {} if settings.one_thread else ISOLATED) as url:
            print(json.dumps(run(lambda: measure(url, settings), settings.seconds + 900)))


if __name__ == "__main__":
    main()
