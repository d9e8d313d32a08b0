"""Parts that were not made from each other do not become a world."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.weights import CheckpointError, Origin, read_origin
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.format import NETWORKS, save_world
from nfd_env.worlds.load import load_world
from tests.tiny_world import make_tiny_world

ORIGINS = {
    "tokenizer": Origin("tokenizer", "T", {"recordings": "R"}),
    "dynamics": Origin("student", "S", {"tokenizer": "T", "recordings": "R", "teacher": "F"}),
    "heads": Origin("heads", "H", {"tokenizer": "T", "recordings": "R"}),
    "teacher": Origin("flow", "F", {"tokenizer": "T", "recordings": "R"}),
}


def changed(name: str, **values: Any) -> dict[str, Origin]:
    """The origins with other values of one, and with other inputs."""
    made_from = {**ORIGINS[name].made_from, **values.pop("made_from", {})}
    return {**ORIGINS, name: replace(ORIGINS[name], **values, made_from=made_from)}


def save(distilled_world: Path, folder: Path, **kwargs: Any) -> Path:
    student = load_world(distilled_world, "cpu", "fp32")
    teacher = load_world(distilled_world, "cpu", "fp32", "teacher").model.dynamics
    model = student.model
    spec = replace(student.spec, **kwargs.pop("spec", {}))
    parts = (model.tokenizer, model.dynamics, model.heads, student.starts, {}, teacher)
    return save_world(folder, spec, *parts, **kwargs)


def test_parts_that_belong_together(distilled_world: Path, tmp_path: Path) -> None:
    folder = save(distilled_world, tmp_path / "world", origins=ORIGINS)
    for name in NETWORKS:
        assert read_origin(folder / f"{name}.safetensors") == ORIGINS[name]
    load_world(folder, "cpu", "fp32", "teacher")


@pytest.mark.parametrize(
    ("origins", "message"),
    [
        (changed("tokenizer", fingerprint="X"), "dynamics was not made with this tokenizer"),
        (changed("heads", made_from={"tokenizer": "X"}), "heads was not made with this tokenizer"),
        (changed("teacher", made_from={"tokenizer": "X"}), "teacher was not made with this tok"),
        (changed("teacher", fingerprint="X"), "dynamics was not made with this teacher"),
        (changed("dynamics", made_from={"teacher": "X"}), "dynamics was not made with this teach"),
        (changed("dynamics", kind="flow"), "dynamics must be a student .* got a flow"),
        (changed("teacher", kind="student"), "teacher must be a flow .* got a student"),
        (changed("heads", kind="tokenizer"), "heads must be a heads .* got a tokenizer"),
        (changed("heads", made_from={"recordings": "X"}), "recordings of different frames"),
        ({k: v for k, v in ORIGINS.items() if k != "heads"}, "heads do not say what they were"),
        ({}, "tokenizer do not say what they were made from"),
    ],
)
def test_parts_that_do_not(
    distilled_world: Path, tmp_path: Path, origins: dict[str, Origin], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(distilled_world, tmp_path / "world", origins=origins)
    assert not list(tmp_path.iterdir())


def test_a_student_is_sampled_as_one(distilled_world: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dynamics must be a flow .*, got a student"):
        save(
            distilled_world,
            tmp_path / "world",
            origins=ORIGINS,
            spec={"sampling": SamplingConfig(4)},
        )


@pytest.mark.parametrize("name", ["tokenizer", "dynamics", "heads"])
def test_a_part_of_another_world_of_the_same_sizes(tmp_path: Path, name: str) -> None:
    """Its own checksum does not save it."""
    one, other = (make_tiny_world(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    shutil.copy(other / f"{name}.safetensors", one)
    with pytest.raises(CheckpointError, match=f"{name}.safetensors: damaged"):
        load_world(one)
    write_checksums(one)
    with pytest.raises(CheckpointError, match="was not made with this tokenizer"):
        load_world(one)


def test_the_teacher_of_another_world_of_the_same_sizes(tmp_path: Path) -> None:
    folders = [make_tiny_world(tmp_path / str(s), seed=s, distilled=True) for s in (1, 2)]
    shutil.copy(folders[1] / "teacher.safetensors", folders[0])
    write_checksums(folders[0])
    load_world(folders[0], "cpu", "fp32")
    with pytest.raises(CheckpointError, match="teacher was not made with this tokenizer"):
        load_world(folders[0], "cpu", "fp32", "teacher")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"teacher": None}, "a teacher and its sampling go together"),
        ({"frame_size": [64, 48]}, "do not fit together"),
        ({"frame_size": [33, 48]}, "do not fit together"),
        ({"action_space": {"type": "MultiBinary", "n": 7}}, "another action space"),
    ],
)
def test_what_would_not_load_is_not_written(
    distilled_world: Path, tmp_path: Path, broken: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(distilled_world, tmp_path / "world", spec=broken)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_are_not_written(tiny_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_world, tmp_path / "world")
    world = load_world(folder, "cpu", "fp32")
    model = world.model
    with torch.no_grad():
        model.heads.output.bias[0] = torch.nan
    parts = (model.tokenizer, model.dynamics, model.heads, world.starts, {})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"heads.safetensors: 'output.bias' holds NaN"):
        save_world(folder, world.spec, *parts)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(tmp_path.glob(".world*"))


def test_a_window_that_would_fill_the_memory(tiny_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_world, tmp_path / "world")
    path = folder / "dynamics.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header["config"] = json.dumps(json.loads(header["config"]) | {"window": 10**9})
    save_file(load_file(path), path, header)
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="a window of more than 4096 frames"):
        load_world(folder)
