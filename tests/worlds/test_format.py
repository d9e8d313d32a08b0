from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nfd_env.devices import DeviceError, resolve_device
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.weights import CheckpointError
from nfd_env.sources.source import SourceError
from nfd_env.worlds import load as worlds
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.format import save_world
from nfd_env.worlds.load import UnknownWorldError, find_world, load_world, make_real, shipped_worlds
from tests.tiny_world import make_tiny_world

FILES = ["tokenizer", "dynamics", "heads", "starts"]


@pytest.fixture
def copied(tiny_world: Path, tmp_path: Path) -> Path:
    """A tiny world that a test may damage."""
    return shutil.copytree(tiny_world, tmp_path / "world")


def test_round_trip(tiny_world: Path) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    assert world.folder == tiny_world.resolve()
    assert world.spec.name == "Tiny" and world.spec.frame_size == [32, 48]
    assert world.spec.sampling.steps == 2 == world.model.sampling.steps
    assert world.action_space == gymnasium.spaces.Discrete(3)
    assert len(world.starts) == 6
    assert world.starts[0].latents.shape == (3, 4, 4, 6)
    assert world.starts[0].actions.shape == (3, 3)
    saved = load_file(tiny_world / "dynamics.safetensors")
    for name, tensor in world.model.dynamics.state_dict().items():
        if not name.startswith("modulation"):  # which has the norms folded into it
            assert torch.equal(tensor, saved[name].float())
    for network in (world.model.tokenizer, world.model.dynamics, world.model.heads):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_what_lies_in_the_folder(tiny_world: Path) -> None:
    names = sorted(p.name for p in tiny_world.iterdir())
    weights = [f"{n}.safetensors" for n in FILES]
    assert names == sorted([*weights, "world.yaml", "provenance.yaml", "checksums.json"])
    assert json.loads((tiny_world / "checksums.json").read_text()) == {
        name: hashlib.sha256((tiny_world / name).read_bytes()).hexdigest()
        for name in names
        if name != "checksums.json"
    }
    assert yaml.safe_load((tiny_world / "provenance.yaml").read_text()) == {"made_by": "tests"}
    for name in FILES:
        with safe_open(tiny_world / f"{name}.safetensors", "pt") as file:
            floating = [file.get_tensor(k).dtype for k in file.keys()]  # noqa: SIM118
        assert set(floating) <= {torch.float16, torch.int64, torch.uint8}


def test_loading_twice_shares_the_weights(tiny_world: Path) -> None:
    first = load_world(tiny_world, "cpu", "fp32")
    assert load_world(str(tiny_world), torch.device("cpu"), "fp32") is first
    other = load_world(tiny_world, "cpu", "bf16")
    assert other.model is not first.model
    assert first.model.precision == "fp32" and other.model.precision == "bf16"


def test_a_world_that_was_written_again_is_loaded_again(tmp_path: Path) -> None:
    folder = make_tiny_world(tmp_path / "world", seed=1)
    first = load_world(folder)
    make_tiny_world(folder, seed=2)
    second = load_world(folder)
    assert second is not first
    assert not torch.equal(first.model.dynamics.embed.weight, second.model.dynamics.embed.weight)


def test_a_world_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    there, link = tmp_path / "disk" / "world", tmp_path / "link"
    there.mkdir(parents=True)
    link.symlink_to(there)
    for seed in (1, 2, 3):
        make_tiny_world(link, seed=seed)
        assert link.is_symlink() and load_world(link).folder == there
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["disk", "link"]


