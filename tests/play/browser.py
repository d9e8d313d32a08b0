"""A headless Chromium, driven over the DevTools protocol by aiohttp: no further dependency."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-extensions --disable-default-apps --mute-audio --hide-scrollbars "
    "--disable-background-timer-throttling --disable-renderer-backgrounding "
    "--disable-backgrounding-occluded-windows --disable-dev-shm-usage "
    "--remote-debugging-port=0"
)
# WebGPU computed by the processor: no GPU is needed, nor is its speed anything to go by.
SOFTWARE_GPU = FLAGS.replace("--disable-gpu ", "") + (
    " --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan"
)

PATIENCE = 120  # seconds; a machine may be busy


def find_chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Tab:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, target: str) -> None:
        self._socket, self.target = socket, target
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.errors: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                future = self._answers.pop(data["id"])
                if "error" in data:
                    future.set_exception(RuntimeError(data["error"]["message"]))
                else:
                    future.set_result(data["result"])
            elif data["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(data["params"]["exceptionDetails"]))
            elif data["method"] == "Runtime.consoleAPICalled":
                if data["params"]["type"] in ("error", "assert"):
                    self.errors.append(str(data["params"]["args"]))
            elif data["method"] == "Log.entryAdded":
                if data["params"]["entry"]["level"] == "error":
                    self.errors.append(data["params"]["entry"]["text"])

    async def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        future = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        return await asyncio.wait_for(future, PATIENCE)

    async def evaluate(self, expression: str) -> Any:
        answer = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = PATIENCE) -> Any:
        """Wait for an expression to become true."""
        for _ in range(int(seconds / 0.05)):
            value = await self.evaluate(expression)
            if value:
                return value
            await asyncio.sleep(0.05)
        body = await self.evaluate("document.body.innerText")
        raise AssertionError(f"never true: {expression}\n{body}\n{self.errors}")

    async def open(self, url: str) -> None:
        await self.send("Page.enable")
        await self.send("Runtime.enable")
        await self.send("Log.enable")
        await self.send("Page.navigate", url=url)

    async def size(self, width: int, height: int, phone: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        await self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    async def key(self, name: str, down: bool) -> None:
        codes = {"left": "ArrowLeft", "right": "ArrowRight", "escape": "Escape"}
        code = codes.get(name, f"Key{name.upper()}")
        await self.send(
            "Input.dispatchKeyEvent",
            type="keyDown" if down else "keyUp",
            code=code,
            key=codes.get(name, name),
            windowsVirtualKeyCode=27 if name == "escape" else 0,
        )

    async def tap(self, name: str) -> None:
        await self.key(name, True)
        await self.key(name, False)

    async def screenshot(self, path: str | Path) -> None:
        data = await self.send("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(data["data"]))


class Browser:
    """``async with Browser(path) as browser: tab = await browser.tab(url)``."""

    def __init__(self, path: str, flags: str = FLAGS) -> None:
        self._path, self._flags = path, flags

    async def __aenter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="nfd-chromium-")
        self._process = await asyncio.create_subprocess_exec(
            self._path,
            *self._flags.split(),
            f"--user-data-dir={self._profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            # A process group to end, but no session: Linux shares cores out among sessions, and a
            # measurement should run server and browser with one share.
            preexec_fn=os.setpgrp,
        )
        self._http = aiohttp.ClientSession()
        port_file = Path(self._profile) / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and len(port_file.read_text().splitlines()) > 1:
                break
            await asyncio.sleep(0.05)
        self._at = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        return self

    async def tab(self, url: str) -> Tab:
        async with self._http.put(f"{self._at}/json/new?about:blank") as answer:
            about = await answer.json(content_type=None)
        socket = await self._http.ws_connect(
            about["webSocketDebuggerUrl"], max_msg_size=64 * 1024 * 1024
        )
        tab = Tab(socket, about["id"])
        await tab.open(url)
        return tab

    def seconds_used(self) -> float:
        """Processor time of the browser and its helpers so far (Linux)."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:  # what follows the name, which may be anything: state, parent, group, ...
                values = stat.read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if int(values[2]) == self._process.pid:
                ticks += int(values[11]) + int(values[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    async def close_tab(self, tab: Tab) -> None:
        async with self._http.get(f"{self._at}/json/close/{tab.target}"):
            pass

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        try:  # its own process group: helpers too
            os.killpg(self._process.pid, signal.SIGTERM)
            await asyncio.wait_for(self._process.wait(), 10)
        except (TimeoutError, ProcessLookupError):
            pass
        shutil.rmtree(self._profile, ignore_errors=True)


def run(main: Callable[[], Any], seconds: float = 8 * PATIENCE) -> Any:
    """Run a coroutine function, bounded in time."""
    return asyncio.run(asyncio.wait_for(main(), seconds))
