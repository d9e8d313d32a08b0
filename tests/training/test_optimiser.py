"""Muon for hidden matrices, AdamW for the rest, under the loop's promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nfd_env.models.weights import CheckpointError
from nfd_env.training.loop import train
from nfd_env.training.optimiser import Optimiser, has_muon
from tests.training.test_loop import TinyStage, assert_same, settings, weights

pytest.importorskip("tensorboard")
needs_muon = pytest.mark.skipif(not has_muon(), reason="torch 2.9 or later has Muon")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)])
        self.output = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


class Stage(TinyStage):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        torch.manual_seed(1)
        self.network = Net()


@needs_muon
def test_a_processor_without_bf16_gets_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(bf16: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
        monkeypatch.setattr("nfd_env.training.optimiser.multiplies_bf16", lambda device: bf16)
        # Torch's steps with all the digits, to be compared with.
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        torch.manual_seed(0)
        network, inputs = Net(), torch.randn(16, 4)
        network.blocks.append(nn.Linear(8, 5, bias=False))
        network.blocks.append(nn.Linear(5, 8, bias=False))
        optimiser = Optimiser(network, "muon", 0.1)
        kinds = [type(part).__name__ for part in optimiser._parts]
        for _ in range(4):
            optimiser.zero_grad()
            x = network.embed(inputs)
            (
                network.blocks[4](network.blocks[3](network.blocks[0](x))) - 1
            ).square().mean().backward()
            optimiser.step(0.02)
        return {n: p.detach() for n, p in network.named_parameters()}, kinds

    (mine, kinds), (torchs, others) = trained(False), trained(True)
    assert kinds[1] != others[1] == "Muon"
    for name, value in torchs.items():
        assert torch.allclose(mine[name], value, rtol=1e-4, atol=1e-5), name


@needs_muon
def test_what_muon_is_for() -> None:
    torch.manual_seed(0)
    network = Net()
    optimiser = Optimiser(network, "muon", 0.0)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    network(torch.randn(16, 4)).square().mean().backward()
    optimiser.step(0.01)
    change = {n: p.detach() - before[n] for n, p in network.named_parameters()}
    # Muon's step is nearly orthogonal, about 0.2 x the rate a number; AdamW's first is the rate's.
    assert torch.allclose(change["embed.weight"].abs(), torch.tensor(0.01), rtol=1e-2)
    gradient = network.get_parameter("blocks.0.weight").grad
    assert gradient is not None
    steps, gradients = (torch.linalg.svdvals(x) for x in (change["blocks.0.weight"], gradient))
    assert steps[4] / steps[0] > 0.5 > 2 * gradients[4] / gradients[0]
    rms = change["blocks.0.weight"].square().mean().sqrt().item()
    assert 0.1 * 0.01 < rms < 0.25 * 0.01  # less where the gradient has small singular values


@needs_muon
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path) -> None:
    train(Stage(), settings(tmp_path / "a", optimiser="muon"), progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(Stage(17), settings(tmp_path / "b", optimiser="muon"), progress=False)
    metrics = train(Stage(), settings(tmp_path / "b", optimiser="muon"), progress=False)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert np.isfinite(metrics["mse"])
    with pytest.raises(CheckpointError, match="another optimiser"):
        train(Stage(), settings(tmp_path / "b", steps=40), progress=False)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="adamw or muon, got 'sgd'"):
        settings(tmp_path, optimiser="sgd")
    if has_muon():
        with pytest.raises(ValueError, match="is for transformers"):
            train(TinyStage(), settings(tmp_path / "c", optimiser="muon"), progress=False)
        monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"needs torch 2\.9"):
        Optimiser(Net(), "muon", 0.0)
