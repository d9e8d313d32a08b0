"""Encoding is a stage of its own, which the stages on latents ask for."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import DeviceError
from nfd_env.files import FolderError, FolderInUseError, owned_folder
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, save_weights
from nfd_env.training.encode import EncodeConfig, NotEncodedError, check_encoded, encode
from tests.counter_env import record_counter_episodes


def save_tokenizer(path: Path) -> Path:
    settings = TokenizerConfig([8, 8, 8], [8, 8, 8], 4)
    save_weights(path, Tokenizer(settings), settings)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> EncodeConfig:
    """Recordings in two shards, and a tokenizer."""
    record_counter_episodes(tmp_path / "r", 2, validation_every=2, frames_per_shard=20, length=20)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.safetensors")
    return EncodeConfig(str(tmp_path / "r"), str(tokenizer), str(tmp_path / "latents"))


def check(plan: EncodeConfig) -> None:
    check_encoded(RecordedDataset(plan.recordings), plan.tokenizer, plan.latents)


def test_it_goes_on_and_starts_over_for_another_tokenizer(
    plan: EncodeConfig, tmp_path: Path
) -> None:
    with pytest.raises(NotEncodedError, match="latents holds no latents: run the stage encode"):
        check(plan)
    encode(plan, progress=False)
    check(plan)
    first, second = (tmp_path / "latents" / f"shard-w00-0000{i}.npy" for i in (0, 1))
    assert np.load(first).shape == np.load(second).shape == (21, 4, 4, 6)
    stamp = first.stat().st_mtime_ns
    # More recordings: only the shard that grew is encoded again.
    record_counter_episodes(tmp_path / "r", 1, frames_per_shard=30, first=2, length=20)
    with pytest.raises(NotEncodedError, match="lacks the latents of 1 of 2 shards of .*/r: run"):
        check(plan)
    told: list[tuple[int, int]] = []
    encode(plan, False, lambda *done: told.append(done))
    check(plan)
    assert told[0] == (21, 63) and told[-1] == (63, 63)
    assert first.stat().st_mtime_ns == stamp and np.load(second).shape == (42, 4, 4, 6)
    # Another tokenizer: all of them.
    old = np.load(first)
    save_tokenizer(Path(plan.tokenizer))
    with pytest.raises(NotEncodedError, match="holds the latents of another tokenizer than"):
        check(plan)
    encode(plan, progress=False)
    check(plan)
    assert first.stat().st_mtime_ns != stamp and not np.array_equal(np.load(first), old)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"hello"])
def test_a_damaged_file_is_made_again(plan: EncodeConfig, tmp_path: Path, damage: bytes) -> None:
    encode(plan, progress=False)
    path = tmp_path / "latents" / "shard-w00-00001.npy"
    content = path.read_bytes()
    for wrong in (damage, content[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(NotEncodedError, match="lacks the latents of 1 of 2 shards"):
            check(plan)
        encode(plan, progress=False)
        assert path.read_bytes() == content


def test_a_folder_has_one_owner(plan: EncodeConfig, tmp_path: Path) -> None:
    with owned_folder(plan.latents), pytest.raises(FolderInUseError, match="being written by"):
        encode(plan, progress=False)


@pytest.mark.parametrize(("number", "error"), [(2, KeyboardInterrupt), (15, SystemExit)])
def test_a_signal_keeps_the_shards_that_are_done(
    plan: EncodeConfig, tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 21:
            signal.raise_signal(number)

    with pytest.raises(error):
        encode(plan, False, stop)
    assert [p.name for p in (tmp_path / "latents").glob("*.npy")] == ["shard-w00-00000.npy"]
    encode(plan, progress=False)
    check(plan)


def test_what_cannot_be_encoded(plan: EncodeConfig, tmp_path: Path) -> None:
    recordings, tokenizer, latents = plan.recordings, plan.tokenizer, plan.latents
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        encode(EncodeConfig(recordings, tokenizer, latents, "gpu"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        encode(EncodeConfig(recordings, str(tmp_path / "no"), latents))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="cannot be made"):
        encode(EncodeConfig(recordings, tokenizer, str(tmp_path / "file")))
    assert not Path(latents).exists()
