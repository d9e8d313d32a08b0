from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nfd_env.models import weights
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.rounding import round_weights
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import (
    CheckpointError,
    Origin,
    fingerprint_of,
    load_weights,
    read_origin,
    save_weights,
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
    save_weights(path, network, network.config, torch.float16, rounded=round_weights(network, 8))
    assert path.stat().st_size < 0.4 * saved.stat().st_size
    loaded, before = load(path).state_dict(), network.state_dict()
    rounded = round_weights(network).applied(network).state_dict()
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
    once = round_weights(network).applied(network)
    again = round_weights(once).applied(once).state_dict()
    for name, tensor in rounded.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_fewer_bits_take_less_and_lose_about_half_a_step(
    tmp_path: Path, saved: Path, bits: int
) -> None:
    network = small_dynamics()
    paths = [tmp_path / f"{n}.safetensors" for n in (bits, bits + 1)]
    for path, number in zip(paths, (bits, bits + 1), strict=True):
        save_weights(
            path, network, network.config, torch.float16, rounded=round_weights(network, number)
        )
    assert paths[0].stat().st_size < paths[1].stat().st_size < 0.4 * saved.stat().st_size
    loaded, rounded = (
        load(paths[0]).state_dict(),
        round_weights(network, bits).applied(network).state_dict(),
    )
    finer = load(paths[1]).state_dict()
    for name, tensor in network.state_dict().items():
        if name in ("output.weight", "blocks.0.gate_up.weight"):
            assert torch.equal(loaded[name], rounded[name])
            for row in loaded[name]:
                assert len(row.unique()) < 2**bits
            errors = [(t[name] - tensor).norm() / tensor.norm() for t in (loaded, finer)]
            # Even or normal rows lose 1 to 2 parts in 2**bits.
            assert 0.4 / 2**bits < errors[0] < 2.5 / 2**bits and errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"bits": 8},
        {"bits": 6},
        {"bits": 5.0},
        {"bits": None},
        {"shapes": {"output.weight": [8, 8]}},
        {"shapes": {"output.weight": []}},
        {"shapes": {"output.weight": "many"}},
        {"shapes": {"nothing": [8, 8]}},
        {"shapes": {}},
        {"shapes": 5},
    ],
)
def test_damaged_packed_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, network = tmp_path / "a.safetensors", small_dynamics()
    save_weights(path, network, network.config, rounded=round_weights(network, 5))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    header["packed"] = json.dumps(json.loads(header["packed"]) | changes)
    save_file(load_file(path), path, header)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: (its packed|the scale of)"):
        load(path)


def test_rounding_for_what_a_network_sees_is_worth_a_bit() -> None:
    network, errors = small_dynamics(), {}
    seen, others = random_frames(4, 6, seed=1), random_frames(4, 6, seed=2)
    with torch.no_grad():
        true = network(*others)
        for bits, run in ((5, None), (6, None), (5, lambda n: n(*seen))):
            made = round_weights(network, bits, run).applied(network)(*others)
            errors[bits, run is None] = float((made - true).norm() / true.norm())
    assert errors[5, False] < 0.8 * errors[5, True] and errors[5, False] < 1.6 * errors[6, True]
    assert not any(m._forward_hooks for m in network.modules())


def test_int8_kernels_and_rows_of_zeros(tmp_path: Path) -> None:
    settings = TokenizerConfig([8, 16], [8, 16], 4)
    tokenizer = Tokenizer(settings).eval()
    with torch.no_grad():
        tokenizer.decoder[0].weight[1] = 0
    save_weights(tmp_path / "t.safetensors", tokenizer, settings, rounded=round_weights(tokenizer))
    loaded = load_weights(tmp_path / "t.safetensors", Tokenizer, TokenizerConfig)
    assert not loaded.decoder[0].weight[1].any()
    frames = torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        one, other = (t.decode(t.encode_frames(frames)) for t in (tokenizer, loaded))
    assert 0 < (one - other).norm() / one.norm() < 0.05


def test_a_scale_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    network = small_dynamics()
    save_weights(path, network, network.config, rounded=round_weights(network, 8))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["output.weight"]
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match="output.weight"):
        load(path)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a file, or take them out (None), and keep its header."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, header)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [None, 8])
def test_weights_must_be_finite(tmp_path: Path, value: float, bits: int | None) -> None:
    path, network = tmp_path / "a.safetensors", small_dynamics()
    save_weights(
        path, network, network.config, rounded=round_weights(network, bits) if bits else None
    )
    name = "output.weight.int8_scale" if bits else "output.weight"
    broken = load_file(path)[name]
    broken.view(-1)[0] = value
    rewrite(path, **{name: broken})
    with pytest.raises(CheckpointError, match=r"a.safetensors: 'output.weight.*NaN or infinity"):
        load(path)
    before = path.read_bytes()
    with torch.no_grad():
        network.output.weight[0, 0] = value
    with pytest.raises(CheckpointError, match=r"'output.weight' holds NaN or infinity"):
        save_weights(path, network, network.config)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_weights_too_large_for_half_precision(tmp_path: Path) -> None:
    network = small_dynamics()
    with torch.no_grad():
        network.output.weight[0, 0] = 1e5
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        save_weights(tmp_path / "a.safetensors", network, network.config, torch.float16)


def test_int8_weights_without_their_scale(tmp_path: Path) -> None:
    path, network = tmp_path / "a.safetensors", small_dynamics()
    save_weights(path, network, network.config, rounded=round_weights(network, 8))
    rewrite(path, **{"output.weight.int8_scale": None})
    with pytest.raises(CheckpointError, match=r"'output.weight' is stored as int8, but has no"):
        load(path)


