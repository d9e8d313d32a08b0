from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nfd_env.cli import main
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation import streams
from nfd_env.evaluation.benchmark import benchmark, format_report
from nfd_env.evaluation.compare import (
    Runner,
    compare,
    compare_frame_skip,
    format_comparison,
    format_frame_skip,
    take_turns,
)
from nfd_env.evaluation.streams import ActionStream
from nfd_env.named import UntrustedError
from nfd_env.worlds.load import load_world


def env(world: Path, num_envs: int = 2, **kwargs: Any) -> NFDVectorEnv:
    return NFDVectorEnv(world, num_envs, "cpu", precision="fp32", obs_type="latent", **kwargs)


def runs(column: np.ndarray) -> list[int]:
    """Lengths of the stretches of equal values."""
    edges = np.flatnonzero(np.diff(column)) + 1
    return np.diff(np.concatenate(([0], edges, [len(column)]))).tolist()


def test_streams(endless_world: Path) -> None:
    world = env(endless_world, 3)
    made = {}
    for name in ("held keys", "agent", "random"):
        stream, again = (ActionStream(name, world, seed=4) for _ in range(2))
        actions = np.stack([stream.next(None).copy() for _ in range(600)])
        assert np.array_equal(actions, np.stack([again.next(None).copy() for _ in range(600)]))
        assert set(actions.ravel()) == {0, 1, 2}
        assert not np.array_equal(actions[:, 0], actions[:, 1])
        made[name] = actions
    held = [n for row in range(3) for n in runs(made["held keys"][:, row])[:-1]]
    # The same action can be drawn twice in a row.
    assert min(held) >= 5 and 12 < np.mean(held) < 30
    assert 1.3 < np.mean(runs(made["random"][:, 0])) < 1.7
    assert np.mean(runs(made["agent"][:, 0])) < np.mean(held)


class Follows:
    """A policy for ``--agent`` that presses what the frame's first pixel says."""

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        pass

    def act(self, observation: np.ndarray) -> int:
        assert observation.shape == (32, 48, 3)
        return int(observation[0, 0, 0]) % 3


def test_an_agent_sees_the_frames(endless_world: Path) -> None:
    world = NFDVectorEnv(endless_world, 2, "cpu", precision="fp32")
    stream = ActionStream("agent", world, "tests.evaluation.test_compare:Follows")
    observation, _ = world.reset(seed=0)
    for _ in range(5):
        actions = stream.next(observation)
        assert actions.tolist() == (observation[:, 0, 0, 0] % 3).tolist()
        observation = world.step(actions)[0]


