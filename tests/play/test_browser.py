"""The page in a real headless Chromium, measured on its pixels."""

import asyncio
import json
import warnings

import numpy as np
import pytest
from gymnasium import spaces

av = pytest.importorskip("av")
aiohttp = pytest.importorskip("aiohttp")

from nfd_env.play.keys import Keymap  # noqa: E402
from nfd_env.play.web.client import Limits  # noqa: E402
from nfd_env.play.web.server import PlayServer  # noqa: E402
from nfd_env.sources.spec import SourceConfig  # noqa: E402
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
# Words that are cut, what is wider than the page, and what lies over a picture of the split view.
AMISS = """(() => {
  const found = [], box = (query) => document.querySelector(query).getBoundingClientRect();
  // A long name, and where a page without a server computes.
  document.getElementById("world").options[0].text = "AWorldWithALongName";
  document.querySelector("#status b").textContent = "WASM, 2 threads";
  if (box("#status").right > innerWidth - 10) found.push("status");
  const texts = "#hud *, figcaption *, #controls *, .badge, #keys span";
  for (const words of document.querySelectorAll(texts)) {
    if (words.clientWidth && words.scrollWidth > words.clientWidth + 1) found.push(words.outerHTML);
  }
  const { scrollWidth } = document.documentElement, frame = box("#view");
  if (scrollWidth > innerWidth) found.push(`${scrollWidth} wide`);
  if (nfd.hud.view === "split") {
    for (const badge of document.querySelectorAll(".badge:not([hidden])")) {
      const { left, right, top, bottom } = badge.getBoundingClientRect();
      const quarter = frame.width / 4 + 1;
      const beside = right <= frame.left + quarter || left >= frame.right - quarter;
      const below = top >= frame.top + frame.height / 2 && bottom <= frame.bottom;
      if (!beside || !below) found.push(badge.outerHTML);
    }
    const keys = box("#keys"); // which are not shown on a telephone
    if (keys.width && keys.left < frame.right - frame.width / 4) found.push("keys");
  }
  const { bottom } = box("#hint");
  if (innerWidth > 1000 && bottom > innerHeight) found.push(`${bottom} high`);
  return found;
})()"""
LIVE = "window.nfd && nfd.hello && nfd.hud.step > 3 && nfd.frames > 3"


async def serving(port=0, game=ScrollGame, end_at=None, **kwargs):
    server = PlayServer({"Scroll": lambda count: game(count, end_at=end_at)}, port=port, **kwargs)
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
            for absent in ("drift", "badge-drift", "drift-keep"):
                assert await tab.evaluate(f"document.getElementById('{absent}').hidden"), absent
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
            # Whoever pauses or steps wants to see the picture.
            covered = await tab.evaluate(
                "(() => { const over = document.getElementById('overlay');"
                "const area = (e) => e.clientWidth * e.clientHeight;"
                "const style = getComputedStyle(over);"
                "return [over.hidden, style.backgroundColor, style.backdropFilter,"
                " area(over.firstElementChild) / area(over)]; })()"
            )
            assert covered[:3] == [False, "rgba(0, 0, 0, 0)", "none"] and covered[3] < 0.2
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

    run(main)


# Buttons of a world with these actions that a finger or an eye cannot tell apart.
BUTTONS = """(async (labels) => {
  nfd.hello.buttons = labels.map((label, number) => ({ label, key: `key ${number}` }));
  (await import("./input.js")).setUpInput();
  const bottom = document.getElementById("frame").getBoundingClientRect().bottom;
  return [...document.getElementById("pad").children].map((button) => {
    const { left, right, top, width, height } = button.getBoundingClientRect();
    const cut = [button, ...button.children].some((e) => e.scrollWidth > e.clientWidth + 1);
    const high = innerWidth > innerHeight ? top < innerHeight / 2 : top < bottom;
    const fine = width >= 44 && height >= 44 && left >= 0 && right <= innerWidth && !cut && !high;
    return fine ? "" : `${button.outerHTML} ${[left, right, top, width, height, cut]}`;
  }).filter(Boolean);
})"""


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
            car = "left", "right", "accelerate", "brake"
            for names in (range(1, 16), car, ("turn_right_fast",) * 9):
                for size in ((844, 390, True), (390, 844, True)):
                    await tab.size(*size)
                    labels = json.dumps([str(name) for name in names])
                    assert await tab.evaluate(f"{BUTTONS}({labels})") == [], (names, size)
            other = await browser.tab(server.url)
            await other.until(
                "document.getElementById('overlay-title')?.textContent == 'The server is full'"
            )
            assert tab.errors == other.errors == []
            await browser.close_tab(tab)
            await other.until(LIVE)
        await server.stop()

    run(main)


def test_the_rest_between_two_episodes_is_no_frame_time():
    async def main():
        server = await serving(end_at=40)
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab(server.url)
            title = "document.getElementById('overlay-title')?.textContent"
            await tab.until(f"{title} == 'Episode over'")
            await tab.until("nfd.hud.episode == 2 && nfd.hud.step > 20")
            assert await tab.evaluate("nfd.gaps.length") > 40
            assert await tab.evaluate("Math.max(...nfd.gaps)") < 1000
        await server.stop()

    run(main)


