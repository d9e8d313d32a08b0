"""The page without a server, in a real headless Chromium, against the environment."""

import base64
import gzip
import http.server
import json
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("aiohttp")

from nfd_env.cli import main  # noqa: E402
from nfd_env.envs.vector_env import NFDVectorEnv  # noqa: E402
from nfd_env.export import page as export  # noqa: E402
from nfd_env.export.onnx import ExportError, to_onnx  # noqa: E402
from nfd_env.export.page import RUNTIME, keymap_values  # noqa: E402
from nfd_env.inference.sampling import SamplingConfig  # noqa: E402
from nfd_env.play.keys import KeyLatch, Keymap, PressedKey  # noqa: E402
from nfd_env.sources.spec import SourceConfig  # noqa: E402
from nfd_env.spaces import ActionCodec, space_from_dict  # noqa: E402
from nfd_env.worlds.load import load_world  # noqa: E402
from tests.play.browser import FLAGS, SOFTWARE_GPU, Browser, find_chromium, run  # noqa: E402

CHROMIUM = find_chromium()
PACKAGE = Path(__file__).parents[2] / "node_modules" / "onnxruntime-web"
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or not PACKAGE.is_dir(),
    reason="NO CHROMIUM: apt-get install chromium"
    if CHROMIUM is None
    else f"NO ONNXRUNTIME-WEB: npm install --no-save onnxruntime-web@{RUNTIME}",
)
on_a_gpu = pytest.mark.skipif(
    "NFD_WEBGPU" not in os.environ,
    reason="TAKES MINUTES, a processor plays the GPU: NFD_WEBGPU=1 .venv/bin/python -m pytest "
    "tests/export/test_web.py",
)
on_request = pytest.mark.skipif(
    "NFD_SHIPPED" not in os.environ,
    reason="TAKES A MINUTE a world: NFD_SHIPPED=1 .venv/bin/python -m pytest "
    "tests/export/test_web.py",
)
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Files(http.server.SimpleHTTPRequestHandler):
    """Files, with further headers."""

    more: dict[str, str] = {}

    def end_headers(self):
        for name, value in self.more.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def hosting(folder, headers):
    handler = partial(type("Handler", (Files,), {"more": headers}), directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def page(request, make_world, tmp_path_factory):
    """A page of a shipped world, or one whose episodes end now and then, and the world.

    The latter's dynamics has convolutions that see so many frames before.
    """
    world = request.param
    if isinstance(world, int):
        world = make_world(distilled=True, hazard_bias=-2.0, recent=world)
    folder = tmp_path_factory.mktemp("page") / "here"
    arguments = [str(world), "-o", str(folder), "--runtime", str(PACKAGE)]
    assert main(["export-web", *arguments]) == 0
    return world, folder


# Plays a list of keys, one a step; an over episode is followed by the next one.
PLAY = """(async (seed, keys) => {
  const { control } = await import("./small.js");
  const until = async (what) => {
    while (!what()) await new Promise((done) => setTimeout(done, 20));
  };
  const canvas = document.getElementById("view"), seen = [];
  const look = () => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let text = "";
    for (const value of data) text += String.fromCharCode(value);
    const { step, episode, reward, over, action, hazard } = nfd.hud;
    seen.push({ pixels: btoa(text), step, episode, reward, over, action, hazard });
  };
  const press = (type, code) => window.dispatchEvent(new KeyboardEvent(type, { code }));
  // A page that hangs misses pictures, but not the last one before a pause.
  for (const since = performance.now(); performance.now() - since < 700;);
  control("pause", true);
  control("seed", seed);
  await until(() => nfd.hud.paused && nfd.hud.seed === seed && nfd.hud.step === 0);
  look();
  for (const key of keys) {
    const { step, over, episode } = nfd.hud;
    if (over) {
      control("reset");
      await until(() => nfd.hud.episode === episode + 1);
    } else {
      if (key) press("keydown", key);
      document.querySelector("[data-do=step]").click();
      await until(() => nfd.hud.step === step + 1);
      if (key) press("keyup", key);
    }
    look();
  }
  return JSON.stringify(seen);
})"""
CODES = {"": "", "right": "ArrowRight", "left": "ArrowLeft"}


async def played(tab, seed, keys):
    await tab.until("window.nfd && nfd.hello && nfd.hud.step >= 1", 600)
    keys = json.dumps([CODES[key] for key in keys])
    # Not in one call to the browser: that would have a limit in time.
    await tab.evaluate(f"{PLAY}({seed}, {keys}).then((seen) => {{ window.seen = seen; }}); 0")
    return json.loads(await tab.until("window.seen", 600))


def expected(world, seed, keys):
    """Frames, reward and end of the same play of the environment."""
    env = NFDVectorEnv(world, device="cpu", precision="fp32")
    keymap = Keymap.from_source(env.world.spec.source, env.single_action_space)
    frames, _ = env.reset(seed=seed)
    seen = [(frames[0], 0.0, False)]
    for key in keys:
        action = keymap.choose([PressedKey(key, True)]).action
        frames, rewards, terminated, truncated, _ = env.step(np.array([action]))
        seen.append((frames[0], rewards[0], bool(terminated[0] or truncated[0])))
    return seen


@in_a_browser
@pytest.mark.parametrize(
    ("page", "headers", "steps", "backend"),
    [
        (2, {}, 50, ""),
        (0, ISOLATED, 5, "webgpu"),
        pytest.param(2, {}, 12, "webgpu", marks=on_a_gpu),
        pytest.param("BigFish", {}, 50, "wasm", marks=on_request),
        pytest.param("DoomTakeCover", {}, 50, "wasm", marks=on_request),
    ],
    ids=["one thread", "threads", "gpu", "BigFish", "DoomTakeCover"],
    indirect=["page"],
)
def test_the_page_plays_as_the_environment_does(request, page, headers, steps, backend):
    world, folder = page
    on_gpu = "gpu" in request.node.callspec.id
    seed, keys = 2**32 - 3, np.random.default_rng(0).choice(list(CODES), steps).tolist()

    async def go(url):
        async with Browser(CHROMIUM, SOFTWARE_GPU if on_gpu else FLAGS) as browser:
            tab = await browser.tab(f"{url}?backend={backend}")
            seen = await played(tab, seed, keys)
            where = await tab.evaluate("document.getElementById('status').innerText")
            said = await tab.evaluate("document.getElementById('toast').innerText")
            assert tab.errors == []
            return seen, where, said, await tab.evaluate("crossOriginIsolated")

    with hosting(folder, headers) as url:
        seen, where, said, isolated = run(lambda: go(url))
    assert isolated == bool(headers)
    if on_gpu:
        assert where == "WebGPU"
    else:  # whose browser has none
        assert where.startswith("WASM, ") and ("1 thread" in where) == (not headers)
        assert ("WASM computes, for WebGPU cannot" in said) == (backend == "webgpu")
    wanted = expected(world, seed, keys)
    assert len(seen) == len(wanted)
    # Where fire bursts in that world, what was rounded otherwise grows for some frames.
    most = 1e-3 if world == "DoomTakeCover" else 0
    for one, (frame, reward, over) in zip(seen, wanted, strict=True):
        shown = np.frombuffer(base64.b64decode(one["pixels"]), np.uint8)
        shown = shown.reshape(*frame.shape[:2], 4)
        off = np.abs(shown[..., :3].astype(int) - frame)
        assert (off > 2).mean() <= most, (one["step"], off.max())
        assert one["over"] == over
        assert one["reward"] == pytest.approx(reward, abs=1e-3)
    assert steps < 50 or isinstance(world, str) or seen[-1]["episode"] >= 3


SPACES = {
    "Discrete": {"type": "Discrete", "n": 4, "start": 2},
    "MultiDiscrete": {"type": "MultiDiscrete", "nvec": [3, 2], "start": [1, 0]},
    "MultiBinary": {"type": "MultiBinary", "n": 3},
    "Box": {"type": "Box", "low": [-1.0, 0.0, -3.0], "high": [2.0, 4.0, 3.0], "dtype": "float32"},
}
CHORDS = ["noop", "left", "fire", "left fire"]


def keymap_of(name):
    space = space_from_dict(SPACES[name])
    if name != "Discrete":
        return Keymap.from_source(SourceConfig(env_id="Any-v0"), space)
    keys = {"left": ["left"], "fire": ["space"], "left fire": ["left+space"]}
    return Keymap.from_source(SourceConfig("Any-v0", action_names=CHORDS, keys=keys), space)


def drawn_inputs(keymap, count):
    """Keys that go down and up, sticks that move, a lost focus, and steps in between."""
    rng = np.random.default_rng(1)
    keys, inputs = sorted(keymap.keys), []
    for kind in rng.choice(6, count, p=[0.25, 0.2, 0.1, 0.04, 0.01, 0.4]):
        if kind < 2:
            inputs.append((("press", "release")[kind], str(rng.choice(keys))))
        elif kind == 2:
            inputs.append(("tilt", int(rng.integers(3)), float(rng.choice([-1, -0.5, 0, 0.25, 1]))))
        else:
            inputs.append((("tilt", 0, 0.0), ("releaseAll",), ("choose",))[kind - 3])
    return inputs


def chosen(keymap, inputs):
    """The encoded action and its label at each step."""
    latch, codec, made = KeyLatch(keymap.keys, len(keymap.axes)), ActionCodec(keymap.space), []
    for name, *values in inputs:
        if name == "choose":
            choice = latch.consume(keymap)
            action = codec.encode(codec.check(np.asarray(choice.action)[None], 1))[0].tolist()
            made.append((pytest.approx(action, abs=1e-6), choice.label))
        else:
            getattr(latch, {"releaseAll": "release_all"}.get(name, name))(*values)
    return made


CHOOSE = """(async (map, inputs) => {
  const { Keys } = await import("./keys.js"), keys = new Keys(map), made = [];
  for (const [name, ...values] of inputs) {
    const choice = keys[name](...values);
    if (name === "choose") made.push([[...choice.action], choice.label]);
  }
  return made;
})"""


@in_a_browser
def test_keys_mean_what_they_mean_on_the_server():
    async def go(url):
        async with Browser(CHROMIUM) as browser:
            tab = await browser.tab(f"{url}keys.js")
            await tab.until(
                "location.href.endsWith('keys.js') && document.readyState == 'complete'"
            )
            made = {}
            for name in SPACES:
                keymap = keymap_of(name)
                given = json.dumps(keymap_values(keymap)), json.dumps(drawn_inputs(keymap, 400))
                made[name] = await tab.evaluate(f"{CHOOSE}({', '.join(given)})")
            return made

    with hosting(Path(export.__file__).parent / "static", {}) as url:
        made = run(lambda: go(url))
    for name in SPACES:
        keymap = keymap_of(name)
        wanted = chosen(keymap, drawn_inputs(keymap, 400))
        assert len(wanted) > 100 and len({label for _, label in wanted}) > 3
        assert [(action, label) for action, label in made[name]] == wanted, name


def test_a_folder_that_is_not_empty_is_left_as_it_is(tiny_world, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("mine")
    for command in ("export-web", "export-onnx"):
        assert main([command, str(tiny_world), "-o", str(tmp_path / "here")]) == 1
        assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "mine"]


def test_errors_say_what_to_do_and_leave_nothing(tiny_world, tmp_path, capsys, monkeypatch):
    output = ["-o", str(tmp_path / "page")]
    (tmp_path / "package").mkdir()
    runtime = ["--runtime", str(tmp_path / "package")]
    assert main(["export-web", str(tiny_world), *output, *runtime]) == 1
    assert f"npm install onnxruntime-web@{RUNTIME}" in capsys.readouterr().err
    assert main(["export-web", "no-such-world", *output]) == 1
    assert "unknown world" in capsys.readouterr().err
    world = load_world(tiny_world, "cpu", "fp32")
    slow = replace(world, spec=replace(world.spec, sampling=SamplingConfig(steps=9)))
    with pytest.raises(ExportError, match="9 steps, at most 8"):
        to_onnx(slow)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export-web", str(tiny_world), *output]) == 1
    assert "pip install 'nfd-env[web]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_without_a_runtime_the_page_names_one_and_its_sums(tiny_world, tmp_path, monkeypatch):
    graphs = dict.fromkeys(("starts", "dynamics", "heads", "decoder"), b"odd")
    monkeypatch.setattr(export, "to_onnx", lambda world: graphs)
    folder = export.export_web(str(tiny_world), str(tmp_path / "page"))
    about = json.loads((folder / "world.json").read_text())
    named = [file for backend in about["runtime"].values() for file in backend.values()]
    assert len(named) == 6
    for file in named:
        assert file["url"].startswith("https://") and f"@{RUNTIME}/" in file["url"]
        if PACKAGE.is_dir():
            body = (PACKAGE / "dist" / file["url"].rpartition("/")[2]).read_bytes()
            assert file == export._named(file["url"], body)
    planes = gzip.decompress((folder / "heads.bin").read_bytes())
    assert planes == b"od" + b"d"
    body = (folder / "heads.bin").read_bytes()
    assert about["graphs"]["heads"] == export._named("heads.bin", body)
