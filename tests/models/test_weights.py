from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nfd_env.models import weights
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import (
    CheckpointError,
    load_weights,
    save_weights,
    with_int8_weights,
)
from tests.models.small import random_frames, small_dynamics


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network = small_dynamics()
    save_weights(tmp_path / "a.safetensors", network, network.config)
    return tmp_path / "a.safetensors"


def load(path: Path) -> Dynamics:
    return load_weights(path, Dynamics, DynamicsConfig)


def test_round_trip(saved: Path) -> None:
    network, loaded = small_dynamics(), load(saved)
    assert loaded.config == network.config
    assert not loaded.training
    assert network.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    inputs = random_frames(1, 3)
    assert torch.equal(loaded(*inputs), network(*inputs))


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "half.safetensors"
    network = small_dynamics()
    save_weights(path, network, network.config, torch.float16)
    assert path.stat().st_size < 0.6 * saved.stat().st_size
    loaded = load(path)
    for name, tensor in network.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())


def test_integer_buffers_survive_half_precision(tmp_path: Path) -> None:
    settings = TokenizerConfig([8], [8], 2)
    tokenizer = Tokenizer(settings)
    tokenizer.normalise.num_batches_tracked.fill_(100_001)
    save_weights(tmp_path / "t.safetensors", tokenizer, settings, torch.float16)
    loaded = load_weights(tmp_path / "t.safetensors", Tokenizer, TokenizerConfig)
    assert loaded.normalise.num_batches_tracked.item() == 100_001


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.safetensors: no such checkpoint"):
        load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="a.safetensors: damaged"):
        load(saved)


def test_not_a_safetensors_file(saved: Path) -> None:
    torch.save({"a": torch.zeros(3)}, saved)
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load(saved)


def test_foreign_safetensors(saved: Path) -> None:
    save_file({"a": torch.zeros(3)}, saved)
    with pytest.raises(CheckpointError, match="foreign checkpoint"):
        load(saved)


@pytest.mark.parametrize("config", [None, "{", '{"bogus": 1}'])
def test_a_header_without_a_usable_config(saved: Path, config: str | None) -> None:
    header = {"class": "Dynamics"} | ({} if config is None else {"config": config})
    save_file(load_file(saved), saved, metadata=header)
    with pytest.raises(CheckpointError, match="a.safetensors: holds no usable config"):
        load(saved)


def test_another_network(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Dynamics, not a Heads"):
        load_weights(saved, Heads, HeadsConfig)


def test_weights_that_do_not_fit_their_config(saved: Path) -> None:
    tensors = load_file(saved)
    header = {"class": "Dynamics", "config": json.dumps({"width": 64})}
    save_file(tensors, saved, metadata=header)
    with pytest.raises(CheckpointError, match="does not fit its own config"):
        load(saved)


def test_an_interrupted_write_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupted(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(saved, small_dynamics(), DynamicsConfig())
    assert saved.read_bytes() == before


def test_int8_takes_a_quarter_and_is_as_exact_as_it_says(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "int8.safetensors"
    network = small_dynamics()
    save_weights(path, network, network.config, torch.float16, int8=True)
    assert path.stat().st_size < 0.4 * saved.stat().st_size
    loaded, before = load(path).state_dict(), network.state_dict()
    rounded = with_int8_weights(network).state_dict()
    assert loaded.keys() == before.keys() == rounded.keys()
    matrices = 0
    for name, tensor in before.items():
        if tensor.ndim < 2 or tensor[0].numel() < 16:  # scales would take as much
            assert torch.equal(loaded[name], tensor.half().float())
            continue
        matrices += 1
        assert torch.equal(loaded[name], rounded[name])
        largest = tensor.abs().amax(1, keepdim=True)
        assert ((loaded[name] - tensor).abs() <= largest / 253).all()
        assert not torch.equal(loaded[name], tensor)
    assert matrices > 10
    # What was rounded once stays as it is.
    again = with_int8_weights(with_int8_weights(network)).state_dict()
    for name, tensor in rounded.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)


def test_int8_kernels_and_rows_of_zeros(tmp_path: Path) -> None:
    settings = TokenizerConfig([8, 16], [8, 16], 4)
    tokenizer = Tokenizer(settings).eval()
    with torch.no_grad():
        tokenizer.decoder[0].weight[1] = 0
    save_weights(tmp_path / "t.safetensors", tokenizer, settings, int8=True)
    loaded = load_weights(tmp_path / "t.safetensors", Tokenizer, TokenizerConfig)
    assert not loaded.decoder[0].weight[1].any()
    frames = torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        one, other = (t.decode(t.encode_frames(frames)) for t in (tokenizer, loaded))
    assert 0 < (one - other).norm() / one.norm() < 0.05


def test_a_scale_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    network = small_dynamics()
    save_weights(path, network, network.config, int8=True)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["output.weight"]
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match="output.weight"):
        load(path)
