"""A folder that plays a world in any browser: the page of ``nfd serve``, and the world in a worker.

Nothing but files: whatever serves files over HTTP serves it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from nfd_env.envs.vector_env import START_SALT
from nfd_env.export.onnx import ExportError, ring_shape, to_onnx
from nfd_env.files import check_writable, found_file, make_folder
from nfd_env.play.keys import Keymap
from nfd_env.play.session import RESTART_AFTER
from nfd_env.play.web import STATIC
from nfd_env.play.web.protocol import about_game
from nfd_env.spaces import ActionCodec
from nfd_env.worlds.load import World, load_world

RUNTIME = "1.30.0"  # of onnxruntime-web
_ADDRESS = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME}/dist/"
_WASM, _GPU = "ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"
_FILES = {  # of it, for each backend
    "wasm": {"ort": "ort.wasm.min.mjs", "glue": f"{_WASM}.mjs", "wasm": f"{_WASM}.wasm"},
    "webgpu": {"ort": "ort.webgpu.min.mjs", "glue": f"{_GPU}.mjs", "wasm": f"{_GPU}.wasm"},
}
_SUMS = {  # at that address
    "ort.wasm.min.mjs": "sha256-IZ5qH8ipk4Jo0Y78o8kdMQvS9KWbvRN0TfWyt/xs7js=",
    "ort-wasm-simd-threaded.mjs": "sha256-4T9/lPxRtMpysS+use6V9Kzm37yJObxxiqvcCifEKZs=",
    "ort-wasm-simd-threaded.wasm": "sha256-M5jBDQfSKb2Rs2RUjhMODlGo5XBLiMfAg+u+t4hC3uI=",
    "ort.webgpu.min.mjs": "sha256-Pf//cYEbwTo6PZWRxXyl7lc1uPXz6veJUQsCuwQK46A=",
    "ort-wasm-simd-threaded.asyncify.mjs": "sha256-PRyFmVNku2QzAvxv2Hegw7pa5yQBgV4PJIKKU9kZHig=",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha256-OfnwiU1HiABIftn32+kmGEmNsyDPVcjj2Jrf+NzmWNo=",
}


def export_onnx(world: str, output: str) -> Path:
    """Write the ONNX files of a world into a new folder, see ``nfd_env.export.onnx``.

    Raises:
        ExportError: when the folder is not empty, or the world cannot be exported.
        CheckpointError: when the world cannot be loaded.
    """
    folder = _new_folder(output)
    graphs = to_onnx(load_world(world, "cpu", "fp32"))
    return _write(folder, {f"{name}.onnx": body for name, body in graphs.items()})


def export_web(world: str, output: str, runtime: str = "") -> Path:
    """Write a page that plays a world into a new folder.

    Args:
        world: a world folder, or the name of a shipped world.
        output: the folder.
        runtime: folder of the npm package onnxruntime-web, whose files are copied; "" for a page
            that loads them from a public server.

    Raises:
        ExportError: when the folder is not empty, the world cannot be exported, or ``runtime`` is
            not the package.
        CheckpointError: when the world cannot be loaded.
    """
    folder, files = _new_folder(output), {}
    for part in (STATIC, Path(__file__).parent / "static"):  # the latter's transport.js wins
        files |= {path.name: path.read_bytes() for path in part.iterdir()}
    addresses = {name: {"url": _ADDRESS + name, "integrity": _SUMS[name]} for name in _SUMS}
    if runtime:
        copied = {f"runtime/{name}": _of_package(runtime, name) for name in _SUMS}
        addresses = {url.split("/")[1]: _named(url, body) for url, body in copied.items()}
        files |= copied
    loaded = load_world(world, "cpu", "fp32")
    about = _about(loaded, Keymap.from_source(loaded.spec.source, loaded.action_space))
    about["runtime"] = {
        backend: {part: addresses[name] for part, name in names.items()}
        for backend, names in _FILES.items()
    }
    graphs = {f"{name}.bin": _packed(body) for name, body in to_onnx(loaded).items()}
    about["graphs"] = {url.split(".")[0]: _named(url, body) for url, body in graphs.items()}
    return _write(folder, files | graphs | {"world.json": json.dumps(about).encode()})


def _about(world: World, keymap: Keymap) -> dict[str, Any]:
    """What the worker knows of the world, and tells the page of it."""
    spec, c = world.spec, world.model.dynamics.config
    height, width = spec.frame_size
    shown = spec.source.display_aspect, spec.display, (width, height)
    hello = about_game(spec.name, spec.fps, *shown, keymap)
    return {
        "hello": hello | {"steps": [], "replay_seconds": 60},
        "keymap": keymap_values(keymap),
        "frame_size": spec.frame_size,
        "latent_shape": c.latent_shape,
        "window": c.window,
        "recent": c.recent,
        "ring": ring_shape(c),
        "memory": world.model.heads.memory_size,
        "history_level": spec.sampling.history_level,
        "sampling_steps": spec.sampling.steps,
        "renoisings": spec.sampling.renoisings,
        "starts": len(world.starts),
        "start_salt": START_SALT,
        "max_episode_steps": spec.max_episode_steps,
        "restart_ms": 1000 * RESTART_AFTER,
    }


def keymap_values(keymap: Keymap) -> dict[str, Any]:
    """A keymap with encoded actions, as plain values; see static/keys.js."""
    space, codec = keymap.space, ActionCodec(keymap.space)
    additive = keymap.additive

    def encoded(action: Any) -> list[float]:
        return codec.encode(codec.check(np.asarray(action)[None], 1))[0].tolist()

    # Where the part of an encoded action begins that stands for an entry of the action.
    widths = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.ones(codec.width, int)
    places = np.cumsum([0, *widths.tolist()]).tolist()
    bindings = []
    for binding in keymap.bindings:
        action, begin, end = binding.value, 0, codec.width
        if additive:
            (index,), value = binding.value
            action = np.array(keymap.noop)
            action[index] = value
            begin, end = places[index : index + 2]
        value = encoded(action)[begin:end]
        bindings.append(
            {"keys": sorted(binding.keys), "at": begin, "value": value, "label": binding.label}
        )
    axes = []
    # A stick that is half way has no whole number.
    for axis in keymap.axes if np.issubdtype(space.dtype, np.floating) else ():
        ends = {}
        for name in ("low", "rest", "high"):
            action = np.array(keymap.noop)
            action[axis.entry] = getattr(axis, name)
            ends[name] = encoded(action)[axis.entry]
        names = keymap.names[2 * axis.entry : 2 * axis.entry + 2] or ["", ""]
        axes.append({**ends, "both_ways": axis.both_ways, "names": names})
    noop = {"value": encoded(keymap.noop), "label": keymap.label(keymap.noop)}
    return {"additive": additive, "noop": noop, "bindings": bindings, "axes": axes}


def _of_package(package: str, name: str) -> bytes:
    """A file of an npm package onnxruntime-web."""
    path = Path(package).expanduser() / "dist" / name
    if not found_file(path, ExportError):
        raise ExportError(
            f"{package} has no dist/{name}: run npm install onnxruntime-web@{RUNTIME}, and give "
            "node_modules/onnxruntime-web"
        )
    return path.read_bytes()


def _named(url: str, body: bytes) -> dict[str, str]:
    """Where a file is, and its sum as a browser checks it (Subresource Integrity)."""
    digest = hashlib.sha256(body).digest()
    return {"url": url, "integrity": f"sha256-{base64.b64encode(digest).decode()}"}


def _packed(body: bytes) -> bytes:
    """Even bytes before odd ones, which makes half precision smaller, and gzip."""
    return gzip.compress(body[::2] + body[1::2], mtime=0)


def _new_folder(output: str) -> Path:
    """The folder ``output``, which is not there yet or empty.

    Raises:
        ExportError: when it is neither.
        FolderError: when it cannot be written.
    """
    if not output:
        raise ExportError("name a new folder with -o")
    folder = Path(output).expanduser().resolve()  # a link stays what it is
    check_writable(folder, folders=True)  # before a minute's work
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} is there already: name a new or an empty folder with -o")
    return folder


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write ``folder``, whole or not at all."""
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, body in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(body)
        temporary.chmod(0o755)  # to be served, perhaps by another user
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
