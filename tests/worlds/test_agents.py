"""Agents that lie beside the world they were trained in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nfd_env.models.weights import CheckpointError
from nfd_env.players.load import agents_of, find_agent
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.load import find_world
from tests.tiny_world import make_tiny_world

SHIPPED = "doom_take_cover_features"


def test_a_world_that_is_written_again_keeps_its_agents(tmp_path: Path) -> None:
    folder = make_tiny_world(tmp_path / "world")
    (folder / "agents").mkdir()
    shutil.copy(find_agent(SHIPPED), folder / "agents" / "mine.safetensors")
    before = agents_of(folder)["mine"].read_bytes()
    make_tiny_world(folder, seed=1)
    assert agents_of(folder)["mine"].read_bytes() == before


def test_a_damaged_agent_is_noticed_and_a_new_one_is_welcome(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(find_world("DoomTakeCover"), folder)
    path = folder / "agents" / f"{SHIPPED}.safetensors"
    shutil.copy(path, path.with_name("new.safetensors"))
    assert find_agent("new", folder) == str(path.with_name("new.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"agents/{SHIPPED}\.safetensors: damaged"):
        find_agent(SHIPPED, folder)
    write_checksums(folder)
    assert find_agent(SHIPPED, folder) == str(path)
