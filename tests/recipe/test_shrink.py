from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nfd_env import NFDVectorEnv, cli
from nfd_env.models.weights import fingerprint_of, save_weights
from nfd_env.players.load import agents_of, load_player
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, PolicyConfig
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.clip import Clip, load_clip, save_clip
from nfd_env.worlds.load import load_world
from tests.tiny_world import make_tiny_world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """With a teacher, a clip, a licence and agents that look at features, one of them of others."""
    folder = make_tiny_world(tmp_path / "world", distilled=True)
    env = NFDVectorEnv(folder, 1, obs_type="features", device="cpu", precision="fp32")
    for name in ("one", "two"):
        policy = ActorCritic(PolicyConfig(AgentSpec.of(env, 2), channels=4, width=8))
        spec = replace(policy.config.spec, heads="others") if name == "one" else policy.config.spec
        settings = replace(policy.config, spec=spec)
        save_weights(folder / "agents" / f"{name}.safetensors", policy, settings)
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    save_clip(folder, Clip(frames, np.zeros(4, np.int64)), 10)
    (folder / "ASSET_LICENSES.md").write_text("free")
    write_checksums(folder)
    return folder


def test_a_smaller_world_is_nearly_the_same_and_whole(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    given = "{tokenizer: 6, dynamics: 5, heads: 8}"
    assert (
        cli.main(["shrink", str(world), "-o", str(small), "--bits", given, "--agents", "two"]) == 0
    )
    printed = capsys.readouterr().out
    assert "dynamics   5 bits: its weights are off by" in printed and "MB, from" in printed
    one, other = (sum(p.stat().st_size for p in f.rglob("*")) for f in (world, small))
    assert other < 0.7 * one
    assert load_world(small).spec.teacher is None and not (small / "teacher.safetensors").exists()
    assert load_clip(small).frames.shape == (5, 32, 48, 3)
    assert (small / "ASSET_LICENSES.md").read_text() == "free"
    for name in ("tokenizer", "dynamics", "heads"):
        path = f"{name}.safetensors"
        assert fingerprint_of(small / path) == fingerprint_of(world / path)
    assert yaml.safe_load((small / "provenance.yaml").read_text())["bits"].keys() == {
        "tokenizer", "dynamics", "heads",
    }  # fmt: skip
    envs = [
        NFDVectorEnv(f, 2, obs_type="features", device="cpu", precision="fp32")
        for f in (world, small)
    ]
    assert list(agents_of(small)) == ["two"]
    load_player(agents_of(small)["two"], envs[1])  # fits, although the weights are others
    before, after = (torch.as_tensor(env.reset(seed=0)[0]) for env in envs)
    # Starts are stored as latents: the same. What the rounded networks make of them is near.
    assert 0 < (before - after).norm() / before.norm() < 0.05
    before, after = (torch.as_tensor(env.step(np.zeros(2, np.int64))[0]) for env in envs)
    assert 0 < (before - after).norm() / before.norm() < 0.5


def test_it_keeps_what_it_is_told_to(world: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    given = ["shrink", str(world), "-o", str(small), "--bits", "{teacher: 4}", "--teacher"]
    assert cli.main(given) == 0
    assert list(agents_of(small)) == ["one", "two"]
    assert load_world(small, dynamics="teacher").model.sampling.steps == 3
    with pytest.raises(AgentError, match="on features of the heads others"):  # no more than before
        load_player(agents_of(small)["one"], NFDVectorEnv(small, 1, "cpu", obs_type="features"))
    # A world in its own place, again and again; what is not named stays as it is.
    arguments = ["shrink", str(small), "-o", str(small), "--agents", "one", "--bits"]
    assert cli.main([*arguments, "{dynamics: 5}"]) == 0
    before = load_world(small).model.dynamics.state_dict()
    assert cli.main([*arguments, "{tokenizer: 7}"]) == 0
    assert list(agents_of(small)) == ["one"] and load_clip(small).frames.shape[0] == 5
    after = load_world(small).model.dynamics.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert yaml.safe_load((small / "provenance.yaml").read_text())["bits"]["dynamics"]["bits"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "{dynamics: 3}"], "bits of dynamics must be a whole number from 4 to 8, got 3"),
        (["--bits", "{dynamics: 6.5}"], "got 6.5"),
        (["--bits", "{dynamics: true}"], "got True"),
        (["--bits", "{dynamcs: 6}"], "bits knows .*'dynamcs'"),
        (["--bits", "6"], "must be a YAML mapping"),
        (["--bits", "{teacher: 6}"], "bits names the teacher, which the copy does not have"),
        (["--agents", "three"], "has no agent 'three', but one, two"),
    ],
)
def test_what_it_refuses(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    small = tmp_path / "small"
    assert cli.main(["shrink", str(world), "-o", str(small), *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("nfd: ") and len(shown.splitlines()) == 1
    assert re.search(message, shown), shown
    assert not small.exists()


def test_a_damaged_agent_ends_it_and_nothing_is_lost(world: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(world, small)
    before = {p.name: p.read_bytes() for p in small.rglob("*") if p.is_file()}
    path = world / "agents" / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["shrink", str(world), "-o", str(small)]) == 1
    assert {p.name: p.read_bytes() for p in small.rglob("*") if p.is_file()} == before
