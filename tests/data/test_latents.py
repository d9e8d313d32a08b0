"""What the dynamics is trained on: latents, and the actions that lead INTO each frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nfd_env.data.latents import LatentDataset
from nfd_env.data.shards import RecordedDataset
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import save_weights
from nfd_env.training.encode import EncodeConfig, encode
from tests.counter_env import move, read, record_counter_episodes


def save_tokenizer(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    settings = TokenizerConfig([8, 8, 8], [8, 8, 8], 4)
    save_weights(path, Tokenizer(settings), settings)
    return path


def encoded(folder: Path, recordings: Path) -> Path:
    latents, tokenizer = folder / "latents", folder / "tokenizer.safetensors"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    encode(EncodeConfig(str(recordings), str(tokenizer), str(latents)), progress=False)
    return latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Path:
    return encoded(tmp_path_factory.mktemp("latents"), recordings)


def frame_of_latent(recordings: Path, latents: Path) -> dict[bytes, tuple[int, int]]:
    """(counter, step) of every latent frame."""
    data, found = RecordedDataset(recordings), {}
    arrays = {e.shard: np.load(latents / f"{e.shard.name}.npy") for e in data}
    for episode in data:
        counters, steps = read(np.asarray(episode.frames))
        for i, (counter, step) in enumerate(zip(counters, steps, strict=True)):
            latent = arrays[episode.shard][episode.frame_offset + i].astype(np.float32)
            assert latent.tobytes() not in found, "two frames with one latent"
            found[latent.tobytes()] = int(counter), int(step)
    return found


def test_latents_are_those_of_their_frames(recordings: Path, latents: Path) -> None:
    episode = RecordedDataset(recordings).split("train")[-1]
    data = LatentDataset(RecordedDataset(recordings), latents, "train")
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig([8, 8, 8], [8, 8, 8], 4)).eval()
    with torch.inference_mode():
        expected = tokenizer.encode_frames(torch.from_numpy(np.array(episode.frames)))
    made = data.episodes[-1].latents
    assert made.dtype == np.float16 and made.shape == (45, 4, 4, 6)
    difference = np.abs(made - expected.numpy())
    assert difference.max() < 0.03 * expected.abs().max()  # encoding may run in bf16


@pytest.mark.parametrize("frames", [1, 2, 5, 45])
def test_windows_give_the_actions_that_lead_into_each_frame(
    recordings: Path, latents: Path, frames: int
) -> None:
    known = frame_of_latent(recordings, latents)
    data = LatentDataset(RecordedDataset(recordings), latents, "train")
    windows, actions = data.windows(np.random.default_rng(0), 64, frames)
    assert windows.shape == (64, frames, 4, 4, 6) and windows.dtype == torch.float32
    assert actions.shape == (64, frames, 3) and actions.dtype == torch.float32
    starts = set()
    for window, into in zip(windows.numpy(), actions.numpy(), strict=True):
        shown = [known[latent.tobytes()] for latent in window]
        counters, steps = (np.array(x) for x in zip(*shown, strict=True))
        assert np.array_equal(np.diff(steps), np.ones(frames - 1))
        assert np.array_equal(move(into.argmax(-1))[1:], np.diff(counters))
        assert (into[1:].sum(-1) == 1).all()
        assert into[0].sum() == (0 if steps[0] == 0 else 1)
        starts.add(int(steps[0]))
    assert min(starts) >= 0 and max(starts) <= 45 - frames
    if frames == 2:
        assert 0 in starts and len(starts) > 20


def test_the_action_into_a_windows_first_frame(recordings: Path, latents: Path) -> None:
    data = LatentDataset(RecordedDataset(recordings), latents, "train")
    first = {}
    for episode in data.episodes:
        for t in range(1, len(episode.latents)):
            first[episode.latents[t].astype(np.float32).tobytes()] = episode.actions[t - 1]
    windows, actions = data.windows(np.random.default_rng(1), 32, 3)
    for window, into in zip(windows.numpy(), actions.numpy(), strict=True):
        expected = first.get(window[0].tobytes(), np.zeros(3))
        assert np.array_equal(into[0], expected)


def test_windows_at_the_ends_of_episodes_that_terminated(recordings: Path, latents: Path) -> None:
    data = LatentDataset(RecordedDataset(recordings), latents, "train")
    last = [e.latents[-1].astype(np.float32).tobytes() for e in data.episodes]
    data._ends[:] = False
    data._ends[[1, 4]] = True
    latents_of = [{z.astype(np.float32).tobytes() for z in e.latents} for e in data.episodes]
    near = {z.astype(np.float32).tobytes() for i in (1, 4) for z in data.episodes[i].latents[-15:]}
    rng = np.random.default_rng(0)
    windows, actions = data.windows(rng, 200, 8, ending_share=1.0)
    assert actions.shape == (200, 8, 3)
    keys = [[z.tobytes() for z in window] for window in windows.numpy()]
    assert all(key in near for window in keys for key in window)
    assert {i for window in keys for i in (1, 4) if window[0] in latents_of[i]} == {1, 4}
    assert {last[1], last[4]} <= {window[-1] for window in keys}
    some = data.windows(rng, 400, 8, ending_share=0.5)[0].numpy()
    assert 150 < sum(window[0].tobytes() in near for window in some) < 280
    # Close to the end: the last frame, or the one before it.
    close = data.windows(rng, 100, 8, ending_share=1.0, ending_frames=2)[0].numpy()
    before = [e.latents[-2].astype(np.float32).tobytes() for e in data.episodes]
    kept = {window[-1].tobytes() for window in close}
    assert kept == {last[1], last[4], before[1], before[4]}
    # Where nothing terminated, the share asks for nothing.
    data._ends[:] = False
    assert data.windows(rng, 4, 8, ending_share=1.0)[0].shape[0] == 4


def test_splits(recordings: Path, latents: Path) -> None:
    train, validation = (
        LatentDataset(RecordedDataset(recordings), latents, s) for s in ("train", "validation")
    )
    assert (len(train.episodes), len(validation.episodes)) == (6, 2)
    assert (train.transitions, validation.transitions) == (6 * 44, 2 * 44)
    ours = {e.latents.tobytes() for e in train.episodes}
    assert not ours & {e.latents.tobytes() for e in validation.episodes}
    with pytest.raises(ValueError, match="no test episodes"):
        LatentDataset(RecordedDataset(recordings), latents, "test")


def test_windows_longer_than_the_episodes(recordings: Path, latents: Path) -> None:
    data = LatentDataset(RecordedDataset(recordings), latents, "train")
    with pytest.raises(ValueError, match="no episode has 46 frames"):
        data.windows(np.random.default_rng(0), 1, 46)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_terminal_frame_that_was_not_shown_is_left_out(tmp_path: Path, hidden: bool) -> None:
    record_counter_episodes(
        tmp_path / "r", 3, terminal_frame=not hidden, length=9, hide_terminal=hidden
    )
    recordings = RecordedDataset(tmp_path / "r")
    data = LatentDataset(recordings, encoded(tmp_path, tmp_path / "r"), "train")
    length = 8 if hidden else 9
    for episode, recorded in zip(data.episodes, recordings.split("train"), strict=True):
        assert len(recorded) == 9
        assert len(episode.latents) == length + 1
        assert len(episode.actions) == len(episode.rewards) == length
        assert episode.terminated.tolist() == [False] * (length - 1) + [True]
        assert np.array_equal(episode.rewards, recorded.rewards[:length])
        assert np.array_equal(episode.actions.argmax(-1), recorded.actions[:length])
        # No frame is shown twice.
        assert len({latent.tobytes() for latent in episode.latents}) == length + 1
    # The recording itself keeps the transition; there the last frame is shown again.
    last, before = (np.asarray(recordings.episodes[0].frames)[i] for i in (-1, -2))
    assert np.array_equal(last, before) == hidden


def test_an_episode_that_was_cut_off_has_no_hidden_frame(tmp_path: Path) -> None:
    # The collector ends it after 1000 steps while the game goes on: its last frame was seen.
    record_counter_episodes(tmp_path / "r", 2, terminal_frame=False, length=2000)
    recordings = RecordedDataset(tmp_path / "r")
    data = LatentDataset(recordings, encoded(tmp_path, tmp_path / "r"), "train")
    assert recordings.split("train")[0].truncated[-1]
    assert len(data.episodes[0].latents) == 1001
    assert not data.episodes[0].terminated.any()
