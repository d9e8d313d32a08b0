"""Worlds are shared by a hub: sent, fetched, checked; against a stand-in of its interface."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml

from nfd_env import cli
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.models.weights import CheckpointError
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.hub import HubError, fetch_world, parse_address
from nfd_env.worlds.load import find_world, load_world, make_real
from nfd_env.worlds.trust import UntrustedWorldError
from tests.worlds.hub_server import TOKEN, Hub, serving

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="SHARING IS NOT TESTED: pip install 'nfd-env[hub]'"
)

REPO, WORLD = "ada/tiny", "hf://ada/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, an empty cache, and somebody who may write."""
    from huggingface_hub import constants

    with serving() as hub:
        cache = str(tmp_path / "cache")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_CACHE", cache), ("HF_TOKEN", TOKEN)):
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def world(make_world: Callable[..., Path], tmp_path: Path) -> Path:
    """A world folder to write into."""
    return shutil.copytree(make_world(), tmp_path / "world")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


def rollout(world: str | Path) -> np.ndarray:
    env = NFDVectorEnv(world, 2, obs_type="latent")
    env.reset(seed=3)
    return np.stack([env.step(np.array([1, 2]))[0] for _ in range(3)])


def test_pushed_and_made_again_by_its_address(
    hub: Hub, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "notes.py").write_text("raise SystemExit('run')")
    art = ["--art-license", "Dots drawn by code: CC0."]
    assert cli.main(["push", str(world), REPO, "--license", "mit", *art]) == 0
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out
    sent = hub.newest(REPO)
    assert sent["dynamics.safetensors"] == (world / "dynamics.safetensors").read_bytes()
    assert "notes.py" not in sent
    _, front, text = sent["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["library_name"] == "nfd_env"
    for part in (f'world="{WORLD}"', "Dots drawn by code", "card/frames.png", "32x48"):
        assert part in text, part
    assert sent["card/frames.png"].startswith(b"\x89PNG")

    np.testing.assert_array_equal(rollout(WORLD), rollout(world))
    env = gymnasium.make("NFD/World-v0", world=WORLD)
    env.reset(seed=0)
    env.close()
    assert load_world(WORLD).folder.parent.name == "snapshots"
    assert not any("README" in line and "resolve" in line for line in hub.asked)


def test_what_was_fetched_needs_no_network_until_it_is_pulled(
    hub: Hub, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = hub.commit(REPO, contents(world))
    folder = find_world(WORLD)
    hub.asked.clear()
    assert find_world(WORLD) == folder and folder.name == first
    assert hub.asked == []

    values = yaml.safe_load((world / "world.yaml").read_text()) | {"title": "newer"}
    (world / "world.yaml").write_text(yaml.safe_dump(values))
    write_checksums(world)
    second = hub.commit(REPO, contents(world))
    assert load_world(WORLD).spec.title != "newer"
    assert cli.main(["pull", REPO]) == 0
    assert capsys.readouterr().out.strip().endswith(second)
    assert load_world(WORLD).spec.title == "newer"
    assert load_world(f"{WORLD}@{first}").spec.title != "newer"


def test_a_file_that_is_missing_in_the_cache_is_fetched_again(hub: Hub, world: Path) -> None:
    hub.commit(REPO, contents(world))
    (find_world(WORLD) / "heads.safetensors").unlink()
    assert (find_world(WORLD) / "heads.safetensors").is_file()


@pytest.mark.parametrize("left", ["world.yaml", "checksums.json"])
def test_a_fetch_that_was_interrupted_goes_on(hub: Hub, world: Path, left: str) -> None:
    hub.commit(REPO, contents(world))
    folder = find_world(WORLD)
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    assert find_world(WORLD) == folder
    load_world(WORLD)


def test_a_file_changed_in_the_cache_is_refused_and_pull_mends_it(hub: Hub, world: Path) -> None:
    hub.commit(REPO, contents(world))
    path = find_world(WORLD) / "heads.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"heads\.safetensors: damaged.*pull"):
        load_world(WORLD)
    fetch_world(WORLD)
    load_world(WORLD)


def test_a_file_changed_on_the_hub_is_refused(hub: Hub, world: Path) -> None:
    files = contents(world)
    last = files["starts.safetensors"][-1] ^ 1
    files["starts.safetensors"] = files["starts.safetensors"][:-1] + bytes([last])
    hub.commit(REPO, files)
    with pytest.raises(HubError, match=r"damaged on the hub .*starts\.safetensors"):
        load_world(WORLD)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://ada/none", "no such repository, or it is private"),
        (f"{WORLD}@v9", "there is no revision 'v9'"),
        ("hf://ada/model", r"is no world: it has no world\.yaml and no checksums\.json"),
        ("hf://tiny", "owner/name@revision, got 'hf://tiny'"),
        (f"{WORLD}@", "got"),
        (f"{WORLD}@../../../etc/passwd", "got"),
        (f"{WORLD}@a/../b", "got"),
        ("hf://../x", "got"),
        ("hf://ada/tiny/more", "got"),
        ("hf://", "got"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, world: Path, address: str, message: str) -> None:
    hub.commit(REPO, contents(world))
    hub.commit("ada/model", {"model.safetensors": b"0" * 100, "train.py": b""})
    with pytest.raises(HubError, match=message):
        NFDVectorEnv(address)
    assert not any("model.safetensors" in line for line in hub.asked)


def test_no_code_comes_along_or_is_run(hub: Hub, world: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((world / "world.yaml").read_text())
    values["source"]["imports"] = ["evil"]
    (world / "world.yaml").write_text(yaml.safe_dump(values))
    (world / "agents").mkdir()
    for name in ("evil.py", "vizdoom.py", "state.pt", "agents/ppo.zip"):
        (world / name).write_bytes(b"raise SystemExit('run')")
    write_checksums(world)
    hub.commit(REPO, contents(world) | {"agents/ppo.zip": b"", "../evil.yaml": b"", ".x.yaml": b""})
    folder = find_world(WORLD)
    assert not [p for p in folder.rglob("*") if p.suffix in (".py", ".pt", ".zip")]
    load_world(WORLD)
    with pytest.raises(UntrustedWorldError, match="evil"):
        make_real(WORLD)


def test_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="not in the cache, and the hub cannot be reached"):
        load_world(WORLD)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'nfd-env\[hub\]'"):
        load_world(WORLD)


def failed_push(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert cli.main(["push", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_a_push_that_cannot_be_sends_nothing(
    hub: Hub, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    art = ("--art-license", "mine")
    assert "ASSET_LICENSES.md" in failed_push(capsys, world, REPO)
    assert "neither a world folder nor a run" in failed_push(capsys, tmp_path / "x", REPO, *art)
    assert "owner/name" in failed_push(capsys, world, "tiny", *art)
    commit = f"{REPO}@{'0' * 40}"
    assert "cannot be changed" in failed_push(capsys, world, commit, *art)
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        assert "may not be written by you: `hf auth login`" in failed_push(
            capsys, world, REPO, *art
        )
    (world / "heads.safetensors").write_bytes(b"")
    assert "heads.safetensors: damaged" in failed_push(capsys, world, REPO, *art)
    assert REPO not in hub.branches


def test_a_repository_of_something_else_is_left_alone(hub: Hub, world: Path, capsys: Any) -> None:
    hub.commit(REPO, {"model.bin": b"1", "README.md": b"mine"})
    said = failed_push(capsys, world, REPO, "--art-license", "mine")
    assert "in the way: it holds no world but model.bin" in said
    assert hub.newest(REPO)["README.md"] == b"mine"


def test_a_newer_world_takes_the_place_of_the_older_one(hub: Hub, world: Path) -> None:
    older = contents(world) | {"teacher.safetensors": b"old", "card/film.gif": b"", "more.txt": b""}
    hub.commit(REPO, older)
    (world / "ASSET_LICENSES.md").write_text("# Art\nDots: CC0.\n")
    write_checksums(world)
    assert cli.main(["push", str(world), f"{REPO}@next"]) == 0
    sent = hub.newest(REPO, "next")
    assert "teacher.safetensors" not in sent and "card/film.gif" not in sent
    assert sent["more.txt"] == b"" and b"Dots: CC0." in sent["README.md"]
    assert sent["ASSET_LICENSES.md"] == b"# Art\nDots: CC0.\n"
    assert hub.newest(REPO) == older
    load_world(f"{WORLD}@next")


def test_the_card_quotes_the_report_of_the_run(hub: Hub, world: Path, tmp_path: Path) -> None:
    report = {"horizon": 8, "psnr": 22.213, "sharpness_ratio": float("nan")}
    actions = {"metric": "F1", "generated": 0.8, "real": 0.9, "reencoded": 0.9, "shuffled": 0.1}
    actions |= {"chance": 0.1, "relative": 0.93, "windows": 64, "horizon": 32, "parts": []}
    gates = {"made_from": "", "gates": ["ok      a", "FAILED  b"], "extra": actions}
    (tmp_path / "report.yaml").write_text(yaml.safe_dump({"comparisons": [report]}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"report": gates}))
    made = {"recordings": {"frames": 5000, "episodes": 7, "policies": {"a|b": {"frames": 5000}}}}
    made |= {
        "stages": {"tokenizer": {"steps": 30, "wall_seconds": 120, "validation": {"psnr": 30.5}}}
    }
    (world / "provenance.yaml").write_text(yaml.safe_dump(made))
    write_checksums(world)
    page = tmp_path / "page"
    arguments = ["push", str(tmp_path), REPO, "--art-license", "mine", "--preview", str(page)]
    assert cli.main(arguments) == 0 and REPO not in hub.branches
    text = (page / "README.md").read_text()
    for part in (
        "| 8 | 22.21 | – | – | – | – | – | – |",
        "Not good enough: 1 of 2 gates failed.",
        "0.93 of what can be read",
        "5,000 frames in 7 episodes",
        "| a b | – | 5000 | – |",
        "| tokenizer | 30 | 2 | psnr 30.5 |",
    ):
        assert part in text, text
    assert (page / "card/frames.png").is_file()


def test_the_command_line_in_a_process_of_its_own(hub: Hub, world: Path, tmp_path: Path) -> None:
    """With the variables that users set, and read when the library is imported."""
    hub.commit(REPO, contents(world))
    program = (
        "import gymnasium; env = gymnasium.make('nfd_env:NFD/World-v0', world='hf://ada/tiny'); "
        "env.reset(seed=0); print(env.step(1)[0].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "(32, 48, 3)", done.stderr


def test_addresses() -> None:
    assert str(parse_address("ada/tiny@main")) == WORLD
    assert str(parse_address("hf://ada/ti.ny@refs/pr/1")) == "hf://ada/ti.ny@refs/pr/1"
