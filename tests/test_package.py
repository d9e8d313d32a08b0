"""What a user of pip gets: the files of wheel and source distribution, the public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nfd_env

ROOT = Path(__file__).parents[1]


def files_below(folder: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return {n for n in names if "__pycache__" not in n and not Path(n).name.startswith(".")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The files that setuptools would put into the wheel, and into the source distribution."""
    pytest.importorskip("setuptools")
    program = """if True:
        import sys
        from pathlib import Path
        from setuptools import Distribution
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(["pyproject.toml"])
        information = distribution.get_command_obj("egg_info")
        information.egg_base = sys.argv[1]
        information.ensure_finalized()
        information.run()
        build = distribution.get_command_obj("build_py")
        build.build_lib = sys.argv[1]
        build.ensure_finalized()
        for _, _, source in build.find_all_modules():
            print("wheel", Path(source).as_posix())
        for _, folder, _, names in build.data_files:
            for name in names:
                print("wheel", (Path(folder) / name).as_posix())
        for name in information.filelist.files:
            print("source", Path(name).as_posix())
    """
    temporary = str(tmp_path_factory.mktemp("packed"))
    command = [sys.executable, "-c", program, temporary]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    files: dict[str, set[str]] = {"wheel": set(), "source": set()}
    for line in result.stdout.splitlines():
        kind, _, name = line.partition(" ")
        if kind in files:
            files[kind].add(name)
    return files


def test_the_wheel_has_every_file_of_the_package(packed: dict[str, set[str]]) -> None:
    here = files_below("nfd_env")
    assert {"nfd_env/py.typed", "nfd_env/play/web/static/index.html"} <= here
    assert "nfd_env/export/static/worker.js" in here
    assert "nfd_env/worlds/doom_take_cover/agents/doom_take_cover_features.safetensors" in here
    assert here - packed["wheel"] == set()


def test_the_wheel_has_nothing_else(packed: dict[str, set[str]]) -> None:
    assert {name.split("/")[0] for name in packed["wheel"]} == {"nfd_env"}


@pytest.mark.parametrize("folder", ["nfd_env", "agents", "configs", "docs", "examples", "tests"])
def test_the_source_distribution_is_the_repository(
    packed: dict[str, set[str]], folder: str
) -> None:
    assert files_below(folder) - packed["source"] == set()


def test_the_public_names_are_shown_and_there() -> None:
    shown = {"NFDEnv", "NFDVectorEnv", "World", "__version__", "load_world", "make_real"}
    assert set(dir(nfd_env)) == shown == {*nfd_env.__all__, "__version__"}
    for name in nfd_env.__all__:
        assert getattr(nfd_env, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        nfd_env.absent  # noqa: B018


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nfd_env.__version__
    assert f"## {nfd_env.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
