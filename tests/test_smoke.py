"""A little of everything, quickly: what must work with old dependencies and on other systems."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from nfd_env.cli import main

ID = "nfd_env:NFD/DoomTakeCover-v0"


def step_a_world(device: str) -> None:
    envs = gymnasium.make_vec(ID, num_envs=2, device=device, frame_skip=4)
    first, _ = envs.reset(seed=0)
    assert first.shape == (2, 96, 128, 3) and first.dtype == np.uint8
    later, rewards, *_ = envs.step(np.array([1, 2]))
    assert np.isfinite(rewards).all() and not np.array_equal(first, later)
    again, _ = envs.reset(seed=0)
    assert np.array_equal(first, again)
    envs.close()


def test_the_shipped_world_steps_on_the_processor() -> None:
    step_a_world("cpu")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac with Metal")
def test_the_shipped_world_steps_on_a_mac() -> None:
    step_a_world("mps")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="Metal is there")
def test_metal_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"device='mps'.*device='cpu'"):
        gymnasium.make(ID, device="mps")


def test_other_devices_are_refused() -> None:
    for device in ("meta", "xpu"):
        with pytest.raises(RuntimeError, match="use auto, cpu, cuda, cuda:N or mps"):
            gymnasium.make(ID, device=device)


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worlds"]) == 0 and "DoomTakeCover" in capsys.readouterr().out
    assert main(["demo", "--seconds", "0.2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert any(tmp_path.iterdir())
