"""Imports go one way: the folder listing is the dependency order."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nfd_env"
MODULES = {
    ".".join(("nfd_env", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}

BASE = {
    "nfd_env.config",
    "nfd_env.named",
    "nfd_env.spaces",
    "nfd_env.precision",
    "nfd_env.parts",
    "nfd_env.files",
    "nfd_env.stopping",
    "nfd_env.devices",
    "nfd_env.progress",
    "nfd_env.metrics",
    "nfd_env.video",
}
MODELS = BASE | {"nfd_env.flow", "nfd_env.models"}
INFERENCE = MODELS | {"nfd_env.inference"}
WORLDS = INFERENCE | {"nfd_env.sources", "nfd_env.worlds"}
ENVS = WORLDS | {"nfd_env.envs"}
RECORDINGS = MODELS | {"nfd_env.sources", "nfd_env.data"}
PLAYERS = ENVS | RECORDINGS | {"nfd_env.players"}
TRAINING = WORLDS | RECORDINGS | {"nfd_env.training"}
LEARNING = PLAYERS | TRAINING | {"nfd_env.evaluation", "nfd_env.learning"}

# What each part may import of nfd_env, the most specific name first.
ALLOWED = {
    "nfd_env.config": {"nfd_env.files"},
    "nfd_env.files": set(),
    "nfd_env.stopping": set(),
    "nfd_env.named": set(),
    "nfd_env.spaces": {"nfd_env.config"},
    "nfd_env.precision": set(),
    "nfd_env.parts": set(),
    "nfd_env.devices": set(),
    "nfd_env.progress": set(),
    "nfd_env.metrics": set(),
    "nfd_env.video": {"nfd_env.files"},
    "nfd_env.flow": {"nfd_env.flow", "nfd_env.parts"},
    "nfd_env.models": MODELS,
    "nfd_env.inference": INFERENCE,
    "nfd_env.sources": BASE | {"nfd_env.sources"},
    "nfd_env.worlds": WORLDS,
    "nfd_env.envs": ENVS,
    "nfd_env.data": RECORDINGS,
    "nfd_env.players": PLAYERS,
    "nfd_env.training": TRAINING,
    "nfd_env.evaluation": PLAYERS | TRAINING | {"nfd_env.evaluation"},
    "nfd_env.learning": LEARNING,
    "nfd_env.recipe": LEARNING | {"nfd_env.recipe"},
    # The real game is played from its file.
    "nfd_env.play": PLAYERS | {"nfd_env.play", "nfd_env.recipe.game"},
    "nfd_env.export": PLAYERS | {"nfd_env.play", "nfd_env.export"},
    # Rivals, which the rest finds by name; only their training knows the recipe.
    "nfd_env.baselines": WORLDS | {"nfd_env.baselines"},
    "nfd_env.baselines.stages": TRAINING | {"nfd_env.baselines"},
    "nfd_env.baselines.commands": TRAINING | {"nfd_env.baselines", "nfd_env.recipe"},
    "nfd_env.sb3": ENVS,
    "nfd_env.torchrl": ENVS,
    "nfd_env.cli": {"nfd_env.files"},  # it imports a command's module by name
    "nfd_env.__main__": {"nfd_env.cli"},
    "nfd_env": ENVS,
}
OUTSIDE = {"agents", "examples", "tests"}


def imported(path: Path) -> set[str]:
    """Modules named by import statements, also by those inside functions and type checks."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            # "from nfd_env import config" imports nfd_env.config.
            names |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in MODULES
            }
    return names


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def part_of(module: str) -> str | None:
    fitting = [p for p in ALLOWED if p == module or (p != "nfd_env" and within(module, {p}))]
    return max(fitting, key=len) if fitting else None


def test_there_is_something_to_check() -> None:
    assert {"nfd_env", "nfd_env.flow.path", "nfd_env.envs.vector_env"} <= MODULES.keys()
    assert "nfd_env.models.cache" in imported(MODULES["nfd_env.inference.world_model"])
    assert "nfd_env.config" in imported(MODULES["nfd_env.models.weights"])


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_what_is_above_it(module: str) -> None:
    part = part_of(module)
    assert part is not None, f"{module} has no row"
    for name in imported(MODULES[module]):
        if name.startswith("nfd_env.") or (name == "nfd_env" and part != "nfd_env"):
            # The bare package stands for "from nfd_env import ...", whose names are listed too.
            assert name == "nfd_env" or within(name, ALLOWED[part]), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_never_imports_its_users(module: str) -> None:
    for name in imported(MODULES[module]):
        assert name.split(".")[0] not in OUTSIDE, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("nfd_env.flow")])
def test_the_mathematics_needs_torch_only(module: str) -> None:
    for name in imported(MODULES[module]):
        top = name.split(".")[0]
        assert top in {"torch", "nfd_env"} or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", MODULES)
def test_importing_needs_nothing_that_windows_lacks(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {"fcntl", "grp", "pwd", "resource", "termios"} & set(names), module


def test_opencv_is_imported_where_frames_are_resized_only() -> None:
    """Its libraries are not everywhere."""
    users = [name for name, path in MODULES.items() if "cv2" in imported(path)]
    assert users == ["nfd_env.sources.spec"]


def test_importing_the_package_registers_and_stays_light() -> None:
    program = """
import sys, gymnasium, nfd_env
assert "NFD/World-v0" in gymnasium.registry
heavy = {"torch", "cv2", "safetensors", "omegaconf", "tensordict", "av"} & set(sys.modules)
assert not heavy, heavy
assert set(nfd_env.__all__) <= set(dir(nfd_env)) | set(nfd_env._WHERE)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("first", "chosen", "expected"),
    [
        ("", {}, "10000"),
        ("import torch", {}, None),  # too late
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "PASSIVE"}, None),
    ],
)
def test_threads_spin_for_a_while_only(
    first: str, chosen: dict[str, str], expected: str | None
) -> None:
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    settings = {name: value for name, value in os.environ.items() if name not in names}
    program = f"{first}\nimport os, nfd_env; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**settings, **chosen},
    )
    assert done.stdout.split() == [str(expected)], done.stderr


WITHOUT_OPENCV = """
import importlib, pkgutil, sys, pytest, nfd_env
sys.modules["cv2"] = None
from nfd_env import cli
assert cli.main(["worlds"]) == 0
for module in pkgutil.walk_packages(nfd_env.__path__, "nfd_env."):
    if module.name != "nfd_env.__main__":
        try:
            importlib.import_module(module.name)
        except ImportError as error:  # an extra that is not installed
            assert "cv2" not in str(error), module.name
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


def test_stepping_training_and_serving_need_no_opencv() -> None:
    """Its libraries are not everywhere."""
    tests = (
        "test_smoke.py::test_the_shipped_world_steps_on_the_processor",
        "training/test_stages.py::test_tokenizer",
        "play/test_server.py::test_a_refused_control_is_no_reason_to_part",
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENCV, *(f"tests/{test}" for test in tests)],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names() -> None:
    import nfd_env

    for name in nfd_env.__all__:
        assert getattr(nfd_env, name).__module__.startswith("nfd_env.")
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        nfd_env.bogus  # noqa: B018