def test_loading_leaves_the_random_numbers_alone(copied: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_world(copied)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_worlds(tmp_path: Path) -> None:
    with pytest.raises(UnknownWorldError, match="unknown world 'NoSuchWorld'"):
        load_world("NoSuchWorld")
    for name in shipped_worlds():
        with pytest.raises(UnknownWorldError, match=name):
            load_world("NoSuchWorld")
    with pytest.raises(UnknownWorldError, match="has no world.yaml"):
        load_world(tmp_path)
    assert issubclass(UnknownWorldError, CheckpointError)


def test_a_run_is_the_world_that_it_has_made(tmp_path: Path, tiny_world: Path) -> None:
    shutil.copytree(tiny_world, tmp_path / "run" / "world")
    assert find_world(tmp_path / "run") == tmp_path / "run" / "world"
    assert load_world(tmp_path / "run").folder == (tmp_path / "run" / "world").resolve()
    (tmp_path / "run" / "world").rename(tmp_path / "run" / ".world.replaced")  # a writer was killed
    assert find_world(tmp_path / "run") == tmp_path / "run" / "world"
    (tmp_path / "run" / "world" / "world.yaml").unlink()
    with pytest.raises(UnknownWorldError, match="run/world is no world folder"):
        find_world(tmp_path / "run")


def test_a_shipped_world_is_found_by_either_name(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_world, tmp_path / "my_tiny_world")
    shutil.copytree(tiny_world, tmp_path / ".my_tiny_world.writing")
    monkeypatch.setattr(worlds, "SHIPPED", tmp_path)
    assert shipped_worlds() == ["my_tiny_world"]
    assert find_world("MyTinyWorld") == find_world("my_tiny_world") == tmp_path / "my_tiny_world"
    with pytest.raises(UnknownWorldError, match="my_tiny_world"):
        find_world("YourTinyWorld")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copied: Path, name: str) -> None:
    (copied / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{name}.safetensors"):
        load_world(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(copied: Path, name: str) -> None:
    path = copied / f"{name}.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{name}.safetensors.*does not match its checksum"):
        load_world(copied)
    write_checksums(copied)
    with pytest.raises(CheckpointError, match=f"{name}.safetensors.*damaged"):
        load_world(copied)


@pytest.mark.parametrize("name", ["tokenizer", "dynamics", "heads"])
def test_files_that_changed_places(copied: Path, name: str) -> None:
    other = {"tokenizer": "dynamics", "dynamics": "heads", "heads": "tokenizer"}[name]
    shutil.copy(copied / f"{other}.safetensors", copied / f"{name}.safetensors")
    write_checksums(copied)
    with pytest.raises(CheckpointError, match=f"holds a {other.title()}, not a {name.title()}"):
        load_world(copied)


def test_networks_of_another_action_space(copied: Path, make_world: Callable[..., Path]) -> None:
    other = make_world(action_space={"type": "Discrete", "n": 4, "start": 0})
    for name in ("dynamics", "heads"):
        kept = (copied / f"{name}.safetensors").read_bytes()
        shutil.copy(other / f"{name}.safetensors", copied / f"{name}.safetensors")
        write_checksums(copied)
        with pytest.raises(CheckpointError, match="another action space"):
            load_world(copied)
        (copied / f"{name}.safetensors").write_bytes(kept)
        write_checksums(copied)
    load_world(copied)


def edit(folder: Path, **values: object) -> None:
    path = folder / "world.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))
    write_checksums(folder)


def test_networks_of_another_frame_size(copied: Path) -> None:
    edit(copied, frame_size=[64, 48])
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_world(copied)


def test_start_frames_of_another_world(copied: Path) -> None:
    path = copied / "starts.safetensors"
    save_file({"latents": torch.zeros(2, 3, 4, 4, 5), "actions": torch.zeros(2, 3, 3)}, path)
    write_checksums(copied)
    with pytest.raises(CheckpointError, match="start frames of another world"):
        load_world(copied)
    save_file({"something": torch.zeros(2)}, path)
    write_checksums(copied)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_world(copied)


def test_a_damaged_description(copied: Path) -> None:
    path = copied / "world.yaml"
    text = path.read_text()
    edit(copied, bogus=1)
    with pytest.raises(CheckpointError, match="world.yaml.*bogus"):
        load_world(copied)
    path.write_text(text[: len(text) // 2] + ": [")
    write_checksums(copied)
    with pytest.raises(CheckpointError, match="world.yaml"):
        load_world(copied)
    path.write_text(text)
    edit(copied, format=99)
    with pytest.raises(CheckpointError, match="world format 99"):
        load_world(copied)


def test_devices(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="sees no CUDA GPU"):
        load_world(tiny_world, "cuda")
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        load_world(tiny_world, "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="there are 2 GPUs"):
        resolve_device("cuda:2")


def test_unknown_precision(tiny_world: Path) -> None:
    with pytest.raises(ValueError, match="precision must be"):
        load_world(tiny_world, precision="fp16")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("crash", ["weights", "starts", "description"])
def test_an_interrupted_write_leaves_the_old_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    folder = make_tiny_world(tmp_path / "world", seed=1)
    before = contents(folder)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    name = {"weights": "save_weights", "starts": "save_starts", "description": "yaml.safe_dump"}
    with monkeypatch.context() as patch:
        patch.setattr(f"nfd_env.worlds.format.{name[crash]}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_tiny_world(folder, seed=2)
        with pytest.raises(KeyboardInterrupt):
            make_tiny_world(tmp_path / "new", seed=2)
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()
    # What it left lying around is not in the way.
    make_tiny_world(folder, seed=2)
    make_tiny_world(tmp_path / "new", seed=2)
    assert contents(folder).keys() == before.keys()
    assert contents(folder)["starts.safetensors"] != before["starts.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[:5] != ".lock") == ["new", "world"]


@pytest.mark.parametrize("moves", [1, 2])
def test_a_crash_while_the_folders_are_swapped_loses_no_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    folder = make_tiny_world(tmp_path / "world", seed=1)
    old = contents(folder)
    replace, done = os.replace, 0

    def crash(source: Path, target: Path) -> None:
        nonlocal done
        if Path(source).is_dir():
            done += 1
            if done == moves:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            make_tiny_world(folder, seed=2)
    assert contents(folder) == old
    load_world(make_tiny_world(folder, seed=2))


def test_something_else_is_in_the_way(tmp_path: Path, tiny_world: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is in the way"):
        make_tiny_world(folder)
    assert contents(folder) == {"thesis.tex": b"years of work"}
    assert [p.name for p in tmp_path.iterdir() if p.name[:5] != ".lock"] == ["thesis"]
    (tmp_path / "empty").mkdir()
    load_world(make_tiny_world(tmp_path / "empty"))


def test_a_loaded_world_can_be_written_again(tiny_world: Path, tmp_path: Path) -> None:
    world = load_world(tiny_world, "cpu", "fp32")
    model = world.model
    save_world(
        tmp_path / "again",
        world.spec,
        model.tokenizer,
        model.dynamics,
        model.heads,
        world.starts,
        {},
    )
    again = load_world(tmp_path / "again", "cpu", "fp32")
    assert again.spec == world.spec
    for name in FILES:
        left, right = (load_file(f / f"{name}.safetensors") for f in (tiny_world, again.folder))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)


def test_the_config_stands_in_the_header(tiny_world: Path) -> None:
    with safe_open(tiny_world / "dynamics.safetensors", "pt") as file:
        header = file.metadata()
    assert header["class"] == "Dynamics"
    assert json.loads(header["config"])["window"] == 5


def test_make_real(tiny_world: Path) -> None:
    pytest.importorskip("pygame")
    env = make_real(tiny_world)
    world = load_world(tiny_world)
    assert list(env.observation_space.shape or ()) == [*world.spec.frame_size, 3]
    observation, _ = env.reset(seed=0)
    assert observation.dtype == np.uint8 and observation in env.observation_space
    env.close()
    with pytest.raises(UnknownWorldError):
        make_real("NoSuchWorld")


def test_make_real_of_a_game_that_is_not_installed(copied: Path) -> None:
    source = {"env_id": "Game-v0", "imports": ["no_such_game.envs"]}
    edit(copied, source=source)
    with pytest.raises(SourceError, match="pip install no_such_game"):
        make_real(copied, trust=True)
    load_world(copied)  # the learned world needs no game


def test_student_and_teacher_in_one_world(distilled_world: Path) -> None:
    student = load_world(distilled_world, "cpu", "fp32")
    teacher = load_world(distilled_world, "cpu", "fp32", "teacher")
    assert (student.dynamics, teacher.dynamics) == ("student", "teacher")
    assert load_world(distilled_world, "cpu", "fp32", "student") is student
    assert load_world(distilled_world, "cpu", "fp32", "teacher") is teacher
    assert student.model.sampling == SamplingConfig(1, "consistency")
    assert teacher.model.sampling == SamplingConfig(3, "euler")
    assert student.model.tokenizer is teacher.model.tokenizer
    assert student.model.heads is teacher.model.heads
    one, other = (w.model.dynamics.output.weight for w in (student, teacher))
    assert not torch.equal(one, other)
    file = load_file(distilled_world / "teacher.safetensors")
    assert torch.equal(other, file["output.weight"].float())


def test_a_teacher_is_loaded_only_when_it_is_asked_for(
    distilled_world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(distilled_world, tmp_path / "world")
    (folder / "teacher.safetensors").write_bytes(b"damaged")
    student = load_world(folder, "cpu", "fp32")
    with pytest.raises(CheckpointError, match="teacher.safetensors.*damaged"):
        load_world(folder, "cpu", "fp32", "teacher")
    (folder / "teacher.safetensors").unlink()
    assert load_world(folder, "cpu", "fp32") is student
    with pytest.raises(CheckpointError, match="teacher.safetensors: this copy.*no teacher"):
        load_world(folder, "cpu", "fp32", "teacher")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("teacher", "dynamics='teacher' was asked for, Tiny has: flow"),
        ("student", "dynamics='student' was asked for, Tiny has: flow"),
        ("pupil", "dynamics='pupil' was asked for, Tiny has: flow"),
    ],
)
def test_dynamics_that_a_world_does_not_have(tiny_world: Path, which: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_world(tiny_world, "cpu", "fp32", which)
    assert load_world(tiny_world, "cpu", "fp32", "flow").dynamics == "flow"


def test_a_teacher_of_another_world(distilled_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(distilled_world, tmp_path / "world")
    other = make_tiny_world(tmp_path / "other", {"type": "Discrete", "n": 5, "start": 0})
    shutil.copy(other / "dynamics.safetensors", folder / "teacher.safetensors")
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="teacher and student do not fit together"):
        load_world(folder, "cpu", "fp32", "teacher")
