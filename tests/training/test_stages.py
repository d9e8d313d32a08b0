"""From recordings to a world that steps: every stage, a few steps each, in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nfd_env.config import ConfigError
from nfd_env.data.collect import CollectConfig, PolicyConfig, collect
from nfd_env.data.latents import LatentDataset
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.envs.single_env import NFDEnv
from nfd_env.files import FolderInUseError
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, load_weights, read_origin, save_weights
from nfd_env.training.encode import EncodeConfig, NotEncodedError, encode
from nfd_env.training.export import ExportConfig, export
from nfd_env.training.flow import FlowStage, FlowTrainingConfig
from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig, reward_values
from nfd_env.training.history import HistoryLevels
from nfd_env.training.loop import Stage, TrainConfig, train
from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig
from nfd_env.video import read_mp4
from nfd_env.worlds.clip import load_clip
from nfd_env.worlds.format import owned_world
from nfd_env.worlds.load import load_world
from tests.counter_env import read, record_counter_episodes, source

pytest.importorskip("tensorboard")

MODEL = DynamicsConfig(4, 4, 6, 2, 3, 32, 2, 2, 4, recent=2, local_width=8, local_blocks=1)


def run(folder: Path, steps: int, **kwargs: Any) -> TrainConfig:
    values = {
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "precision": "fp32",
        "ema_decay": 0.9,
        "validate_every": steps,
        **kwargs,
    }
    return TrainConfig(folder=str(folder), steps=steps, **values)


def loss_on_fixed_batches(stage: Stage, network: torch.nn.Module) -> float:
    network.eval()
    losses = []
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            batch = stage.batch(np.random.default_rng(1000 + seed), 16)
            losses.append(float(stage.loss(network, batch)[0]))
    return float(np.mean(losses))


class Trained:
    """One finished stage."""

    def __init__(self, make: Callable[[], Stage], settings: TrainConfig) -> None:
        stage = make()
        self.stage = stage
        self.before = loss_on_fixed_batches(stage, stage.network)
        self.metrics = train(stage, settings, progress=False)
        self.after = loss_on_fixed_batches(stage, stage.network)
        self.weights = Path(settings.folder) / "model.safetensors"
        self.folder = Path(settings.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def tokenizer(folder: Path, recordings: Path) -> Trained:
    settings = TokenizerTrainingConfig(
        str(recordings),
        run(folder / "tokenizer", 40),
        TokenizerConfig([8, 8, 16], [8, 8, 16], 4),
    )
    return Trained(lambda: TokenizerStage(settings), settings.train)


@pytest.fixture(scope="module")
def latents(folder: Path, recordings: Path, tokenizer: Trained) -> Path:
    plan = EncodeConfig(str(recordings), str(tokenizer.weights), str(folder / "latents"))
    encode(plan, progress=False)
    return folder / "latents"


@pytest.fixture(scope="module")
def flow_settings(
    folder: Path, recordings: Path, tokenizer: Trained, latents: Path
) -> FlowTrainingConfig:
    return FlowTrainingConfig(
        str(recordings),
        str(tokenizer.weights),
        str(folder / "latents"),
        run(folder / "flow", 60),
        MODEL,
        frames=6,
    )


@pytest.fixture(scope="module")
def flow(flow_settings: FlowTrainingConfig) -> Trained:
    return Trained(lambda: FlowStage(flow_settings), flow_settings.train)


@pytest.fixture(scope="module")
def heads(folder: Path, recordings: Path, tokenizer: Trained, latents: Path) -> Trained:
    settings = HeadsTrainingConfig(
        str(recordings),
        str(tokenizer.weights),
        str(folder / "latents"),
        run(folder / "heads", 60, keep_best="end", validate_every=20),
        width=16,
        frames=20,
    )
    return Trained(lambda: HeadsStage(settings), settings.train)


def test_tokenizer(tokenizer: Trained) -> None:
    assert tokenizer.after < 0.8 * tokenizer.before
    assert tokenizer.metrics.keys() == {
        "psnr", "hard_psnr", "moving_psnr", "moving_psnr_frozen", "sharpness",
        "gradient_correlation",
    }  # fmt: skip
    assert tokenizer.metrics["hard_psnr"] <= tokenizer.metrics["psnr"]
    network = load_weights(tokenizer.weights, Tokenizer, TokenizerConfig)
    assert network.config.encoder_channels == [8, 8, 16]
    assert (tokenizer.folder / "samples" / "0000040.png").exists()


def test_latents_are_standardised_after_a_short_training(tmp_path: Path, recordings: Path) -> None:
    """The statistics that batch norm gathers in 20 steps would leave a deviation of about 0.2."""
    settings = TokenizerTrainingConfig(
        str(recordings), run(tmp_path / "run", 20), TokenizerConfig([8, 8, 16], [8, 8, 16], 4)
    )
    stage = TokenizerStage(settings)
    gathered: list[torch.Tensor] = []
    set_statistics = stage._set_statistics

    def watched(network: Any, count: int) -> None:
        gathered.append(network.normalise.running_var.clone())
        set_statistics(network, count)

    stage._set_statistics = watched  # type: ignore[method-assign]
    train(stage, settings.train, progress=False)
    network = load_weights(tmp_path / "run" / "model.safetensors", Tokenizer, TokenizerConfig)
    frames = np.concatenate([e.frames for e in RecordedDataset(recordings).split("train")])
    with torch.no_grad():
        latents = network.encode_frames(torch.from_numpy(frames))
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    assert (gathered[0] / network.normalise.running_var).max() > 4  # it was needed


def test_pictures_that_move_and_edges_are_judged(tokenizer: Trained, recordings: Path) -> None:
    stage = tokenizer.stage
    assert isinstance(stage, TokenizerStage)
    # Consecutive frames of held-out episodes.
    before, after = (read(x.numpy()) for x in (stage._before, stage._held_out))
    assert (after[1] - before[1] == 1).all()
    network = load_weights(tokenizer.weights, Tokenizer, TokenizerConfig)
    with torch.no_grad():
        metrics = stage.validate(network)
    made = stage._reconstruct(network, stage._held_out).astype(float)
    moved = (stage._before != stage._held_out).any(-1).numpy()
    error = ((made - stage._held_out.numpy()) ** 2)[moved].mean()
    assert metrics["moving_psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    # A perfect copy.
    perfect = stage._held_out.numpy()
    stage._reconstruct = lambda network, frames: perfect  # type: ignore[method-assign]
    metrics = stage.validate(network)
    stage._reconstruct = lambda network, frames: stage._before.numpy()  # type: ignore[method-assign]
    still = stage.validate(network)
    del stage._reconstruct
    assert still["moving_psnr"] == still["moving_psnr_frozen"] < 40
    assert metrics["sharpness"] == 1 and metrics["gradient_correlation"] == pytest.approx(1)
    assert metrics["moving_psnr"] == np.inf


def test_what_stands_out_is_counted(flow: Trained) -> None:
    stage = flow.stage
    assert isinstance(stage, FlowStage) and stage._rollouts is not None
    latents = stage._rollouts[0]
    real, background = latents[:, 4:], stage._decode(latents).astype(float)
    metrics = stage._judge(real, latents)
    assert metrics["standing_8"] == metrics["standing_32"] == metrics["spread"] == 1
    assert metrics["error_32"] == metrics["error_over_frozen_1"] == 0
    frozen = stage._judge(latents[:, 3:4].expand_as(real), latents)
    assert frozen["error_over_frozen_8"] == 1
    # Where the frame is the background itself, nothing stands out.
    still = torch.from_numpy(np.median(background, 1)[:, None].repeat(8, 1).astype(np.uint8))
    stage._decode = lambda _: still.numpy()[:, :4]  # type: ignore[method-assign]
    empty = stage._judge(real, latents)
    del stage._decode
    assert empty["standing_8"] == empty["standing_32"] == 0


@pytest.mark.parametrize("name", ["tokenizer", "flow", "heads"])
def test_keep_best_may_name_what_validation_returns(
    name: str, request: pytest.FixtureRequest
) -> None:
    trained = request.getfixturevalue(name)
    assert set(trained.stage.lower_is_better) <= trained.metrics.keys()
    wrong = replace(run(trained.folder, 1), keep_best="psnr")
    with pytest.raises(ValueError, match="keep_best must be one of .*; got 'psnr'"):
        train(trained.stage, wrong, progress=False)


def test_flow(flow: Trained) -> None:
    assert flow.after < 0.9 * flow.before
    assert np.isfinite(list(flow.metrics.values())).all()
    assert {
        "flow",
        "error_1",
        "error_over_frozen_32",
        "spread",
        "standing_32",
    } <= flow.metrics.keys()
    assert load_weights(flow.weights, Dynamics, DynamicsConfig).config == MODEL
    assert (flow.folder / "samples" / "0000060.png").exists()


def test_flow_with_one_shared_copy(flow_settings: FlowTrainingConfig, tmp_path: Path) -> None:
    settings = replace(flow_settings, history="shared", train=run(tmp_path / "shared", 40))
    trained = Trained(lambda: FlowStage(settings), settings.train)
    assert trained.after < 0.95 * trained.before
    with pytest.raises(ValueError, match="two_copies or shared"):
        replace(flow_settings, history="none")


def test_flow_goes_on_from_finished_weights(
    flow: Trained, flow_settings: FlowTrainingConfig, tmp_path: Path
) -> None:
    settings = replace(
        flow_settings,
        initial=str(flow.weights),
        model=replace(MODEL, window=5, stillness=0.02),  # which no weight depends on
        history_levels=HistoryLevels(draft_share=0.2),
        train=run(tmp_path, 1),
    )
    stage = FlowStage(settings)
    finished = load_weights(flow.weights, Dynamics, DynamicsConfig).state_dict()
    begun = stage.network.state_dict()
    assert all(torch.equal(begun[name], finished[name]) for name in finished)
    assert np.isfinite(train(stage, settings.train, progress=False)["flow"])


def test_flow_begins_with_the_motion_of_another(
    flow: Trained, flow_settings: FlowTrainingConfig
) -> None:
    model = replace(flow_settings.model, width=64, layers=1)
    stage = FlowStage(replace(flow_settings, initial_motion=str(flow.weights), model=model))
    learned = load_weights(flow.weights, Dynamics, DynamicsConfig).local
    assert stage.network.local is not None and learned is not None
    assert torch.equal(stage.network.local.leave.weight, learned.leave.weight)
    anew = FlowStage(replace(flow_settings, model=model))
    assert loss_on_fixed_batches(stage, stage.network) < loss_on_fixed_batches(anew, anew.network)
    for named, other, told in (
        ("DoomTakeCover", model, "DoomTakeCover has no convolutions"),
        (str(flow.weights), replace(model, recent=0), "model.recent 0 has no convolutions"),
        (
            str(flow.weights),
            replace(model, local_width=16),
            "has .*local_width.: 8.*asks for .*local_width.: 16",
        ),
    ):
        with pytest.raises(CheckpointError, match=told):
            FlowStage(replace(flow_settings, initial_motion=named, model=other))


def test_flow_remembers_frames_with_its_own_errors(
    flow: Trained, flow_settings: FlowTrainingConfig
) -> None:
    stage = FlowStage(replace(flow_settings, own_errors=0.5))
    network = load_weights(flow.weights, Dynamics, DynamicsConfig)
    latents, actions = stage.batch(np.random.default_rng(0), 128)
    torch.manual_seed(0)
    remembered = stage._as_remembered(network, latents, torch.zeros(latents.shape[:2]), actions)
    errors = (remembered - latents).flatten(2)
    changed = errors.abs().amax((1, 2)) > 0
    assert 0.3 < changed.float().mean() < 0.7
    lasting = errors[changed].std(1).amax(1) < 1e-5
    assert 0.3 < lasting.float().mean() < 0.7
    contrast = (errors * latents.flatten(2)).mean((1, 2))[changed]
    assert (contrast < 0).any() and (contrast > 0).any()
    torch.manual_seed(0)
    assert torch.isfinite(stage.loss(network, (latents, actions))[0])
    with pytest.raises(ValueError, match="own_errors.*two_copies"):
        replace(flow_settings, history="shared", own_errors=0.5)


def test_flow_goes_on_with_a_modulation_of_lower_rank(
    flow: Trained, flow_settings: FlowTrainingConfig
) -> None:
    settings = replace(
        flow_settings,
        initial=str(flow.weights),
        model=replace(flow_settings.model, modulation_rank=16),
    )
    stage = FlowStage(settings)
    assert stage.network.config.modulation_rank == 16
    before = loss_on_fixed_batches(stage, load_weights(flow.weights, Dynamics, DynamicsConfig))
    assert loss_on_fixed_batches(stage, stage.network) == pytest.approx(before, rel=1e-3)


def test_flow_from_weights_of_another_size(
    flow: Trained, flow_settings: FlowTrainingConfig
) -> None:
    larger = replace(flow_settings.model, layers=3)
    with pytest.raises(CheckpointError, match=r"layers=2.*the config asks for.*layers=3"):
        FlowStage(replace(flow_settings, initial=str(flow.weights), model=larger))


def test_the_flow_loss_starts_at_the_variance_of_the_velocity(
    flow_settings: FlowTrainingConfig,
) -> None:
    """The network's output starts at zero, and E|eps - x0|^2 = 1 + E|x0|^2 per channel."""
    guessed = FlowStage(flow_settings)
    stage = FlowStage(replace(flow_settings, model=replace(MODEL, recent=0)))
    latents, *_ = stage.batch(np.random.default_rng(0), 256)
    expected = 1 + float(latents[:, 1:].square().mean())
    torch.manual_seed(0)
    loss, logs = stage.loss(stage.network, stage.batch(np.random.default_rng(0), 256))
    assert float(loss.detach()) == pytest.approx(expected, rel=0.02)
    assert guessed.network.local is not None
    assert guessed.network.local.persistence.change.max() < 1
    torch.manual_seed(0)
    better, _ = guessed.loss(guessed.network, guessed.batch(np.random.default_rng(0), 256))
    assert better < 0.8 * loss
    assert logs.keys() == {"last_frame"}


