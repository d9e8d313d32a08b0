"""The page in a real headless Chromium, measured on its pixels."""

import asyncio
import warnings

import pytest

aiohttp = pytest.importorskip("aiohttp")

from nfd_env.play.web.client import Limits  # noqa: E402
from nfd_env.play.web.server import PlayServer  # noqa: E402
from tests.play.browser import Browser, find_chromium, run  # noqa: E402
from tests.play.scroll_game import ScrollGame  # noqa: E402

CHROMIUM = find_chromium()
if CHROMIUM is None:
    warnings.warn(
        "SKIPPED: the browser player was NOT tested, there is no Chromium here "
        "(apt-get install chromium)",
        stacklevel=1,
    )
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: apt-get install chromium")

# How far the view has moved, read from the canvas: the blue of a pixel that has no red.
AT = """(() => { const c = document.getElementById('view');
  const d = c.getContext('2d').getImageData(0, 0, c.width, 1).data; let blue = [];
  for (let x = 0; x < c.width; x++) if (d[4 * x] < 60) blue.push(d[4 * x + 2]);
  blue.sort((a, b) => a - b); return blue[blue.length >> 1]; })()"""
HELD = "nfd.held.join()"
LIVE = "window.nfd && nfd.hello && nfd.hud.step > 3 && nfd.frames > 3"


async def serving(port=0, end_at=None, **kwargs):
    game = {"Scroll": lambda count: ScrollGame(count, end_at=end_at)}
    server = PlayServer(game, port=port, **kwargs)
    await server.start()
    return server


async def moved(tab, seconds=0.5):
    """How much the view moves in that time, with sign."""
    before = await tab.evaluate(AT)
    await asyncio.sleep(seconds)
    return (await tab.evaluate(AT) - before + 128) % 256 - 128


async def turns(tab, sign):
    """The view comes to move that way (+1 right, -1 left, 0 not at all)."""
    for _ in range(20):  # this machine may be busy
        move = await moved(tab)
        if move == 0 if sign == 0 else sign * move > 4:
            return
    raise AssertionError(f"the view moves by {move}, not {sign}; held {await tab.evaluate(HELD)}")


def test_the_page_from_start_to_finish():
    async def main():
        server = await serving(agent=lambda frame: 1)
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab(server.url)
            await tab.size(1280, 800)
            await tab.until(LIVE)
            # Pictures change although the view rests.
            step = await tab.evaluate("nfd.hud.step")
            await turns(tab, 0)
            assert await tab.evaluate("nfd.hud.step") > step
            # A held key turns the view its way, until it is released.
            await tab.key("right", True)
            await turns(tab, 1)
            await tab.key("right", False)
            await turns(tab, 0)
            await tab.key("a", True)
            await turns(tab, -1)
            assert await tab.until("nfd.latencies.length > 0")
            # Losing the focus releases it.
            await tab.evaluate("window.dispatchEvent(new Event('blur'))")
            await turns(tab, 0)
            assert await tab.evaluate("nfd.held.length") == 0
            await tab.key("a", False)
            # Controls.
            await tab.evaluate("document.querySelector('[data-do=agent]').click()")
            await tab.until("nfd.hud.agent")
            await turns(tab, 1)
            await tab.evaluate("document.querySelector('[data-do=agent]').click()")
            accepted = "document.getElementById('h-accepted').textContent"
            assert await tab.evaluate(accepted) == "off"
            await tab.key("j", True)
            await tab.key("j", False)
            await tab.until(f"{accepted} == '50 %'")
            await tab.evaluate("document.querySelector('[data-do=speculation]').click()")
            await tab.until(f"{accepted} == 'off'")
            await tab.evaluate("document.querySelector('[data-do=teacher]').click()")
            await tab.until("nfd.hud.teacher && document.getElementById('sampling').value == '6'")
            await tab.evaluate("document.querySelector('[data-do=teacher]').click()")
            await tab.until("!nfd.hud.teacher && nfd.hud.sampling_steps == 2")
            await tab.evaluate("document.querySelector('[data-do=pause]').click()")
            await tab.until("nfd.hud.paused")
            step = await tab.evaluate("nfd.hud.step")
            await tab.evaluate("document.querySelector('[data-do=step]').click()")
            await tab.until(f"nfd.hud.step == {step + 1}")
            await tab.evaluate("document.querySelector('#replay-open').click()")
            await tab.until("!document.getElementById('replay')?.hidden")
            await asyncio.sleep(0.3)
            await tab.evaluate("document.querySelector('#replay-close').click()")
            await tab.evaluate("document.querySelector('[data-do=pause]').click()")
            await tab.until("!nfd.hud.paused")
            assert tab.errors == []
            # A second tab plays a world of its own.
            other = await browser.tab(server.url)
            await other.until(LIVE)
            await other.key("left", True)
            await turns(other, -1)
            assert server.counts()["clients"] == 2
            assert other.errors == []
            await browser.close_tab(other)
            for _ in range(60):
                if server.counts()["clients"] == 1:
                    break
                await asyncio.sleep(0.05)
            assert server.counts()["clients"] == 1
            # The server restarts: the page comes back by itself.
            port = server.port
            await server.stop()
            await tab.until("document.getElementById('overlay-title')?.textContent.length > 0")
            server = await serving(port)
            await tab.until(LIVE)
            await server.stop()

    run(main, 90)


def test_touch_buttons_on_a_phone_and_a_full_server():
    async def main():
        server = await serving(limits=Limits(clients=1))
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab("about:blank")
            await tab.size(390, 844, phone=True)
            await tab.open(server.url)
            await tab.until(LIVE)
            wide = "document.documentElement.scrollWidth <= window.innerWidth"
            assert await tab.evaluate(wide)
            box = await tab.evaluate(
                "(() => { const b = document.querySelector('#pad [data-key=left]')"
                ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
            )
            points = [{"x": box[0], "y": box[1]}]
            await tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
            await turns(tab, -1)
            await tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            await turns(tab, 0)
            other = await browser.tab(server.url)
            await other.until(
                "document.getElementById('overlay-title')?.textContent == 'The server is full'"
            )
            assert tab.errors == other.errors == []
            await browser.close_tab(tab)
            await other.until(LIVE, 30)
        await server.stop()

    run(main, 90)


def test_the_rest_between_two_episodes_is_no_frame_time():
    async def main():
        server = await serving(end_at=40)
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab(server.url)
            title = "document.getElementById('overlay-title')?.textContent"
            await tab.until(f"{title} == 'Episode over'", 30)
            await tab.until("nfd.hud.episode == 2 && nfd.hud.step > 20", 30)
            assert await tab.evaluate("nfd.gaps.length") > 40
            assert await tab.evaluate("Math.max(...nfd.gaps)") < 1000
        await server.stop()

    run(main, 90)