def test_keys_of_ones_own_are_kept_by_the_browser():
    async def main():
        server = await serving()
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab(server.url)
            await tab.until(LIVE)
            stored = "localStorage.getItem('nfd keys Scroll')"
            opened = "document.getElementById('keymap').open"
            # The row of "right", whose first key by the alphabet is D.
            add = "document.querySelector('#keymap-rows [data-key=d]')"
            await tab.tap("e")
            await tab.until(f"{opened} && nfd.hud.paused")
            await tab.evaluate(f"{add}.click()")
            assert await tab.evaluate(f"{add}.textContent") == "press a key…"
            # Escape gives up the choice, and only that; another one closes the editor.
            await tab.tap("escape")
            assert await tab.evaluate(f"{add}.textContent") == "add a key"
            assert await tab.evaluate(opened) and await tab.evaluate(stored) is None
            await tab.evaluate(f"{add}.click()")
            await tab.tap("l")
            await tab.evaluate(f"{add}.click()")
            await tab.tap("a")  # one of the usual keys, of the other way
            assert json.loads(await tab.evaluate(stored)) == {"l": "d", "a": "d"}
            caps = f"[...{add}.previousSibling.children].map((cap) => cap.textContent).sort()"
            assert await tab.evaluate(caps) == ["A", "D", "L", "▶\ufe0e"]
            await tab.tap("escape")
            await tab.until(f"!{opened} && !nfd.hud.paused")
            for attempt in range(2):
                for key, sign in (("l", 1), ("a", 1), ("d", 1), ("left", -1)):
                    await tab.key(key, True)
                    await turns(tab, sign)
                    await tab.key(key, False)
                await turns(tab, 0)
                if attempt == 0:
                    await tab.evaluate("nfd.gone = 1; location.reload(); 0")
                    await tab.until(f"window.nfd && !nfd.gone && {LIVE}")
            await tab.tap("e")
            await tab.until(opened)
            await tab.evaluate("document.getElementById('keymap-reset').click()")
            assert await tab.evaluate(stored) is None
            await tab.evaluate("document.getElementById('keymap-close').click()")
            await tab.until(f"!{opened} && !nfd.hud.paused")
            await tab.key("a", True)
            await turns(tab, -1)
            # What is stored may be anybody's.
            for junk in ("null", "[", '{"l": "no key", "constructor": 3}'):
                await tab.evaluate(f"localStorage.setItem('nfd keys Scroll', '{junk}')")
                await tab.evaluate("nfd.gone = 1; location.reload(); 0")
                await tab.until(f"window.nfd && !nfd.gone && {LIVE}")
            assert tab.errors == []
        await server.stop()

    run(main)


class Pixels(ScrollGame):
    """Square pixels with hard edges, of an odd number."""

    display = "pixelated"

    def __init__(self, count, **kwargs):
        super().__init__(count, **kwargs)
        self.frame_shape, self.display_aspect = (63, 85, 3), 0.0

    def frame(self, at):
        """A chequerboard: what is blurred, or wide by a broken number, would show."""
        rows, columns = np.indices((63, 85))
        return np.repeat(255 * ((rows // 3 + columns // 3) % 2)[..., None], 3, 2).astype(np.uint8)


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 800, False), (390, 844, True)])
def test_pixels_keep_hard_edges_and_whole_multiples(tmp_path, width, height, phone):
    async def main():
        server = await serving(game=Pixels)
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab("about:blank")
            await tab.size(width, height, phone)
            await tab.open(server.url)
            await tab.until(LIVE)
            style = "getComputedStyle(document.getElementById('view')).imageRendering"
            assert await tab.evaluate(style) == "pixelated"
            box = await tab.evaluate(
                "(() => { const b = document.getElementById('view').getBoundingClientRect();"
                "return [b.x, b.y, b.width, b.height].map((v) => v * devicePixelRatio); })()"
            )
            await tab.screenshot(tmp_path / "page.png")
        await server.stop()
        return box

    left, top, wide, high = run(main)
    times = round(high / 63)
    assert times >= 4 and (wide, high) == (times * 85, times * 63)
    with av.open(str(tmp_path / "page.png")) as container:
        shot = next(container.decode(video=0)).to_ndarray(format="gray")
    # Between the rounded corners: a row of black and white runs of three pixels each.
    row = shot[round(top + high / 2) + times, round(left + wide / 4) : round(left + 3 * wide / 4)]
    edges = np.flatnonzero(np.diff((row > 127).astype(int)))
    assert set(np.diff(edges)) == {3 * times}
    # Neither does a JPEG ring, nor is there the ramp over a whole pixel of smooth enlarging.
    assert set(np.unique(row).tolist()) == {0, 255}


