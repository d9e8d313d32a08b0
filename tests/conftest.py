"""Fixtures that are costly enough to be made once."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from nfd_env import config
from nfd_env.precision import PrecisionError, computes_bf16
from nfd_env.worlds.checksums import write_checksums
from tests.counter_env import record_counter_episodes, source
from tests.tiny_world import make_tiny_world

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option for the tests that try drawn inputs (hypothesis)."""
    parser.addoption(
        "--fuzz-examples",
        type=int,
        metavar="N",
        help="examples of each fuzz test, newly drawn in every run; 25 fixed ones without it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The same few inputs in every run, unless more are asked for."""
    count = config.getoption("--fuzz-examples")
    settings.register_profile(
        "nfd_env",
        max_examples=count or 25,
        derandomize=count is None,
        deadline=None,  # a slow machine is no failure
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("nfd_env")
    # The first test that starts this process's fork server decides for all of them what it has
    # imported already.
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["tests.training.rank_command"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, and in one piece.

    So the processes that share the tests end together, and the finished runs of the recipe are
    made by one of them.
    """
    recipe = Path(__file__).parent / "recipe"
    items.sort(key=lambda item: recipe not in item.path.parents)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Tests of bf16 are for processors that can compute in it."""
    try:
        return (yield)
    except PrecisionError as error:
        if computes_bf16(torch.device("cpu")):
            raise
        pytest.skip(f"this processor cannot compute in bf16: {error}")


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny worlds; the same arguments give the same folder. Do not write into them."""
    made: dict[str, Path] = {}

    def make(**kwargs: Any) -> Path:
        key = repr(sorted(kwargs.items()))
        if key not in made:
            made[key] = make_tiny_world(tmp_path_factory.mktemp("worlds") / "tiny", **kwargs)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_world(make_world: Callable[..., Path]) -> Path:
    """The default tiny world: Discrete(3), about one step in 20 ends an episode."""
    return make_world()


@pytest.fixture(scope="session")
def endless_world(make_world: Callable[..., Path]) -> Path:
    """A tiny world whose episodes never terminate."""
    return make_world(hazard_bias=-1000.0)


@pytest.fixture(scope="session")
def distilled_world(make_world: Callable[..., Path]) -> Path:
    """A tiny world with a one-step student and a three-step teacher, whose episodes never end."""
    return make_world(hazard_bias=-1000.0, distilled=True)


@pytest.fixture(scope="session")
def hasty_world(make_world: Callable[..., Path]) -> Path:
    """A tiny world of which about one frame in three ends an episode."""
    return make_world(hazard_bias=-0.5)


@pytest.fixture(scope="session")
def counter_world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny world, with the counter env as the real game behind it."""
    folder = tmp_path_factory.mktemp("worlds") / "counter"
    shutil.copytree(tiny_world, folder)
    values = yaml.safe_load((folder / "world.yaml").read_text())
    values["source"] = config.to_dict(source())
    (folder / "world.yaml").write_text(yaml.safe_dump(values))
    write_checksums(folder)
    return folder


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recorded episodes of the counter env, every fourth held out. Do not write into it."""
    folder = tmp_path_factory.mktemp("recordings")
    record_counter_episodes(folder, episodes=8, validation_every=4, length=44)
    return folder
