"""What a world from somebody else may run: nothing, unless it is a known game or trusted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nfd_env import config
from nfd_env.models.weights import CheckpointError
from nfd_env.named import UntrustedError, check_trusted
from nfd_env.sources.source import SourceError
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.load import load_world, make_real
from nfd_env.worlds.trust import UntrustedWorldError

Downloaded = Callable[..., Path]


@pytest.fixture
def downloaded(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloaded:
    """A world with a source of the tester's choice, beside a module that leaves a mark when run."""
    (tmp_path / "evil_game.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_game", raising=False)

    def make(**source: Any) -> Path:
        folder = tmp_path / "world"
        shutil.copytree(tiny_world, folder)
        path = folder / "world.yaml"
        values = yaml.safe_load(path.read_text())
        values["source"] |= source
        path.write_text(yaml.safe_dump(values))
        write_checksums(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "source",
    [
        {"imports": ["evil_game"]},
        {"imports": ["vizdoom", "evil_game"]},
        {"env_id": "evil_game:CartPole-v1"},
        {"kwargs": {"env": "evil_game:Env"}},
        {"kwargs": {"deep": [{"er": ["evil_game:Env-v0"]}]}},
        {"kwargs": {"scenario_file": "/tmp/evil.cfg"}},
        {"kwargs": {"scenario_file": "../evil.cfg"}},
        {"kwargs": {"scenario_file": "~evil.cfg"}},
        {"kwargs": {"scenario_file": "C:evil.cfg"}},
        {"kwargs": {"..\\evil": 1}},
        {"imports": [""]},
        {"imports": [".evil_game"]},
        {"imports": ["vizdoom;evil_game"]},
        {"imports": ["vizdoom_evil_game"]},
    ],
)
def test_nothing_of_a_downloaded_world_runs(
    downloaded: Downloaded, tmp_path: Path, source: dict[str, Any]
) -> None:
    folder = downloaded(**source)
    with pytest.raises(UntrustedWorldError, match=r"world: the real game of this world.*--trust"):
        make_real(folder)
    load_world(folder)  # the learned world needs no game
    assert not (tmp_path / "mark").exists()
    assert issubclass(UntrustedWorldError, SourceError)


@pytest.mark.parametrize("name", ["crafter.py", "crafter/__init__.py", "crafter/evil.py"])
def test_a_known_name_that_lies_beside_the_world_is_no_package(
    downloaded: Downloaded, tmp_path: Path, name: str
) -> None:
    module = "crafter.evil" if "evil" in name else "crafter"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    with pytest.raises(UntrustedWorldError, match="crafter.*, which is no known package"):
        make_real(downloaded(imports=[module]))
    assert not (tmp_path / "mark").exists()


def test_a_trusted_world_may_import(downloaded: Downloaded, tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    folder = downloaded(imports=["evil_game"])
    make_real(folder, trust=True).close()
    assert (tmp_path / "mark").exists()
    make_real(folder).close()  # it has been imported by now


@pytest.mark.parametrize("trust", ["no", "false", 1, [False]])
def test_only_true_is_trust(downloaded: Downloaded, tmp_path: Path, trust: Any) -> None:
    with pytest.raises(UntrustedWorldError):
        make_real(downloaded(imports=["evil_game"]), trust=trust)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UntrustedError):
        check_trusted("agent.zip", trust)


def test_known_games_need_no_trust(downloaded: Downloaded) -> None:
    folder = downloaded(imports=["gymnasium.envs.classic_control"], kwargs={"max_episode_steps": 9})
    pytest.importorskip("pygame")
    make_real(folder).close()
    make_real("DoomTakeCover") if "vizdoom" in sys.modules else None


@pytest.mark.parametrize(
    "values",
    [
        {"name": "${oc.env:HOME}"},
        {"title": "${oc.env:HOME}"},
        {"description": "a ${name} b"},
        {"fps": "${oc.env:NFD_TEST_FPS}"},
        {"scores": {"a": "${fps}"}},
        {"action_space": {"type": "Discrete", "n": "${oc.env:NFD_TEST_FPS}", "start": 0}},
        {"source": {"env_id": "${oc.env:HOME}"}},
        {"source": {"env_id": "A-v0", "kwargs": {"a": ["${oc.env:HOME}"]}}},
        {"source": {"env_id": "A-v0", "kwargs": {"${oc.env:HOME}": 1}}},
        {"${oc.env:HOME}": 1},
    ],
)
def test_a_world_cannot_ask_for_the_environment(
    downloaded: Downloaded, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.setenv("NFD_TEST_FPS", "3")
    folder = downloaded()
    path = folder / "world.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    write_checksums(folder)
    with pytest.raises(CheckpointError, match=r"world.yaml.*\$\{...\} is not allowed here"):
        load_world(folder)
    with pytest.raises(CheckpointError, match="not allowed here"):
        make_real(folder, trust=True)
    with pytest.raises(config.ConfigError):
        config.from_mapping(dict, values, foreign=True)