def test_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    path, network = tmp_path / "a.safetensors", small_dynamics()
    save_weights(path, network, network.config, rounded=round_weights(network, 8))
    rewrite(path, **{"output.weight.int8_scale": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"scale of 'output.weight' does not fit"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": torch.zeros(1)}, "'more' is not part of the network"),
        ({"output.weight": None}, "'output.weight' is missing"),
        ({"output.weight": torch.zeros(2, 2)}, r"'output.weight' has the shape \(2, 2\), not"),
        ({"output.bias": None, "norm": None}, r"'output.bias' is missing$"),
    ],
)
def test_tensors_that_do_not_belong_are_named(
    saved: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=f"a.safetensors: does not fit.*{message}"):
        load(saved)


def test_whole_numbers_in_place_of_weights(saved: Path) -> None:
    rewrite(saved, **{"output.bias": load_file(saved)["output.bias"].int()})
    with pytest.raises(CheckpointError, match=r"'output.bias' holds torch.int32, not torch.float"):
        load(saved)


@pytest.mark.parametrize(
    "values",
    [
        '{"width": "${oc.env:HOME}"}',
        "[" * 100_000,
        '{"width": ' * 100_000,
        '{"width": 1000000000}',
        '{"width": -1}',
        '{"layers": 1000000}',
        '{"patch": 0}',
        "[]",
        "3",
    ],
)
def test_a_header_of_a_stranger(saved: Path, values: str) -> None:
    save_file(load_file(saved), saved, metadata={"class": "Dynamics", "config": values})
    with pytest.raises(CheckpointError, match="a.safetensors: "):
        load(saved)


def test_origin_goes_with_the_weights(tmp_path: Path) -> None:
    network = small_dynamics()
    full, small = tmp_path / "full.safetensors", tmp_path / "small.safetensors"
    save_weights(full, network, network.config, kind="flow", made_from={"tokenizer": "abc"})
    origin = read_origin(full)
    assert origin == Origin("flow", fingerprint_of(full), {"tokenizer": "abc"})
    assert origin is not None
    save_weights(
        small,
        network,
        network.config,
        torch.float16,
        rounded=round_weights(network),
        kind=origin.kind,
        made_from=origin.made_from,
        fingerprint=origin.fingerprint,
    )
    assert read_origin(small) == origin
    with torch.no_grad():
        network.output.bias[0] += 1e-3
    save_weights(small, network, network.config, kind="flow")
    assert fingerprint_of(small) != origin.fingerprint


def test_weights_without_origin_are_told_by_their_values(saved: Path, tmp_path: Path) -> None:
    network = small_dynamics()
    assert read_origin(saved) is None
    save_weights(tmp_path / "new.safetensors", network, network.config, kind="flow")
    assert fingerprint_of(saved) == fingerprint_of(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    "header",
    [{"kind": "flow"}, {"kind": "elephant", "made_from": "{}", "fingerprint": "a"}]
    + [{"kind": "flow", "fingerprint": "a", "made_from": m} for m in ("[", "[]", '{"a": 1}')],
)
def test_a_damaged_origin(saved: Path, header: dict[str, str]) -> None:
    save_file(load_file(saved), saved, metadata=header)
    with pytest.raises(CheckpointError, match="a.safetensors: its header"):
        read_origin(saved)


@pytest.mark.parametrize("setting", ["float64", "meta", "inference", "deterministic"])
def test_torchs_defaults_and_random_numbers_are_left_alone(saved: Path, setting: str) -> None:
    expected = load(saved)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    try:
        if setting == "float64":
            torch.set_default_dtype(torch.float64)
        elif setting == "meta":
            torch.set_default_device("meta")
        elif setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        with torch.inference_mode(setting == "inference"):
            network = load(saved)
        assert torch.get_default_dtype() == (
            torch.float64 if setting == "float64" else torch.float32
        )
        assert torch.empty(0).device.type == ("meta" if setting == "meta" else "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, one), (_, other) in zip(
        [*network.named_parameters(), *network.named_buffers()],
        [*expected.named_parameters(), *expected.named_buffers()],
        strict=True,
    ):
        assert one.device.type == "cpu" and one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_loading_draws_no_random_numbers_for_any_network(tmp_path: Path) -> None:
    tokenizer = Tokenizer(TokenizerConfig([8], [8], 2))
    heads = Heads(HeadsConfig(latent_size=8, width=16))
    for network, kind in ((tokenizer, TokenizerConfig), (heads, HeadsConfig)):
        save_weights(tmp_path / "a.safetensors", network, network.config)
        before = torch.get_rng_state()
        load_weights(tmp_path / "a.safetensors", type(network), kind)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keyframes", [0, 2])
def test_headers_of_versions_with_key_frames(tmp_path: Path, keyframes: int) -> None:
    network = small_dynamics()
    path = tmp_path / "old.safetensors"
    settings = dataclasses.asdict(network.config) | {"keyframes": keyframes, "keyframe_stride": 8}
    header = {"class": "Dynamics", "config": json.dumps(settings)}
    save_file(network.state_dict(), path, metadata=header)
    if keyframes:
        with pytest.raises(CheckpointError, match=r"old\.safetensors.*trained with key frames"):
            load_weights(path, Dynamics, DynamicsConfig)
    else:
        assert load_weights(path, Dynamics, DynamicsConfig).config == network.config