def test_heads(heads: Trained) -> None:
    assert heads.after < 0.8 * heads.before
    assert heads.metrics.keys() == {
        *("end", "end_over_constant", "reward_absolute_error", "reward_over_constant")
    }
    network = load_weights(heads.weights, Heads, HeadsConfig)
    assert network.config.reward_values == [-1.0, 0.0, 1.0]
    assert network.config.latent_size == 96 and network.config.action_width == 3


def test_head_sequences_are_aligned_and_padded(heads: Trained) -> None:
    stage = heads.stage
    assert isinstance(stage, HeadsStage)
    latents, actions, rewards, terminated, _, weight = stage.batch(np.random.default_rng(0), 64)
    assert latents.shape == (64, 20, 4, 4, 6) and actions.shape == (64, 20, 3)
    real = weight > 0
    # In the counter env the reward is the move that the action makes.
    assert torch.equal(rewards[real], (actions.argmax(-1).float() - 1)[real])
    assert not actions[~real].any() and not latents[~real].any()
    assert torch.equal(actions[real].sum(-1), torch.ones(int(real.sum())))
    # An end is the last transition of its sequence.
    for row, step in terminated.nonzero().tolist():
        assert real[row, step] and not real[row, step + 1 :].any()
    # The latents of transition t are those of the frame after it.
    known = {
        e.latents[t + 1].astype(np.float32).tobytes(): e.actions[t]
        for e in stage._train.episodes
        for t in range(len(e.actions))
    }
    for row, step in real.nonzero()[:200].tolist():
        expected = known[latents[row, step].numpy().tobytes()]
        assert np.array_equal(actions[row, step].numpy(), expected)


