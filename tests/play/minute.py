"""A minute of scripted play in the page and in the window, with screenshots for a person to judge.

    python -m tests.play.minute WORLD_OR_GAME.yaml ... -o FOLDER [--only page web window ...]

The page is played in a headless Chromium with real keys ("page", 1280 x 800) and touches ("phone",
390 x 844): the world, the real game where it is installed, both side by side, the key editor, a
gamepad that is made up, the replay, a recording that is cut off by closing the tab. "web" and
"web-phone" do so with the page that needs no server. The window plays the same under SDL's dummy
driver. Prints what was recorded; what it looks like is in FOLDER/*.png.
"""

import argparse
import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

from nfd_env import config  # noqa: E402
from nfd_env.data.shards import RecordedDataset  # noqa: E402
from nfd_env.export.page import export_web  # noqa: E402
from nfd_env.play.game import EnvGame  # noqa: E402
from nfd_env.play.web.server import PlayServer  # noqa: E402
from nfd_env.worlds.load import make_real  # noqa: E402
from tests.export.test_web import ISOLATED, PACKAGE, hosting  # noqa: E402
from tests.play.browser import Browser, find_chromium  # noqa: E402

# A gamepad as browsers show one; the real ones need hands.
PLUG = """(() => {
  window.pad = { index: 0, id: "Fake", axes: [0, 0, 0, 0],
                 buttons: Array.from({ length: 17 }, () => ({ pressed: false, value: 0 })) };
  navigator.getGamepads = () => [window.pad];
  dispatchEvent(Object.assign(new Event("gamepadconnected"), { gamepad: pad }));
})()"""
PULL = "navigator.getGamepads = () => []; 0"
TILT = "pad.axes[0] = 0.8; pad.buttons[7] = { pressed: true, value: 0.6 }; 0"
CENTRE = """(() => {{ const b = document.querySelector({!r}).getBoundingClientRect();
  return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""


def game_of(name, count=1):
    """A world with its real game, or the real game of a game file."""
    from nfd_env.play.twin import TwinSlots

    if name.endswith(".yaml"):
        return EnvGame.from_file(name)
    return TwinSlots(lambda: make_real(name), name, count, drift=True)


def saved_in(folder):
    """Print what has been recorded there."""
    for spec in sorted(Path(folder).rglob("dataset.yaml")):
        episodes = list(RecordedDataset(spec.parent))
        steps = Counter()
        for episode in episodes:
            steps[episode.policy] += len(episode)
        print(f"  recorded: {len(episodes)} episodes, steps by {dict(steps)}", flush=True)


async def play_served(name, folder, kind, seconds):
    games = {Path(name).stem: lambda count: game_of(name, count)}
    server = PlayServer(games, port=0, agent="random", save=folder / "saved")
    await server.start()
    # The tab is closed in the middle of a recording.
    await play_page(server.url, name, folder, kind, seconds)
    for _ in range(100):
        if not server.counts()["clients"]:
            break
        await asyncio.sleep(0.1)
    await server.stop()


async def play_page(url, name, folder, kind, seconds):
    phone = "phone" in kind
    numbers, rng = iter(range(100)), random.Random(0)

    async with Browser(find_chromium()) as browser:
        tab = await browser.tab("about:blank")
        await tab.send("Emulation.setFocusEmulationEnabled", enabled=True)
        await tab.size(*((390, 844) if phone else (1280, 800)), phone)
        await tab.open(url)

        async def shot(what):
            await tab.screenshot(folder / f"{Path(name).stem}-{kind}-{next(numbers):02}-{what}.png")

        async def touch(down, key):
            point = await tab.evaluate(CENTRE.format(f'#pad [data-key="{key}"]'))
            points = [dict(zip("xy", point, strict=True))] if down else []
            kind = "touchStart" if down else "touchEnd"
            await tab.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)

        async def play(share, what=""):
            """Hold random keys, or touch buttons, for a share of the time."""
            keys = [b["key"] for b in await tab.evaluate("nfd.hello.buttons")]
            until = asyncio.get_running_loop().time() + share * seconds
            while asyncio.get_running_loop().time() < until:
                key = rng.choice(keys)
                press = touch if phone else lambda down, key: tab.key(key, down)
                await press(True, key)
                await asyncio.sleep(rng.uniform(0.1, 0.6))
                if what:
                    await shot(what)
                    what = ""
                await press(False, key)

        async def click(query):
            await tab.evaluate(f"document.querySelector({query!r}).click()")

        await tab.until("window.nfd && nfd.hello && nfd.hud.step > 3", 300)
        await shot("first")
        await play(0.2, "held")
        await click("#keymap-open")
        await tab.until("document.getElementById('keymap').open")
        await shot("keys")
        await click("#keymap-close")
        await tab.until("!nfd.hud.paused", 60)
        if (await tab.evaluate("nfd.hello.views || []"))[1:]:
            for view in ("real", "split", "dream"):
                await click("[data-do=view]")
                await tab.until(f"nfd.hud.view === '{view}'", 60)
                await play(0.15, view)
            for _ in range(12):  # as fast as a person could
                await click("[data-do=view]")
                await asyncio.sleep(0.05)
        await tab.evaluate(PLUG)
        await tab.evaluate(TILT)
        step = await tab.evaluate("nfd.hud.step + 3")
        await tab.until(f"nfd.hud.step > {step} || !nfd.hud.step", 60)
        await shot("gamepad")
        await tab.evaluate(PULL)
        for control in ("agent", "teacher"):
            if await tab.evaluate(f"!document.querySelector('[data-do={control}]').hidden"):
                await click(f"[data-do={control}]")
                await asyncio.sleep(0.05 * seconds)
                await shot(control)
                await click(f"[data-do={control}]")
        await click("[data-do=pause]")
        await tab.until("nfd.hud.paused")
        await shot("paused")
        await click("[data-do=step]")
        await asyncio.sleep(1)
        await shot("stepped")
        await click("#replay-open")
        await asyncio.sleep(1)
        await shot("replay")
        await click("#replay-close")
        await click("[data-do=pause]")
        if phone:
            await tab.size(844, 390, phone)
            await play(0.05, "landscape")
        print(f"  {kind}: {await tab.evaluate('nfd.fps'):.1f} pictures/s, errors {tab.errors}")
        assert tab.errors == []
        await browser.close_tab(tab)


def play_window(name, folder, seconds):
    import pygame

    from nfd_env.play.window.player import KeyboardPlayer

    rng, began, held, done = random.Random(0), time.monotonic(), [], []

    def post(kind, **about):
        pygame.event.post(pygame.event.Event(kind, about))

    def tap(key):
        post(pygame.KEYDOWN, key=key)
        post(pygame.KEYUP, key=key)

    def tilt(value):
        for axis in (pygame.CONTROLLER_AXIS_LEFTX, pygame.CONTROLLER_AXIS_TRIGGERRIGHT):
            post(pygame.CONTROLLERAXISMOTION, axis=axis, value=value)

    def shot(what):
        surface = pygame.display.get_surface()
        pygame.image.save(surface, folder / f"{Path(name).stem}-window-{len(done):02}-{what}.png")

    # What is done, and what the screenshot before the next thing is called; "" for none.
    script = [
        (lambda: None, "first"),
        (lambda: tap(pygame.K_F1), "help"),
        (lambda: tap(pygame.K_F1), ""),
        (lambda: tap(pygame.K_TAB), "real"),
        (lambda: tap(pygame.K_TAB), "split"),
        (lambda: tap(pygame.K_TAB), "dream"),
        (lambda: tilt(20000), "gamepad"),
        (lambda: tilt(0), ""),
        (lambda: tap(pygame.K_F10), "agent"),
        (lambda: tap(pygame.K_F10), ""),
        (lambda: tap(pygame.K_BACKSPACE), "teacher"),
        (lambda: tap(pygame.K_BACKSPACE), ""),
        (lambda: tap(pygame.K_F2), "end"),
    ]

    def on_shown(shown):
        while held:
            post(pygame.KEYUP, key=held.pop())
        if shown.hud["paused"]:  # nothing more is shown until it goes on
            shot("paused")
            return tap(pygame.K_F2)
        act = script[len(done) - 1][1] if done else ""
        if time.monotonic() - began > seconds * (len(done) + 1) / (len(script) + 1):
            if act:
                shot(act)
            if len(done) == len(script):
                return player.stop()
            script[len(done)][0]()
            done.append(shown.number)
        elif act != "gamepad":
            held.append(pygame.key.key_code(rng.choice(sorted(game.keymap.keys))))
            post(pygame.KEYDOWN, key=held[-1])

    game = game_of(name)
    about = config.to_dict(game.source)
    save, film = folder / "saved" / "window", folder / f"{Path(name).stem}-window.mp4"
    player = KeyboardPlayer(
        game, seed=1, agent="random", save=save, source=about, record=film, on_shown=on_shown
    )
    pictures = player.run()
    game.close()
    print(f"  window: {pictures / (time.monotonic() - began):.1f} pictures/s", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("worlds", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    kinds = ["page", "phone", "web", "web-phone", "window"]
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    args = parser.parse_args()
    for name in args.worlds:
        print(name, flush=True)
        for kind in args.only:
            if "web" in kind and name.endswith(".yaml"):
                continue  # there is no world to export
            folder = args.output / f"{Path(name).stem}-{kind}"
            folder.mkdir(parents=True)
            if kind == "window":
                play_window(name, folder, args.seconds)
            elif "web" in kind:
                page = export_web(name, str(folder / "page"), str(PACKAGE))
                with hosting(page, ISOLATED) as url:
                    asyncio.run(play_page(url, name, folder, kind, args.seconds))
            else:
                asyncio.run(play_served(name, folder, kind, args.seconds))
            saved_in(folder / "saved")


if __name__ == "__main__":
    main()