@pytest.mark.parametrize("shown", ["rgb", "latent", "features"])
def test_an_agent_sees_what_it_was_trained_on_and_decides_as_often(
    endless_world: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    seen: list[tuple[int, ...]] = []

    class Trained:
        spec = SimpleNamespace(obs_type=shown, frame_skip=4)

        def reset(self, n: int, seed: int | None = None) -> None:
            self.n = n

        def act(self, observations: np.ndarray, first: Any = None) -> np.ndarray:
            seen.append(observations.shape)
            return np.full(self.n, len(seen) % 3)

    monkeypatch.setattr(streams, "load_player", lambda agent, env, trust, check: Trained())
    world = env(endless_world, 2)
    stream = ActionStream("agent", world, "agent.zip")
    observation, _ = world.reset(seed=0)
    made = []
    for _ in range(8):
        made.append(int(stream.next(observation)[0]))
        observation = world.step(np.array([made[-1]] * 2))[0]
    assert made == [1] * 4 + [2] * 4
    shapes = {"rgb": (2, 32, 48, 3), "latent": (2, 4, 4, 6), "features": (2, 96 + 16)}
    assert seen == [shapes[shown]] * 2


@pytest.mark.parametrize("trust", [False, True])
def test_the_author_of_an_agent_may_be_trusted(
    endless_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip at all")
    reason = "a.zip.*" if trust else "--trust on the command line"
    with pytest.raises(ValueError, match=reason) as error:
        Runner(env(endless_world), "agent", str(tmp_path / "a.zip"), trust)
    assert isinstance(error.value, UntrustedError) is not trust
    asked: list[bool] = []

    def compare(*args: Any, trust: bool, **kwargs: Any) -> None:
        asked.append(trust)
        raise ValueError("enough")

    monkeypatch.setattr("nfd_env.evaluation.compare.compare", compare)
    command = ["bench", str(endless_world), "--compare", "--agent", "a.zip", "--device", "cpu"]
    assert main([*command, *(["--trust"] if trust else [])]) == 1
    assert asked == [trust]


def test_unknown_streams_and_agents(endless_world: Path) -> None:
    with pytest.raises(ValueError, match="the action streams are held keys, agent, random"):
        ActionStream("wild", env(endless_world))
    with pytest.raises(ValueError, match="no_such"):
        ActionStream("agent", env(endless_world), "no_such.module:Agent")


def test_measurements_take_turns() -> None:
    calls: list[str] = []

    def quick() -> float:
        calls.append("quick")
        return 0.01

    def slow() -> float:
        calls.append("slow")
        return 0.2

    take_turns([quick, slow], seconds=0.4, rounds=8)
    assert calls.count("quick") in range(40, 49) and calls.count("slow") == 8
    # Each round begins with another one.
    assert calls[:6] == ["quick"] * 5 + ["slow"] and calls[6] == "slow"


def test_compare(distilled_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfd_env.evaluation.compare.multiplies_bf16", lambda device: True)
    world = load_world(distilled_world, "cpu", "fp32")
    report = compare(world, (5, 1), (2,), seconds=0.05)
    rows = report.rows
    assert [(r.steps, r.cache, r.dynamics, r.speculative_frames) for r in rows] == [
        (18, "plain fp32", "teacher", 1),
        (18, "plain bf16", "teacher", 1),
        (18, "refilled", "teacher", 1),
        (5, "ring", "teacher", 1),
        (1, "ring", "student", 1),
        *[(1, "ring", "student", 2)] * 3,
    ]
    assert [r.sampler for r in rows[2:5]] == ["euler", "euler", "consistency"]
    assert [r.stream for r in rows[5:]] == ["held keys", "agent", "random"]
    # 18 steps and a window against one pass: no machine is noisy enough to hide that.
    assert rows[4].over_refilled > 3 and rows[4].over_plain_refilled > 3
    assert rows[2].over_refilled == 1
    assert max(r.over_plain_refilled for r in rows[:2]) == 1
    for row in rows[5:]:
        assert row.acceptance is not None and row.frames_without_a_pass is not None
        assert 0 <= row.acceptance <= 1 and 0 <= row.frames_without_a_pass <= 0.55
        ratio = row.frames_per_second / rows[4].frames_per_second
        assert row.over_no_speculation == pytest.approx(ratio)
    text = format_comparison(report)
    assert text.count("\n| 1 (student, consistency) |") == 4
    assert "| plain PyTorch bf16, refilled |" in text and "over plain refilled" in text
    json.dumps(asdict(report))


def test_compare_in_a_world_with_one_network_and_without_bf16(
    endless_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfd_env.evaluation.compare.multiplies_bf16", lambda device: False)
    report = compare(load_world(endless_world, "cpu", "fp32"), (2,), (), seconds=0.01)
    assert [r.cache for r in report.rows] == ["plain fp32", "refilled", "ring"]
    assert [r.dynamics for r in report.rows] == ["flow"] * 3
    assert "Speculation" not in format_comparison(report)


def test_compare_frame_skip(distilled_world: Path) -> None:
    world = load_world(distilled_world, "cpu", "fp32")
    report = compare_frame_skip(world, 4, seconds=0.02)
    assert [(r.frames_per_pass, r.passes) for r in report.rows] == [(1, 4), (2, 2), (4, 1)]
    # Every draft is for frames of the same action.
    assert all(r.acceptance == 1 for r in report.rows[1:])
    assert report.rows[0].over_one_by_one == 1
    assert "| 4 | 1 |" in format_frame_skip(report)
    with pytest.raises(ValueError, match="frame skip of 1"):
        compare_frame_skip(world, 1)


def test_bench_shows_the_acceptance(endless_world: Path) -> None:
    world = load_world(endless_world, "cpu", "fp32")
    report = benchmark(world, 1, (1,), 0.05, 0, speculative_frames=2)
    acceptance = report.envs[1].acceptance
    assert acceptance is not None and 0 <= acceptance <= 1
    assert f"{acceptance:.2f} (1)" in format_report(report)
    plain = benchmark(world, 1, (1,), 0.02, 0)
    assert plain.envs[1].acceptance is None and "Speculation" not in format_report(plain)


def test_bench_of_sizes_that_nobody_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = tmp_path / "small.yaml"
    sizes.write_text(
        "{latent_channels: 4, latent_height: 2, latent_width: 4, action_width: 5, width: 32, "
        "layers: 2, heads: 2, window: 4}"
    )
    command = ["bench", "--untrained", str(sizes), "--seconds", "0.02", "--long-frames", "0"]
    command += ["--device", "cpu", "--precision", "fp32", "--batches", "1", "3"]
    assert main(command) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("Untrained small (0.1 M parameters) on ")
    assert "4 sampling steps" in title
    assert [row.split("|")[1].strip() for row in rows[3:]] == ["1", "3"]
    assert main([*command, "--sampling-steps", "1"]) == 0
    assert "1 sampling steps" in capsys.readouterr().out
    assert main(["bench", "Elsewhere", *command[1:]]) == 1
    assert "not both" in capsys.readouterr().err
    sizes.write_text("{widht: 32}")
    assert main(command) == 1
    assert "widht" in capsys.readouterr().err


def test_tables_go_into_a_document(
    distilled_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    markers = ("<!-- begin bench-frame-skip -->", "<!-- end bench-frame-skip -->")
    document.write_text(f"Before.\n{markers[0]}\nold\n{markers[1]}\nAfter.\n")
    command = ["bench", str(distilled_world), "--frame-skip", "2", "--seconds", "0.01"]
    command += ["--device", "cpu", "--precision", "fp32"]
    for _ in range(2):
        assert main([*command, "--markdown-into", str(document)]) == 0
        printed = capsys.readouterr().out.strip()
        assert document.read_text() == (f"Before.\n{markers[0]}\n{printed}\n{markers[1]}\nAfter.\n")
    assert "frames drawn jointly" in printed


@pytest.mark.parametrize(
    "text", ["", "<!-- begin bench -->", "<!-- end bench --> <!-- begin bench -->"]
)
def test_a_document_without_markers(
    text: str, distilled_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    command = ["bench", str(distilled_world), "--seconds", "1000", "--markdown-into"]
    assert main([*command, str(document)]) == 1
    assert "<!-- begin bench --> and <!-- end bench -->" in capsys.readouterr().err
    assert document.read_text() == text


def test_markers_of_ones_own(tmp_path: Path, distilled_world: Path) -> None:
    document = tmp_path / "notes.md"
    document.write_text("<!-- begin mine --><!-- end mine -->")
    command = ["bench", str(distilled_world), "--frame-skip", "2", "--seconds", "0.01"]
    command += ["--markdown-into", str(document), "--markdown-name", "mine", "--json"]
    assert main(command) == 0
    assert "frames drawn jointly" in document.read_text()