def weighted_share_of_ends(stage: Stage, first: int) -> tuple[float, float]:
    """Weighted and plain share of ends among the drawn transitions from the ``first`` one on."""
    assert isinstance(stage, HeadsStage)
    number = {
        e.latents[t + 1].astype(np.float32).tobytes(): t
        for e in stage._train.episodes
        for t in range(len(e.actions))
    }
    latents, _, _, terminated, _, weight = stage.batch(np.random.default_rng(1), 1500)
    chosen = weight > 0
    for row, step in chosen.nonzero().tolist():
        chosen[row, step] = number[latents[row, step].numpy().tobytes()] >= first
    weighted = (weight * terminated)[chosen].sum() / weight[chosen].sum()
    return float(weighted), float(terminated[chosen].mean())


def test_ends_are_drawn_often_and_weighted_back(heads: Trained) -> None:
    """The loss is that of transitions drawn uniformly, or hazards would not be calibrated."""
    weighted, drawn = weighted_share_of_ends(heads.stage, first=19)
    assert weighted == pytest.approx(1 / (44 - 19), rel=0.1)
    assert drawn > 1.2 / (44 - 19)


def test_early_transitions_weigh_as_much_as_others(heads: Trained) -> None:
    weighted, _ = weighted_share_of_ends(heads.stage, first=0)
    assert weighted == pytest.approx(1 / 44, rel=0.1)


