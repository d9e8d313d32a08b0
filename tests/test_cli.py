"""The console script as it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nfd_env
from nfd_env import cli
from nfd_env.worlds.load import UnknownWorldError, find_world

SCRIPT = Path(sys.executable).with_name("nfd")


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
def test_policies_are_found_in_the_folder_that_it_is_started_in(tmp_path: Path) -> None:
    (tmp_path / "my_policies.py").write_text("class Mine: ...\n")
    command = [str(SCRIPT), "eval-agent", "my_policies:Absent"]
    command += ["--world", "DoomTakeCover", "--real-only"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    # The module has been imported: only the class is missing.
    assert result.returncode == 1
    assert "module 'my_policies' has no attribute 'Absent'" in result.stderr


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("module", ["nfd_env", "nfd_env.cli"])
def test_the_command_is_a_module_too_and_knows_its_version(module: str) -> None:
    result = run("-m", module, "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().split() == ["nfd", nfd_env.__version__]


@pytest.mark.parametrize("command", [["nfd"], ["-m", "nfd_env"], ["-m", "nfd_env.cli"]])
def test_modules_that_lie_about_are_not_run(tmp_path: Path, command: list[str]) -> None:
    for name in ("gymnasium", "omegaconf", "numpy", "yaml", "tyro", "typing", "crafter"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}.mark', 'w')\nraise SystemExit(7)\n")
    if command == ["nfd"]:
        command = [str(Path(sys.executable).with_name("nfd"))]
        if not Path(command[0]).exists():
            pytest.skip("the package is not installed")
    root = str(Path(__file__).parents[1])
    program = subprocess.run(
        [*([] if len(command) == 1 else [sys.executable]), *command, "worlds"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert program.returncode == 0, program.stderr
    assert not list(tmp_path.glob("*.mark"))


@pytest.mark.parametrize("encoding", ["cp932", "ascii", "latin-1", "utf-8"])
def test_it_prints_on_every_terminal(encoding: str) -> None:
    program = "from nfd_env import cli; cli.main(['worlds']); print('512³ 1.5× ± → ™')"
    result = run("-c", program, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    shown = "512³ 1.5× ± → ™".encode(encoding, "replace").decode(encoding)
    assert result.stdout.decode(encoding).splitlines()[-1] == shown


def test_folders_beyond_the_locale(tmp_path: Path) -> None:
    """A file system in UTF-8 under a locale of ASCII: names are bytes that have no characters."""
    out = str(tmp_path / "w\u00f6rld \u65e5")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = ["-m", "nfd_env", "demo", "--seconds", "0.1", "--device", "cpu", "--out", out]
    result = run(*command, OMP_NUM_THREADS="1", **locale)
    assert result.returncode == 0, result.stderr
    assert {path.suffix for path in Path(out).iterdir()} >= {".mp4", ".png"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_shows_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "-h"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: nfd {name}" in shown and "--help" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("given", ["worlds", "--version"])
def test_output_that_cannot_arrive(given: str, buffered: str) -> None:
    command = [sys.executable, "-m", "nfd_env", given]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=120
        )
    assert result.returncode == 1
    assert result.stderr == "nfd: the output cannot be written: No space left on device\n"
    reading, writing = os.pipe()  # of somebody who has seen enough
    os.close(reading)
    result = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=120
    )
    os.close(writing)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_a_folder_that_is_not_there_any_more(tmp_path: Path) -> None:
    program = (
        "import os, sys; from nfd_env import cli; os.mkdir(sys.argv[1]); os.chdir(sys.argv[1]); "
        "os.rmdir(sys.argv[1]); sys.exit(cli.main(['demo']))"
    )
    result = run("-c", program, str(tmp_path / "gone"))
    assert result.returncode == 1
    shown = result.stderr.decode()
    assert shown.startswith("nfd: the current folder is not there any more"), shown
    assert shown.count("\n") == 1


def test_unknown_commands_and_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--secnods", "3"])
    assert stopped.value.code == 2
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    ["g.yaml a.b=1 c=2 --minutes 3", "--minutes 3 g.yaml --keep-going a.b=1 c=2",
     "a.b=1 --keep-going g.yaml c=2 --minutes=3", "g.yaml --minutes 3 a.b=1 --stage flow c=2"],
)  # fmt: skip
def test_overrides_may_stand_anywhere(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nfd_env.recipe import game

    seen: list[object] = []

    def load(path: str, overrides: tuple[str, ...], minutes: float, device: None) -> None:
        seen.extend((path, overrides, minutes))
        raise ValueError("enough")

    monkeypatch.setattr(game, "load_game", load)
    assert cli.main(["train", *arguments.split()]) == 1
    assert seen == ["g.yaml", ("a.b=1", "c=2"), 3.0]


def test_errors_are_one_line_and_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "no-such-world"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("nfd: unknown world 'no-such-world'") and shown.count("\n") == 1
    with pytest.raises(ValueError, match="no-such-world"):
        cli.main(["bench", "no-such-world", "--debug"])


def test_listing_worlds_needs_nothing_heavy() -> None:
    program = (
        "import sys; from nfd_env import cli; cli.main(['worlds']); "
        "print({'torch', 'cv2', 'pygame', 'aiohttp'} & set(sys.modules))"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("demo --seconds 0", "--seconds must be above 0 and finite, got 0"),
        ("demo --seconds nan", "--seconds must be above 0 and finite, got nan"),
        ("bench --seconds inf", "--seconds must be above 0 and finite, got inf"),
        ("bench --seconds -3", "--seconds must be above 0 and finite, got -3"),
        ("bench --long-frames -1", "--long-frames must be at least 0"),
        ("bench --batches 1 8 0", "num_envs must be a whole number of at least 1, got 0"),
        ("bench --batches", "there are no batches to measure"),
        ("bench --speculative-frames 0", "speculative_frames must be"),
        ("bench --agent random", "--agent gives the actions of --compare"),
        ("bench --compare --agent nobody --device cpu", "unknown agent 'nobody'"),
        ("bench --compare --num-envs 0 --device cpu", "num_envs must be a whole number"),
        ("eval --steps 2 --inverse-dynamics n", "--inverse-dynamics reads no actions"),
        ("init CartPole-v1 --kwargs {", "--kwargs: cannot be read as YAML"),
        ("init CartPole-v1 --kwargs 3", "kwargs must be a YAML mapping"),
        ("eval-agent random,a={", "random: a: cannot be read as YAML"),
        (f"eval-agent random,a={'[' * 10_000}", "nested deeper than 64 levels"),
        ("eval-agent random --episodes 0", "episodes must be at least 1"),
        ("serve --port 70000 --device cpu", "port"),
        ("serve --idle-seconds nan --device cpu", "idle"),
        ("serve --max-clients 0 --device cpu", "clients"),
        ("play --scale nan --device cpu", "scale must be from 0.1 to 20, got nan"),
        ("play --max-frames 0 --device cpu", "max_frames must be at least 1, got 0"),
    ],
    ids=lambda value: value[:30],
)
def test_arguments_that_cannot_be(
    command: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def worked(*arguments: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("nfd_env.envs.vector_env.NFDVectorEnv.step", worked)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    try:
        status = cli.main(command.split())
    except SystemExit as stopped:  # said by tyro, in a frame
        status = stopped.code
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status in (1, 2) and message in shown and "Traceback" not in shown, shown


def test_a_file_that_is_not_there_is_said_without_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp")
    assert cli.main(["serve", "--token-file", str(tmp_path / "nope")]) == 1
    assert capsys.readouterr().err == f"nfd: {tmp_path}/nope: No such file or directory\n"


@pytest.mark.parametrize(
    "command",
    [
        ["export-onnx", "WORLD", "-o", "OUT"],
        ["export-web", "WORLD", "-o", "OUT"],
        ["init", "CartPole-v1", "-o", "OUT.yaml"],
        ["push", "WORLD", "me/world", "--preview", "OUT"],
        ["demo", "WORLD", "--out", "OUT"],
        ["demo", "WORLD", "--gif", "OUT.gif"],
        ["eval-agent", "random", "--world", "WORLD", "--out", "OUT"],
        ["rank", "random", "random", "random", "--world", "WORLD", "--out", "OUT"],
        ["bench", "WORLD", "--markdown-into", "/proc/self/status"],
        ["collect", "GAME", "folder=OUT"],
        ["train", "GAME", "folder=OUT"],
        ["serve", "WORLD", "--save", "OUT", "--port", "0"],
        ["play", "WORLD", "--record", "OUT.mp4"],
        ["play", "WORLD", "--save", "OUT"],
    ],
    ids=lambda command: " ".join(command[:2] + command[-2:-1]),
)
def test_what_cannot_be_written_is_told_before_the_work(
    command: list[str],
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def worked(*arguments: object, **others: object) -> None:
        raise AssertionError("the work has begun")

    for name in (
        *("nfd_env.export.page.load_world", "nfd_env.recipe.inspect.inspect_game"),
        *("nfd_env.recipe.card.make_card", "nfd_env.evaluation.demo.load_world"),
        *("nfd_env.evaluation.agents.find_agent", "nfd_env.evaluation.ranking.find_agent"),
        *("nfd_env.evaluation.commands.load_world", "nfd_env.data.worker.record_episode"),
        *("nfd_env.recipe.run.collect", "nfd_env.play.slots.load_world"),
    ):
        monkeypatch.setattr(name, worked, raising=False)
    monkeypatch.chdir(tmp_path)
    game = tmp_path / "game.yaml"
    game.write_text("name: Pole\nsource: {env_id: CartPole-v1, frames: render, size: [32, 48]}\n")
    (tmp_path / "file").touch()
    names = {"WORLD": str(tiny_world), "OUT": str(tmp_path / "file" / "x"), "GAME": str(game)}
    if command[0] == "play":
        pytest.importorskip("pygame")
    for name, value in names.items():
        command = [argument.replace(name, value) for argument in command]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("file" in said or "/proc" in said), said
    assert {p.name for p in tmp_path.iterdir()} == {"file", "game.yaml"}


def test_a_world_goes_by_its_env_id_too() -> None:
    for name in ("NFD/BigFish-v0", "nfd_env:NFD/BigFish-v0", "BigFish", "big_fish"):
        assert find_world(name) == find_world("BigFish")
    for name, said in (
        ("NFD/World-v0", "an env of any world: name the world"),
        ("NFD/Nothing-v0", "unknown world .*big_fish"),
        ("NFD/BigFish-v1", "unknown world"),
    ):
        with pytest.raises(UnknownWorldError, match=said):
            find_world(name)
