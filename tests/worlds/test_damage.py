"""Damaged, cut and nonsensical world folders: one error that names the file, or the same world."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.demo import demo
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.weights import CheckpointError
from nfd_env.recipe.card import make_card
from nfd_env.sources.source import SourceConfig
from nfd_env.worlds import checksums
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.clip import Clip, NoClipError, load_clip, save_clip
from nfd_env.worlds.format import WorldSpec, read_spec, save_world
from nfd_env.worlds.hub import parse_address
from nfd_env.worlds.load import load_world
from nfd_env.worlds.starts import load_starts, save_starts
from tests.tiny_world import DISCRETE, make_tiny_world


@pytest.fixture
def copied(distilled_world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(distilled_world, tmp_path / "world")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["world.yaml"] + [f"{n}.safetensors" for n in ("tokenizer", "dynamics", "heads", "starts")],
)
def test_every_flipped_bit_is_noticed(copied: Path, name: str) -> None:
    path = copied / name
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 20).tolist():
        flip(path, bit)
        with pytest.raises(CheckpointError, match=f"{name}: damaged: it does not match"):
            load_world(copied, "cpu", "fp32")
        path.write_bytes(whole)
    load_world(copied, "cpu", "fp32")


def test_a_flipped_bit_of_the_teacher(copied: Path) -> None:
    flip(copied / "teacher.safetensors", 100_000)
    load_world(copied, "cpu", "fp32")
    with pytest.raises(CheckpointError, match=r"teacher.safetensors: damaged"):
        load_world(copied, "cpu", "fp32", "teacher")


@given(st.binary(max_size=200), st.integers(0, 5000), st.integers(0, 200))
def test_a_description_of_any_bytes(
    distilled_world: Path, tmp_path_factory: pytest.TempPathFactory, new: bytes, at: int, cut: int
) -> None:
    """Not even with its checksum made new does it do anything but load or say what is wrong."""
    folder = tmp_path_factory.mktemp("bytes")
    data = (distilled_world / "world.yaml").read_bytes()
    (folder / "world.yaml").write_bytes(data[:at] + new + data[at + cut :])
    write_checksums(folder)
    try:
        read_spec(folder)
    except CheckpointError as error:
        assert "world.yaml" in str(error) or "world format" in str(error)  # noqa: PT017


VALUES = [None, True, -1, 0, 3, 2**70, 0.5, -math.inf, math.nan, "", "x", "1e3", [], [1], ["a"]]
VALUES += [{}, {"a": 1}, {"type": "Discrete"}, [[1, 2]], "2026-01-01", "!!python/name:os.system"]


def keys_of(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += keys_of(value, (*prefix, key))
    return found


@given(st.data())
def test_values_of_wrong_types(
    distilled_world: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    values = yaml.safe_load((distilled_world / "world.yaml").read_text())
    key = data.draw(st.sampled_from(keys_of(values)))
    part = values
    for step in key[:-1]:
        part = part[step]
    part[key[-1]] = data.draw(st.sampled_from(VALUES))
    folder = tmp_path_factory.mktemp("values")
    (folder / "world.yaml").write_text(yaml.safe_dump(values))
    write_checksums(folder)
    try:
        spec = read_spec(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and len(str(error)) < 1000  # noqa: PT017
    else:
        assert isinstance(spec, WorldSpec) and 0 < spec.fps < math.inf


@pytest.mark.parametrize("keep", range(0, 100, 3))
def test_a_description_that_lost_its_end(copied: Path, keep: int) -> None:
    """A student with default sampling would draw nonsense."""
    path = copied / "world.yaml"
    text = path.read_text()
    path.write_text(text[: len(text) * keep // 100])
    with pytest.raises(CheckpointError, match="world.yaml: damaged"):
        load_world(copied)
    (copied / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"world.yaml"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_world(copied)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("sampling", "shift", 1e-17, "shift must be from 0.001 to 1000, got 1e-17"),
        ("sampling", "temperature", 1e38, "temperature must be above 0 and at most 100"),
        ("source", "action_names", list("abcdefghijk"), "11 action_names for 3 actions"),
    ],
)
def test_numbers_that_overflow_and_names_of_no_action(
    copied: Path, section: str, key: str, value: object, message: str
) -> None:
    path = copied / "world.yaml"
    values = yaml.safe_load(path.read_text())
    values[section][key] = value
    path.write_text(yaml.safe_dump(values))
    write_checksums(copied)
    with pytest.raises(CheckpointError, match=message):
        load_world(copied)


@pytest.mark.parametrize("key", ["steps", "sampler", "shift", "history_level", "temperature"])
@pytest.mark.parametrize("section", ["sampling", "teacher"])
def test_sampling_must_be_complete(copied: Path, section: str, key: str) -> None:
    path = copied / "world.yaml"
    values = yaml.safe_load(path.read_text())
    del values[section][key]
    path.write_text(yaml.safe_dump(values))
    write_checksums(copied)
    with pytest.raises(CheckpointError, match=rf"world.yaml: incomplete: it lacks {section}.{key}"):
        load_world(copied)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: " + "{b: " * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "a: &a [x]\nb: &b [*a, *a]\n",
        "a: 1\n" * 400_000,
        "!!python/object/apply:os.system ['echo']",
        "name: " + "9" * 10_000,
        "\0",
        "\ufeff",
        "name: a\nname: b\n",
    ],
)
def test_yaml_that_ends_interpreters(copied: Path, text: str) -> None:
    (copied / "world.yaml").write_text(text, encoding="utf-8")
    write_checksums(copied)
    with pytest.raises(CheckpointError, match="world.yaml"):
        load_world(copied)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "1", "[" * 100_000, " " * 2_000_000, '{"a": ' * 100_000, "\xff"]
)
def test_damaged_checksums(copied: Path, text: str) -> None:
    (copied / "checksums.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"checksums.json: damaged"):
        load_world(copied)


@pytest.mark.parametrize("sums", [{}, {"world.yaml": 3}, {"world.yaml": None}])
def test_files_without_their_checksum(copied: Path, sums: dict[str, Any]) -> None:
    (copied / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"world.yaml: damaged"):
        load_world(copied)


def test_a_world_of_before_loads_with_one_warning(copied: Path) -> None:
    (copied / "checksums.json").unlink()
    checksums._warned.clear()
    with pytest.warns(UserWarning, match="has no checksums.json") as caught:
        load_world(copied, "cpu", "fp32")
        load_world(copied, "cpu", "fp32", "teacher")
        read_spec(copied)
    assert len(caught) == 1


def test_a_shipped_world_loads_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_world("DoomTakeCover", "cpu", "fp32")


def test_checksums_are_computed_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_world(copied, "cpu", "fp32")
    monkeypatch.setattr(checksums.hashlib, "sha256", None)
    read_spec(copied)
    load_world(copied, "cpu", "fp32")
    (copied / "world.yaml").touch()
    with pytest.raises(TypeError):
        read_spec(copied)


@pytest.mark.parametrize(
    ("name", "value"), [("latents", math.nan), ("actions", math.inf), ("latents", -1e38)]
)
def test_starts_must_be_finite(copied: Path, tiny_world: Path, name: str, value: float) -> None:
    path = copied / "starts.safetensors"
    tensors = {key: value.float() for key, value in load_file(path).items()}
    tensors[name][-1, -1] = value
    save_file(tensors, path)
    write_checksums(copied)
    message = rf"starts.safetensors: {name} must be numbers from -65504 to 65504"
    with pytest.raises(CheckpointError, match=message):
        load_world(copied)
    with pytest.raises(CheckpointError, match=message):
        NFDVectorEnv(tiny_world, starts=path, device="cpu", precision="fp32")


def test_starts_that_cannot_be_stored(tmp_path: Path, tiny_world: Path) -> None:
    start = load_world(tiny_world, "cpu", "fp32").starts[0]
    start.latents[0, 0, 0, 0], kept = 1e6, start.latents[0, 0, 0, 0].clone()
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        save_starts(tmp_path / "starts.safetensors", [start])
    start.latents[0, 0, 0, 0] = kept
    assert not list(tmp_path.iterdir())
    save_starts(tmp_path / "starts.safetensors", [start])
    (loaded,) = load_starts(tmp_path / "starts.safetensors", (4, 4, 6), 3)
    assert torch.equal(loaded.latents.float(), start.latents)


def spec(**values: Any) -> WorldSpec:
    defaults: dict[str, Any] = {
        "name": "A",
        "frame_size": [32, 48],
        "fps": 30.0,
        "action_space": DISCRETE,
        "source": SourceConfig("A-v0"),
        "sampling": SamplingConfig(),
    }
    return WorldSpec(**defaults | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0.0}, "fps must be from 0.01 to 10000, got 0"),
        ({"fps": -1.0}, "fps must be from 0.01 to 10000, got -1"),
        ({"fps": math.inf}, "fps must be from 0.01 to 10000, got inf"),
        ({"fps": math.nan}, "fps must be from 0.01 to 10000, got nan"),
        ({"fps": 1e300}, "fps must be from 0.01 to 10000"),  # no film can be written
        ({"frame_size": [0, 48]}, "frame_size must be"),
        ({"frame_size": [32]}, "frame_size must be"),
        ({"frame_size": [32, 10**9]}, "frame_size must be"),
        ({"name": ""}, "name must have 1 to 100"),
        ({"name": "a" * 101}, "name must have 1 to 100"),
        ({"name": "a\nb"}, "printable"),
        ({"name": "../a"}, "must not look like a path"),
        ({"name": "a\\b"}, "must not look like a path"),
        ({"name": ".."}, "must not look like a path"),
        ({"max_episode_steps": -1}, "max_episode_steps"),
        ({"display": "blurred"}, "display must be smooth or pixelated"),
        ({"sampling": SamplingConfig(10**9)}, "sampling.steps must be at most"),
        ({"action_space": {"type": "Dict"}}, "action_space"),
        ({"action_space": {"type": "Discrete"}}, "action_space"),
        ({"action_space": {"type": "Discrete", "n": 0, "start": 0}}, "action_space"),
        ({"action_space": {"type": "Discrete", "n": 3, "start": 2**63 - 2}}, "64-bit integers"),
        (
            {"action_space": {"type": "MultiDiscrete", "nvec": [2, 2], "start": [0, 2**63 - 1]}},
            "64-bit integers",
        ),
        (
            {"action_space": {"type": "Box", "low": [0], "high": [1], "dtype": "bool"}},
            "must hold numbers",
        ),
    ],
)
def test_impossible_descriptions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**values)


@pytest.fixture
def clipped(copied: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    save_clip(copied, Clip(frames, np.arange(8) % 3), 35)
    write_checksums(copied)
    return copied


def test_a_clip_comes_back(clipped: Path) -> None:
    clip = load_clip(clipped)
    assert clip.frames.shape == (9, 32, 48, 3) and clip.actions.tolist() == [0, 1, 2] * 2 + [0, 1]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "missing", "text"])
@pytest.mark.parametrize("renewed", [False, True])
def test_a_damaged_clip(clipped: Path, name: str, damage: str, renewed: bool) -> None:
    path = clipped / name
    data = path.read_bytes()
    if damage == "bit":
        if renewed:
            return  # a bit of a picture cannot be told
        flip(path, 8 * len(data) // 2)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"x" * 999}[damage])
    if renewed:
        write_checksums(clipped)
    with pytest.raises(CheckpointError, match=name) as error:
        load_clip(clipped)
    assert not isinstance(error.value, NoClipError)  # which stands for a world without one
    with pytest.raises(CheckpointError, match=name):
        make_card(clipped, None, parse_address("me/world"), art="mine")


@pytest.mark.parametrize(
    "text", ["recordings: 5", "stages: [1]", "recordings: {frames: many}", "- 3"]
)
def test_a_provenance_that_no_card_can_be_made_of(copied: Path, text: str) -> None:
    (copied / "provenance.yaml").write_text(text)
    write_checksums(copied)
    with pytest.raises(ValueError, match="provenance.yaml") as error:
        make_card(copied, None, parse_address("me/world"), art="mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(8, dtype=torch.bfloat16), "clip.safetensors: missing or damaged"),
        (torch.tensor(3), "clip.mp4: has more than 2 frames"),
        (torch.arange(9) % 3, "has 9 frames and clip.safetensors 9 actions"),
        (torch.arange(8) % 3, "the clip has 9 frames"),  # fewer than are remembered
    ],
)
def test_a_clip_that_cannot_be_played_along_with(
    clipped: Path, tmp_path: Path, actions: torch.Tensor, message: str
) -> None:
    save_file({"actions": actions}, clipped / "clip.safetensors")
    long = make_tiny_world(tmp_path / "long", window=9)
    for name in ("clip.mp4", "clip.safetensors"):
        shutil.copy(clipped / name, long)
    write_checksums(long)
    with pytest.raises(CheckpointError, match=message) as error:
        demo(str(long), tmp_path / "out", 1.0, device="cpu")
    assert isinstance(error.value, NoClipError) == message.startswith("the clip has")


@pytest.mark.parametrize("seconds", [1e-9, 1.0])
def test_any_time_is_enough_to_play_along(clipped: Path, tmp_path: Path, seconds: float) -> None:
    report = demo(str(clipped), tmp_path / "out", seconds, device="cpu", precision="fp32")
    assert report.frames == (2 if seconds < 1 else 3) and report.p50_ms > 0


def test_a_link_to_nowhere_is_no_part_of_the_world(copied: Path) -> None:
    (copied / "notes").symlink_to("nowhere")
    assert load_world(copied, "cpu", "fp32").spec.name == "Tiny"


def test_a_world_is_saved_with_its_clip_or_not_at_all(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    model = world.model
    parts = (model.tokenizer, model.dynamics, model.heads, world.starts, {})
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    folder = tmp_path / "world"
    bad = Clip(frames, np.array(["a", "b", "c"]))
    with pytest.raises(TypeError):
        save_world(folder, world.spec, *parts, clip=bad)
    assert not folder.exists() and not list(tmp_path.glob(".world*"))
    save_world(folder, world.spec, *parts, clip=Clip(frames, np.arange(3)))
    assert len(load_clip(folder).frames) == 4
    with pytest.raises(TypeError):
        save_world(folder, world.spec, *parts, clip=bad)
    assert len(load_clip(folder).frames) == 4


def test_an_old_world_is_still_a_world(make_world: Callable[..., Path], tmp_path: Path) -> None:
    """One written before there were checksums, origins and the newer keys."""
    folder = make_tiny_world(tmp_path / "old", distilled=True)
    values = yaml.safe_load((folder / "world.yaml").read_text())
    for key in ("display", "title", "description", "recordings", "scores"):
        del values[key]
    (folder / "world.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name in ("tokenizer", "dynamics", "heads", "teacher"):
        path = folder / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            header = {k: v for k, v in file.metadata().items() if k in ("class", "config")}
        save_file(load_file(path), path, header)
    (folder / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="has no checksums.json"):
        student = load_world(folder, "cpu", "fp32")
    assert student.spec.display == "smooth" and student.dynamics == "student"
    assert load_world(folder, "cpu", "fp32", "teacher").dynamics == "teacher"