@pytest.fixture(scope="module")
def told(folder: Path) -> Path:
    """Recordings of the same game with signals."""
    wanted = CollectConfig(
        source=source(kwargs={"length": 44}),
        folder=str(folder / "told"),
        frames=400,
        policies=[PolicyConfig("random_held", kwargs={"low": 1, "high": 4})],
        workers=1,
        validation_every=4,
        signals="tests.counter_env:tell",
    )
    collect(wanted, progress=False)
    return folder / "told"


def test_heads_tell_signals(folder: Path, told: Path, tokenizer: Trained) -> None:
    plan = HeadsTrainingConfig(
        str(told),
        str(tokenizer.weights),
        str(folder / "told_latents"),
        run(folder / "told_heads", 60),
        width=16,
        frames=20,
        signal_weight=1.0,
    )
    with pytest.raises(NotEncodedError, match="told_latents holds no latents: run the stage enc"):
        HeadsStage(plan)
    encode(EncodeConfig(plan.recordings, plan.tokenizer, plan.latents), progress=False)
    stage = HeadsStage(plan)
    latents, _, _, _, signals, weight = stage.batch(np.random.default_rng(0), 8)
    known = {
        e.latents[t + 1].astype(np.float32).tobytes(): e.signals[t]
        for e in stage._train.episodes
        for t in range(len(e.actions))
    }
    for row, step in (weight > 0).nonzero().tolist():
        assert np.array_equal(signals[row, step], known[latents[row, step].numpy().tobytes()])
    trained = Trained(lambda: HeadsStage(plan), plan.train)
    with torch.no_grad():
        untrained = stage.validate(stage.network)["signal"]
    assert trained.metrics["signal"] < 0.9 * untrained
    network = load_weights(trained.weights, Heads, HeadsConfig)
    assert network.config.signals == 2 and network.signals.out_features == 2
    # What is not known adds nothing to the loss.
    batch = [torch.as_tensor(x).clone() for x in stage.batch(np.random.default_rng(1), 8)]
    losses = []
    for unknown in (torch.nan, 0.0, 1.0):
        batch[4][..., 0] = unknown
        torch.manual_seed(0)
        losses.append(float(trained.stage.loss(network.eval(), tuple(batch))[1]["signal"]))
    assert losses[0] < min(losses[1:])
    with pytest.raises(RecordingError, match="signal_weight=0"):
        HeadsStage(replace(plan, recordings=str(without_signals(told, folder))))
    with pytest.raises(ValueError, match="signal_weight must be at least 0 and finite, got -1"):
        replace(plan, signal_weight=-1.0)


