"""Loading in somebody else's process: threads, forks, torch's defaults, odd names."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nfd_env.models.weights import CheckpointError
from nfd_env.worlds import load as loading
from nfd_env.worlds.load import UnknownWorldError, World, find_world, load_world


def tensors(world: World) -> dict[str, torch.Tensor]:
    model = world.model
    return {
        f"{name}.{key}": tensor
        for name in ("tokenizer", "dynamics", "heads")
        for key, tensor in [
            *getattr(model, name).named_parameters(),
            *getattr(model, name).named_buffers(),
        ]
    }


@pytest.mark.parametrize("round_", range(3))
def test_threads_get_one_model(distilled_world: Path, tmp_path: Path, round_: int) -> None:
    folder = shutil.copytree(distilled_world, tmp_path / "world")
    barrier = threading.Barrier(8)

    def load(number: int) -> World:
        barrier.wait()
        return load_world(folder, "cpu", "fp32", ("student", "teacher")[number % 2])

    with ThreadPoolExecutor(8) as pool:
        worlds = list(pool.map(load, range(8)))
    assert len({id(w) for w in worlds[::2]}) == len({id(w) for w in worlds[1::2]}) == 1
    assert worlds[0].model.tokenizer is worlds[1].model.tokenizer
    assert worlds[0].fingerprint == worlds[1].fingerprint


def test_the_fingerprint_goes_with_the_networks(
    distilled_world: Path, tiny_world: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(distilled_world, tmp_path / "elsewhere")
    (copy / "teacher.safetensors").unlink()
    one, same, other = (
        load_world(f, "cpu", "fp32").fingerprint for f in (distilled_world, copy, tiny_world)
    )
    assert one == same != other and len(one) == 64


@pytest.mark.parametrize("setting", ["float64", "float16", "meta", "deterministic"])
def test_torchs_defaults_change_nothing(tiny_world: Path, tmp_path: Path, setting: str) -> None:
    expected = load_world(tiny_world, "cpu", "fp32")
    folder = shutil.copytree(tiny_world, tmp_path / "world")
    before = torch.get_rng_state()
    try:
        if setting.startswith("float"):
            torch.set_default_dtype(getattr(torch, setting))
        elif setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.use_deterministic_algorithms(True)
        loaded = load_world(folder, "cpu", "fp32")
        if setting.startswith("float"):
            assert torch.get_default_dtype() == getattr(torch, setting)
        assert torch.empty(0).device.type == ("meta" if setting == "meta" else "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = tensors(expected)
    for name, tensor in tensors(loaded).items():
        assert tensor.device.type == "cpu" and tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    for one, other in zip(loaded.starts, expected.starts, strict=True):
        assert torch.equal(one.latents, other.latents) and one.latents.dtype == torch.float32


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_random_numbers_are_left_alone(tiny_world: Path, tmp_path: Path, precision: str) -> None:
    folder = shutil.copytree(tiny_world, tmp_path / "world")
    before = torch.get_rng_state()
    load_world(folder, "cpu", precision)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_while_a_thread_is_loading(tiny_world: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with loading.neutral_torch():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        try:
            load_world(tiny_world, "cpu", "fp32")
            os._exit(7)
        finally:
            os._exit(1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_home(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_world, tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_world("~/mine") == tmp_path / "mine"
    assert load_world("~/mine", "cpu", "fp32").spec.name == "Tiny"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "a\0b", "x" * 5000, "../doom_take_cover", "doom_take_cover/..", "~nobody"]
    + ["DoomTakeCover/", "Doom Take Cover", "\ud800"],
)
def test_odd_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownWorldError):
        load_world(name)


@pytest.mark.parametrize("world", [None, 5, 1.5, ["DoomTakeCover"], b"DoomTakeCover"])
def test_no_names(world: Any) -> None:
    with pytest.raises((TypeError, UnknownWorldError)):
        load_world(world)


def test_only_so_many_worlds_stay(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST_LOADED", 2)
    loading._loaded.clear()
    folders = [shutil.copytree(tiny_world, tmp_path / name) for name in "abc"]
    first = load_world(folders[0], "cpu", "fp32")
    for folder in (folders[1], folders[0], folders[2]):
        load_world(folder, "cpu", "fp32")
    assert load_world(folders[0], "cpu", "fp32") is first and len(loading._loaded) == 2


def test_a_failed_load_is_tried_again(tiny_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_world, tmp_path / "world")
    path = folder / "heads.safetensors"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"heads.safetensors: missing"):
        load_world(folder, "cpu", "fp32")
    path.write_bytes(data)
    load_world(folder, "cpu", "fp32")