class Steering(ScrollGame):
    """A Box of a steering wheel, an accelerator and a brake: the wheel scrolls."""

    def __init__(self, count, **kwargs):
        super().__init__(count, **kwargs)
        space = spaces.Box(np.array([-1, 0, 0], np.float32), np.ones(3, np.float32))
        self.keymap = Keymap.from_source(SourceConfig(env_id="Steering-v0"), space)

    def cost(self, rows):
        return 1.0  # too dear to be generated ahead

    def take_drafts(self, actions):
        return {}

    def step(self, actions):
        sharp = {slot: int(np.sign(a[0]) * (abs(a[0]) > 0.5)) for slot, a in actions.items()}
        return super().step({slot: {1: 1, -1: 2, 0: 0}[way] for slot, way in sharp.items()})


@pytest.mark.parametrize("game", [ScrollGame, Steering])
def test_a_gamepad_turns_the_view_until_it_is_let_go_or_unplugged(game):
    async def main():
        server = await serving(game=game)
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab("about:blank")
            await tab.send("Emulation.setFocusEmulationEnabled", enabled=True)
            await tab.open(server.url)
            await tab.until(LIVE)
            plug = """(() => {
              const button = () => ({ pressed: false, value: 0 });
              window.pad = { index: 0, id: "Fake", axes: [0, 0, 0, 0],
                             buttons: Array.from({ length: 17 }, button) };
              // Another one rests, and must not hold it back.
              const idle = { ...window.pad, index: 2, axes: [0, 0, 0, 0], buttons: [] };
              navigator.getGamepads = () => [window.pad, null, idle];
              dispatchEvent(Object.assign(new Event("gamepadconnected"), { gamepad: pad }));
            })()"""
            await tab.evaluate(plug)
            await turns(tab, 0)
            for tilt, sign in ((-1, -1), (0.05, 0), (0.9, 1), (0, 0)):
                await tab.evaluate(f"pad.axes[0] = {tilt}")
                await turns(tab, sign)
            if game is ScrollGame:  # the cross, too
                await tab.evaluate("pad.buttons[15] = { pressed: true, value: 1 }; 0")
                await turns(tab, 1)
                await tab.evaluate("pad.buttons[15] = { pressed: false, value: 0 }; 0")
                await turns(tab, 0)
            await tab.evaluate("pad.axes[0] = 1")
            await turns(tab, 1)
            await tab.evaluate("navigator.getGamepads = () => [null]; 0")
            await turns(tab, 0)
            await tab.evaluate(plug)
            await tab.evaluate("pad.axes[0] = -1")
            await turns(tab, -1)
            assert tab.errors == []
        await server.stop()

    run(main)


class Twins(ScrollGame):
    """Has a real game too, which looks the same: square, slow and with four ways to go."""

    display = "pixelated"
    views = ("dream", "real", "split")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shown, self.ood = "dream", 2.5
        self.display_aspect, self.fps = 1.0, 15.0
        ways = ["noop", "right", "left", "up", "down"]
        source = SourceConfig("Ways-v0", action_names=ways)
        self.keymap = Keymap.from_source(source, spaces.Discrete(5))

    def cost(self, rows):
        return 1.0  # too dear to be generated ahead

    def outcome(self, slot, action, guessed):
        made = super().outcome(slot, action, guessed)
        if self.shown == "split":
            made.info["apart"] = 18.62
        return made

    def view(self, slot):
        return self.shown

    def set_view(self, slot, view):
        self.shown = view
        return self.frame(0)

    def beside(self, slot):
        return self.frame(self.at[slot]) if self.shown == "split" else None


def test_the_real_game_is_a_button_and_who_is_recorded_knows(tmp_path):
    async def main():
        server = await serving(game=Twins, save=tmp_path, agent="random")
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab("about:blank")

            async def look():
                for size in ((390, 844, True), (1280, 800)):
                    await tab.size(*size)
                    for aspect, display in ((2.6667, "smooth"), (1.0, "pixelated")):
                        about = f"{{ aspect: {aspect}, display: '{display}' }}"
                        await tab.evaluate(f"Object.assign(nfd.hello, {about})")
                        await tab.evaluate("dispatchEvent(new Event('resize'))")
                        await asyncio.sleep(0.2)  # some pictures
                        assert await tab.evaluate(AMISS) == []

            await tab.size(1280, 800)
            await tab.open(server.url)
            await tab.until(LIVE)
            width = "document.getElementById('view').width"
            badge = "document.getElementById('badge-view')"
            assert await tab.evaluate(f"{width} === 128 && {badge}.hidden")
            for there in ("badge-saving", "drift", "badge-drift", "drift-keep"):
                await tab.until(f"!document.getElementById('{there}').hidden")
            await look()
            await tab.evaluate("document.querySelector('[data-do=view]').click()")
            await tab.until(f"!{badge}.hidden && {badge}.textContent === 'real game'")
            await tab.key("x", True)
            await tab.key("x", False)
            await tab.until(f"{width} === 258 && {badge}.textContent.startsWith('real | dream')")
            await look()
            box = "document.getElementById('view').getBoundingClientRect()"
            times = await tab.evaluate(f"{box}.height * devicePixelRatio") / 194
            assert times == pytest.approx(round(times), abs=0.002) and times > 0.9
            await tab.key("x", True)
            await tab.key("x", False)
            await tab.until(f"{width} === 128 && {badge}.hidden")
        await server.stop()

    run(main)