def without_signals(told: Path, folder: Path) -> Path:
    """The same recordings, but nothing told."""
    copy = folder / "untold"
    shutil.copytree(told, copy)
    text = (copy / "dataset.yaml").read_text()
    (copy / "dataset.yaml").write_text(text.replace("signals: 2\n", ""))
    return copy


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0.0, 1.0, 1.0, 0.0], [0.0, 1.0]), ([2.0], [2.0]), (range(100), None)],
)
def test_reward_values(rewards: Any, expected: list[float] | None) -> None:
    values = reward_values(np.array(rewards, np.float32), 5)
    if expected is None:
        assert values == pytest.approx([0, 24.75, 49.5, 74.25, 99])
    else:
        assert values == expected
    HeadsConfig(reward_values=values)


@pytest.mark.parametrize("rank", [0, 6])
def test_exported_weights_make_a_world_that_steps(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path, rank: int
) -> None:
    folder = export(
        ExportConfig(
            "Counter",
            str(tmp_path / "world"),
            str(recordings),
            str(tokenizer.folder),
            str(flow.folder),
            str(heads.folder),
            sampling=SamplingConfig(2),
            modulation_rank=rank,
            starts=12,
            beginnings=2,
            start_frames=4,
            start_margin=20,
            clip_frames=20,
        )
    )
    world = load_world(folder, "cpu", "fp32")
    assert world.spec.fps == 25 and world.spec.frame_size == [32, 48]
    assert world.spec.source.env_id == "tests/Counter-v0"
    provenance = yaml.safe_load((folder / "provenance.yaml").read_text())
    assert provenance["recordings"]["frames"] == 8 * 45
    assert provenance["stages"]["heads"]["steps"] == 60
    # Episodes start from recorded moments, with the actions that led into their frames.
    episodes = LatentDataset(
        RecordedDataset(recordings), flow.folder.parent / "latents", "train"
    ).episodes
    assert len(world.starts) == 12
    places = []
    for start in world.starts:
        assert start.latents.shape == (4, 4, 4, 6)
        distance = [
            [np.abs(start.latents.numpy() - e.latents[t : t + 4]).max() for t in range(41)]
            for e in episodes
        ]
        number, first = np.unravel_index(np.argmin(distance), (len(episodes), 41))
        assert distance[number][first] < 0.1
        into = episodes[number].actions[first : first + 3]
        assert np.array_equal(start.actions[1:].numpy(), into)
        before = episodes[number].actions[first - 1] if first else np.zeros(3)
        assert np.array_equal(start.actions[0].numpy(), before)
        assert start.beginning == (first == 0)
        places.append((number, first))
    assert places[0][1] == places[1][1] == 0 and places[0][0] != places[1][0]
    # 44 transitions: the last frame of a start is number 24 at most.
    assert all(0 <= first <= 21 for _, first in places[2:]) and len(set(places[2:])) > 5
    clip = read_mp4(folder / "clip.mp4")
    played = RecordedDataset(recordings).split("validation")[0]
    assert np.array_equal(read(clip), read(np.asarray(played.frames[:21])))
    env = NFDEnv(folder, "cpu", precision="fp32", render_mode="rgb_array")
    env.reset(seed=0)
    for action in (0, 1, 2, 2):
        observation, reward, _, _, info = env.step(action)
        assert observation in env.observation_space
        assert -1 <= reward <= 1 and 0 <= info["hazard"] <= 1


def test_weights_without_a_training_are_refused(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "tokenizer"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(tokenizer.weights.read_bytes())
    settings = ExportConfig(
        "Counter",
        str(tmp_path / "world"),
        str(recordings),
        str(bare),
        str(flow.folder),
        str(heads.folder),
        starts=2,
        beginnings=1,
        clip_frames=4,
    )
    with pytest.raises(CheckpointError, match=r"state.pt: missing"):
        export(settings)
    assert not (tmp_path / "world").exists()


def test_hazard_odds(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path
) -> None:
    settings = ExportConfig(
        "Counter",
        str(tmp_path / "plain"),
        str(recordings),
        str(tokenizer.folder),
        str(flow.folder),
        str(heads.folder),
        starts=2,
        beginnings=1,
        clip_frames=4,
    )
    latents, actions = torch.randn(3, 4, 4, 6), torch.eye(3)
    odds = []
    for factor, name in ((1.0, "plain"), (3.0, "deadlier")):
        folder = export(replace(settings, folder=str(tmp_path / name), hazard_odds=factor))
        exported = load_weights(folder / "heads.safetensors", Heads, HeadsConfig)
        output = exported.step(latents, actions, exported.initial_state(3))
        odds.append(output.hazard / (1 - output.hazard))
        assert yaml.safe_load((folder / "provenance.yaml").read_text())["hazard_odds"] == factor
    assert torch.allclose(odds[1], 3 * odds[0], rtol=1e-2)
    with pytest.raises(ValueError, match="hazard_odds must be above 0"):
        replace(settings, hazard_odds=0.0)


def test_student_and_teacher_are_exported_together_in_fewer_bytes(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path
) -> None:
    student = shutil.copytree(flow.folder, tmp_path / "student")
    made = read_origin(flow.weights)
    assert made is not None and made.kind == "flow"
    network = load_weights(flow.weights, Dynamics, DynamicsConfig)
    distilled = {"kind": "student", "made_from": {**made.made_from, "teacher": made.fingerprint}}
    save_weights(student / "model.safetensors", network, network.config, **distilled)

    def settings(name: str, **kwargs: Any) -> ExportConfig:
        return ExportConfig(
            "Counter",
            str(tmp_path / name),
            str(recordings),
            str(tokenizer.folder),
            str(student),
            str(heads.folder),
            sampling=SamplingConfig(1, "consistency"),
            modulation_rank=6,
            starts=4,
            beginnings=2,
            start_margin=20,
            clip_frames=20,
            **kwargs,
        )

    names = ["tokenizer", "dynamics", "heads", "teacher"]
    plain = export(settings("plain", teacher=str(flow.folder)))
    small = export(settings("small", teacher=str(flow.folder), bits=dict.fromkeys(names, 8)))
    for name in names:
        one, other = (f / f"{name}.safetensors" for f in (plain, small))
        assert other.stat().st_size < 0.85 * one.stat().st_size
    provenance = yaml.safe_load((small / "provenance.yaml").read_text())
    assert provenance["bits"].keys() == set(names)
    for errors in provenance["bits"].values():
        assert 1e-4 < errors["weights"] < 0.02 and 1e-5 < errors["output"] < 0.1
    assert provenance["stages"]["teacher"]["steps"] == provenance["stages"]["dynamics"]["steps"]
    assert provenance["modulation_rank"].keys() >= {"relative_error", "teacher_relative_error"}
    world = load_world(small, "cpu", "fp32", "teacher")
    assert world.model.sampling == SamplingConfig(18)
    env = NFDEnv(small, "cpu", precision="fp32", dynamics="teacher", sampling_steps=2)
    env.reset(seed=0)
    assert env.step(1)[0] in env.observation_space


@pytest.fixture
def plan(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path
) -> ExportConfig:
    """A quick export, in a folder that holds nothing else."""
    return ExportConfig(
        "Counter",
        str(tmp_path / "world"),
        str(recordings),
        str(tokenizer.folder),
        str(flow.folder),
        str(heads.folder),
        starts=2,
        beginnings=1,
        clip_frames=4,
    )


def test_an_export_that_fails_at_its_last_file_leaves_the_world_before(
    plan: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nfd_env.worlds.clip.write_mp4", full)
        with pytest.raises(OSError, match="No space"):
            export(plan)
    assert not (tmp_path / "world").exists()
    folder = export(replace(plan, title="Counting", description="By ones.", display="pixelated"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {"clip.mp4", "clip.safetensors", "checksums.json"} <= before.keys()
    spec = load_world(folder, "cpu", "fp32").spec
    assert (spec.title, spec.description, spec.display) == ("Counting", "By ones.", "pixelated")
    assert spec.recordings == plan.recordings and len(load_clip(folder).actions) == 4
    monkeypatch.setattr("nfd_env.worlds.clip.write_mp4", full)
    with pytest.raises(OSError, match="No space"):
        export(plan)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(tmp_path.glob(".world*"))


@pytest.mark.parametrize("part", ["tokenizer", "dynamics", "heads"])
def test_weights_from_before_or_of_another_training_are_not_exported(
    plan: ExportConfig, tmp_path: Path, part: str
) -> None:
    networks = {
        "tokenizer": (Tokenizer, TokenizerConfig),
        "dynamics": (Dynamics, DynamicsConfig),
        "heads": (Heads, HeadsConfig),
    }
    other = shutil.copytree(getattr(plan, part), tmp_path / part)
    path = other / "model.safetensors"
    made = read_origin(path)
    assert made is not None
    network = load_weights(path, *networks[part])
    changed = replace(plan, **{part: str(other)})
    save_weights(path, network, network.config)
    with pytest.raises(CheckpointError, match=f"{part} do not say what they were made from"):
        export(changed)
    inputs = {**made.made_from, "tokenizer": "another"}
    save_weights(path, network, network.config, kind=made.kind, made_from=inputs, fingerprint="f")
    with pytest.raises(CheckpointError, match="was not made with this tokenizer"):
        export(changed)
    inputs = {**made.made_from, "recordings": "another"}
    own = made.fingerprint
    save_weights(path, network, network.config, kind=made.kind, made_from=inputs, fingerprint=own)
    with pytest.raises(CheckpointError, match="recordings of (different|other) frames"):
        export(changed)
    assert not (tmp_path / "world").exists()


def test_networks_of_other_recordings_are_not_exported(
    plan: ExportConfig, recordings: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(recordings, tmp_path / "recordings")
    text = (other / "dataset.yaml").read_text()
    (other / "dataset.yaml").write_text(text.replace("start: 0", "start: 5"))
    with pytest.raises(CheckpointError, match="trained on recordings of other frames or actions"):
        export(replace(plan, recordings=str(other)))
    assert not (tmp_path / "world").exists()


def test_an_export_says_at_once_what_is_in_the_way(plan: ExportConfig, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is in the way"):
        export(replace(plan, tokenizer="not looked at"))
    with owned_world(tmp_path / "new"), pytest.raises(FolderInUseError):
        export(replace(plan, folder=str(tmp_path / "new"), tokenizer="not looked at"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": {"decoder": 8}}, "bits knows .*'decoder'"),
        ({"bits": {"teacher": 8}}, "there is none"),
        ({"bits": {"heads": 3}}, "from 4 to 8, got 3"),
        ({"bits": {"heads": 9}}, "from 4 to 8, got 9"),
    ],
)
def test_wrong_bits(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig("A", "b", "c", "d", "e", "f", **wrong)


def test_a_stage_that_is_not_finished_cannot_be_exported(
    tokenizer: Trained, flow: Trained, recordings: Path, tmp_path: Path
) -> None:
    folders = [str(tokenizer.folder), str(flow.folder), str(tmp_path / "nothing")]
    with pytest.raises(CheckpointError, match="nothing.*no such checkpoint"):
        export(ExportConfig("Counter", str(tmp_path / "world"), str(recordings), *folders))
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize("state", [{"step": 1}, [1], {"step": 1, "elapsed": "x", "metrics": 3}])
def test_a_state_of_another_program_is_named(
    plan: ExportConfig, tmp_path: Path, state: Any
) -> None:
    other = shutil.copytree(plan.heads, tmp_path / "heads")
    torch.save(state, other / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged, or of another program"):
        export(replace(plan, heads=str(other)))


def test_configs_that_are_no_yaml_are_named(plan: ExportConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"notes\.yaml: cannot be read as YAML"):
        export(replace(plan, configs=[str(tmp_path / "notes.yaml")]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"starts": 0}, "starts must be from 1 to 100000, got 0"),
        ({"start_frames": 0}, "at least 1"),
        ({"starts": 4, "beginnings": 5}, "beginnings must be from 0 to 4, got 5"),
    ],
)
def test_impossible_numbers_of_starts(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig("Counter", *["x"] * 5, **values)


def test_episodes_too_short_for_a_start(
    tokenizer: Trained, flow: Trained, heads: Trained, recordings: Path, tmp_path: Path
) -> None:
    folders = [str(recordings), *(str(s.folder) for s in (tokenizer, flow, heads))]
    with pytest.raises(RecordingError, match="no training episode has 49 frames"):
        export(ExportConfig("Counter", str(tmp_path / "w"), *folders, start_margin=45))
    assert not (tmp_path / "w").exists()


def test_recordings_that_are_too_short(tmp_path: Path, flow_settings: FlowTrainingConfig) -> None:
    record_counter_episodes(tmp_path / "r", 4, validation_every=2, length=10)
    short = replace(flow_settings, recordings=str(tmp_path / "r"), latents=str(tmp_path / "l"))
    with pytest.raises(RecordingError, match="no validation .* has 12 frames, the longest has 11"):
        FlowStage(short)
    assert not (tmp_path / "l").exists()  # it is said before anything is encoded
