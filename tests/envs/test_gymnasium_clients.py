"""The programs that people will run the envs with."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from packaging import version

from nfd_env.envs.single_env import NFDEnv
from nfd_env.envs.vector_env import NFDVectorEnv

ID = "NFD/World-v0"
CPU = {"device": "cpu", "precision": "fp32"}


def test_make(tiny_world: Path) -> None:
    env = gymnasium.make(ID, world=tiny_world, **CPU)
    assert isinstance(env.unwrapped, NFDEnv)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, *_ = env.step(env.action_space.sample())
        assert observation in env.observation_space
    env.close()


def test_make_needs_a_world() -> None:
    with pytest.raises(TypeError, match="world"):
        gymnasium.make(ID)


def test_make_vec_makes_one_batched_model(tiny_world: Path) -> None:
    env = gymnasium.make_vec(ID, num_envs=3, world=tiny_world, **CPU)
    assert isinstance(env.unwrapped, NFDVectorEnv) and env.num_envs == 3
    env.reset(seed=0)
    observation, *_ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    env.close()


def test_make_vec_passes_its_arguments_on(tiny_world: Path) -> None:
    env = gymnasium.make_vec(
        ID,
        num_envs=2,
        world=str(tiny_world),
        autoreset_mode=AutoresetMode.SAME_STEP,
        max_episode_steps=7,
        **CPU,
    )
    assert env.unwrapped.max_episode_steps == 7
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_a_vector_env_of_single_envs_does_the_same(tiny_world: Path) -> None:
    """Gymnasium's own autoreset around the single env agrees with ours."""
    kwargs = {"max_episode_steps": 6, "obs_type": "latent", **CPU}
    native = NFDVectorEnv(tiny_world, 2, **kwargs)
    sync = SyncVectorEnv([lambda: NFDEnv(tiny_world, **kwargs)] * 2)
    acts = np.random.default_rng(0).integers(0, 3, (24, 2))
    left, right = native.reset(seed=3)[0], sync.reset(seed=3)[0]
    ends = 0
    for a in acts:
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)
        (left, *mine, info), (right, *theirs, expected) = native.step(a), sync.step(a)
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-3, atol=1e-4)
        assert np.array_equal(mine[1], theirs[1]) and np.array_equal(mine[2], theirs[2])
        np.testing.assert_allclose(info["hazard"], expected["hazard"], rtol=1e-3, atol=1e-4)
        ends += int((mine[1] | mine[2]).sum())
    assert ends >= 4


def test_a_fresh_process_needs_no_import(tiny_world: Path) -> None:
    program = f"""
import gymnasium
env = gymnasium.make("nfd_env:{ID}", world={str(tiny_world)!r}, device="cpu")
print(env.reset(seed=0)[0].shape, env.step(1)[0].dtype)
vector = gymnasium.make_vec("nfd_env:{ID}", num_envs=2, world={str(tiny_world)!r}, device="cpu")
print(vector.reset(seed=0)[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(32, 48, 3) uint8", "(2, 32, 48, 3)"]


SPACES = [
    {"type": "Discrete", "n": 3, "start": 0},
    {"type": "MultiBinary", "n": 4},
    {"type": "Box", "low": [-1.0, -1.0], "high": [1.0, 1.0]},
]


def harmless(message: str, unbounded: bool) -> bool:
    """Latents have no bounds, which is what the checker remarks on."""
    return unbounded and "A Box observation space" in message


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s["type"])
@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_check_env(make_world: Callable[..., Path], space: dict[str, Any], obs_type: str) -> None:
    world = make_world(action_space=space)
    env = gymnasium.make(ID, world=world, obs_type=obs_type, render_mode="rgb_array", **CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    messages = [str(w.message) for w in caught]
    assert [m for m in messages if not harmless(m, obs_type != "rgb")] == []


def test_the_passive_checker_is_content(tiny_world: Path) -> None:
    env = gymnasium.make(ID, world=tiny_world, render_mode="rgb_array", **CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        for _ in range(5):
            if any(env.step(env.action_space.sample())[2:4]):
                env.reset()
            env.render()


@pytest.mark.skipif(find_spec("moviepy") is None, reason="RecordVideo needs moviepy")
def test_record_video(endless_world: Path, tmp_path: Path) -> None:
    env = gymnasium.make(ID, world=endless_world, render_mode="rgb_array", **CPU)
    env = wrappers.RecordVideo(wrappers.TimeLimit(env, 5), str(tmp_path), lambda episode: True)
    env.reset(seed=0)
    while not any(env.step(0)[2:4]):
        pass
    env.close()
    assert [p.stat().st_size > 0 for p in tmp_path.glob("*.mp4")] == [True]


def test_record_episode_statistics(tiny_world: Path) -> None:
    env = wrappers.RecordEpisodeStatistics(
        gymnasium.make(ID, world=tiny_world, max_episode_steps=4, **CPU)
    )
    env.reset(seed=0)
    total, steps, ended = 0.0, 0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(1)
        total, steps, ended = total + reward, steps + 1, terminated or truncated
    assert info["episode"]["l"] == steps
    assert info["episode"]["r"] == pytest.approx(total)


def test_gymnasiums_time_limit_truncates_the_single_env(endless_world: Path) -> None:
    env = gymnasium.make(ID, world=endless_world, max_episode_steps=3, **CPU)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_record_episode_statistics(tiny_world: Path, mode: AutoresetMode) -> None:
    if mode == AutoresetMode.SAME_STEP and version.parse(gymnasium.__version__).release < (1, 4):
        pytest.skip("Gymnasium's own wrapper counts such episodes only since 1.4")
    plain = NFDVectorEnv(tiny_world, 3, max_episode_steps=6, autoreset_mode=mode, **CPU)
    env = wrappers.vector.RecordEpisodeStatistics(
        NFDVectorEnv(tiny_world, 3, max_episode_steps=6, autoreset_mode=mode, **CPU)
    )
    plain.reset(seed=0), env.reset(seed=0)
    total, length, ends = np.zeros(3), np.zeros(3, int), 0
    for a in np.random.default_rng(0).integers(0, 3, (20, 3)):
        _, reward, terminated, truncated, info = env.step(a)
        expected = plain.step(a)
        running = expected[4]["_hazard"]  # False on a reset step
        total, length = total + reward, length + running
        ended = terminated | truncated
        assert np.array_equal(ended, expected[2] | expected[3])
        if ended.any():
            ends += int(ended.sum())
            assert np.array_equal(info["_episode"], ended)
            np.testing.assert_allclose(info["episode"]["r"][ended], total[ended], rtol=1e-4)
            assert np.array_equal(info["episode"]["l"][ended], length[ended])
            total[ended], length[ended] = 0, 0
    assert ends > 6


def test_vector_wrappers(tiny_world: Path) -> None:
    env: Any = NFDVectorEnv(tiny_world, 2, render_mode="rgb_array", **CPU)
    env = wrappers.vector.GrayscaleObservation(env)
    env = wrappers.vector.ResizeObservation(env, (16, 24))
    env = wrappers.vector.ClipReward(env, -0.01, 0.01)
    env = wrappers.vector.RescaleObservation(env, 0.0, 1.0)
    env.reset(seed=0)
    observation, reward, *_ = env.step(env.action_space.sample())
    assert observation.shape == (2, 16, 24) and observation.max() <= 1
    assert np.abs(reward).max() <= 0.01
    assert len(env.render()) == 2


def test_single_wrappers(tiny_world: Path) -> None:
    env: Any = gymnasium.make(ID, world=tiny_world, **CPU)
    env = wrappers.FrameStackObservation(wrappers.GrayscaleObservation(env), 4)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (4, 32, 48)


def test_normalizing_vector_wrappers(endless_world: Path) -> None:
    env: Any = NFDVectorEnv(endless_world, 2, obs_type="latent", **CPU)
    env = wrappers.vector.NormalizeObservation(wrappers.vector.NormalizeReward(env))
    env.reset(seed=0)
    assert np.isfinite(env.step(np.array([0, 1]))[0]).all()


def test_play(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    from gymnasium.utils.play import play

    steps: list[int] = []

    def after_step(before, now, action, reward, terminated, truncated, info) -> None:
        steps.append(int(action))
        key, kind = (pygame.K_d, pygame.KEYDOWN) if len(steps) == 2 else (None, pygame.QUIT)
        if len(steps) == 2:
            pygame.event.post(pygame.event.Event(kind, key=key))
        if len(steps) == 5:
            pygame.event.post(pygame.event.Event(kind))

    env = gymnasium.make(ID, world=tiny_world, render_mode="rgb_array", **CPU)
    play(env, fps=200, noop=0, seed=0, callback=after_step)
    assert steps[:2] == [0, 0]
    assert steps[3:5] == [1, 1]  # the key "d" is held: right


def test_stable_baselines3(endless_world: Path) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    from stable_baselines3 import PPO

    env = gymnasium.make(ID, world=endless_world, max_episode_steps=10, **CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="stable_baselines3")
        warnings.filterwarnings("ignore", message="The minimal resolution")  # of a tiny world
        checker.check_env(env.unwrapped)
    agent = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    agent.learn(16)
    assert agent.predict(env.reset()[0])[0] in env.action_space


def test_torchrl(endless_world: Path) -> None:
    pytest.importorskip("torchrl")
    from torchrl.envs import GymEnv, GymWrapper
    from torchrl.envs.utils import check_env_specs

    check_env_specs(GymWrapper(NFDEnv(endless_world, **CPU)))
    env = GymEnv(ID, world=endless_world, obs_type="latent", **CPU)
    rollout = env.rollout(4)
    assert rollout["next", "observation"].shape == (4, 4, 4, 6)


# -------------------------------------------------------- what clients ask of infos and names


def same_kind(left: Any, right: Any) -> bool:
    """The same keys, numpy types and shapes, through dicts."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_kind(left[k], right[k]) for k in left)
    assert isinstance(left, np.ndarray | np.generic) and left.dtype != object
    return (type(left), left.dtype, left.shape) == (type(right), right.dtype, right.shape)


def test_what_info_tells_of_speculation_is_of_the_kind_that_was_asked_for(
    endless_world: Path,
) -> None:
    env = NFDVectorEnv(endless_world, 2, output="torch", speculative_frames=2, **CPU)
    env.reset(seed=0)
    info = env.step([0, 1])[4]
    kinds = {type(part) for part in (*info["speculation"].values(), info["_speculation"])}
    assert kinds == {torch.Tensor}


def test_a_seed_is_of_the_envs_own_generator_too(endless_world: Path) -> None:
    env = NFDVectorEnv(endless_world, 2, **CPU)
    drawn = []
    for seed in (5, [5, None], 6):
        env.reset(seed=seed)
        drawn.append(env.np_random.random())
    assert drawn[0] == drawn[1] != drawn[2]
    env.reset()
    assert env.np_random.random() != drawn[2]  # and goes on without one


INFOS = [{}, {"ood": True, "context_observations": 2, "speculative_frames": 2, "frame_skip": 2}]


@pytest.mark.parametrize("kwargs", INFOS, ids=["usual", "everything"])
@pytest.mark.parametrize("obs_type", ["rgb", "features"])
def test_infos_are_alike_at_reset_and_step(
    endless_world: Path, kwargs: dict[str, Any], obs_type: str
) -> None:
    single = NFDEnv(endless_world, obs_type=obs_type, **kwargs, **CPU)
    batch = NFDVectorEnv(endless_world, 3, obs_type=obs_type, **kwargs, **CPU)
    wanted = {"hazard", "precision"} | ({"ood", "context", "speculation"} if kwargs else set())
    for env, action in ((single, 1), (batch, [0, 1, 2])):
        _, begun = env.reset(seed=0)
        stepped = env.step(action)[4]
        again = env.reset()[1]
        assert {name for name in begun if name[0] != "_"} == wanted
        assert same_kind(begun, stepped) and same_kind(begun, again)
        assert np.all(begun["hazard"] == 0) and np.all(stepped["precision"] == 32)
    assert type(single.step(1)[4]["hazard"]) is np.float32


@pytest.mark.parametrize("kwargs", INFOS, ids=["usual", "everything"])
def test_minari_records_infos(endless_world: Path, tmp_path: Path, kwargs: dict[str, Any]) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax", reason="Minari records with jax: pip install 'minari[create]'")
    env = gymnasium.make(ID, world=str(endless_world), max_episode_steps=3, **kwargs, **CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        collector = minari.DataCollector(env, record_infos=True)
        for episode in range(2):
            collector.reset(seed=episode)
            while not any(collector.step(collector.action_space.sample())[2:4]):
                pass
        collector.create_dataset("tests/tiny-v0")
        (first, _) = minari.load_dataset("tests/tiny-v0").iterate_episodes()
        collector.close()
    assert first.infos["hazard"].shape == (4,) and first.infos["hazard"].dtype == np.float32


def test_torchrl_reads_infos(endless_world: Path) -> None:
    pytest.importorskip("torchrl")
    from torchrl.envs import GymWrapper

    env = GymWrapper(NFDEnv(endless_world, ood=True, **CPU)).auto_register_info_dict()
    rollout = env.rollout(3)
    assert rollout["next", "hazard"].shape[0] == 3 and rollout["next", "ood"].shape[0] == 3


def test_attributes_by_name(endless_world: Path) -> None:
    env = NFDVectorEnv(endless_world, 2, render_mode="rgb_array", **CPU)
    env.reset(seed=3)
    pictures = env.call("render")
    assert len(pictures) == 2 and np.array_equal(np.stack(pictures), env.frames())
    assert env.get_attr("action_space") == (env.single_action_space,) * 2
    assert env.get_attr("np_random_seed") == (3, 4)
    assert env.get_attr("frame_skip") == (1, 1)
    env.set_attr("max_episode_steps", 1)
    assert env.step([0, 0])[3].all()
    env.set_attr("max_episode_steps", [5, 5])
    assert env.max_episode_steps == 5
    for values in ([5, 6], [5]):
        with pytest.raises(ValueError, match="one value, or 2 equal ones"):
            env.set_attr("max_episode_steps", values)
    with pytest.raises(AttributeError, match="no_such"):
        env.get_attr("no_such")


def test_names_of_actions(endless_world: Path, make_world: Callable[..., Path]) -> None:
    names = ["NOOP", "RIGHT", "LEFT"]
    env = gymnasium.make(ID, world=endless_world, **CPU)
    assert env.unwrapped.get_action_meanings() == names  # type: ignore[attr-defined]
    batch = gymnasium.make_vec(ID, num_envs=2, world=endless_world, **CPU)
    assert batch.unwrapped.call("get_action_meanings") == (names, names)  # type: ignore[attr-defined]
    box = NFDEnv(make_world(action_space=SPACES[2]), **CPU)
    with pytest.raises(ValueError, match="only actions of a Discrete space have names"):
        box.get_action_meanings()


def test_ataris_wrappers_go_on(endless_world: Path) -> None:
    atari = pytest.importorskip("stable_baselines3.common.atari_wrappers")
    env = gymnasium.make(ID, world=endless_world, **CPU)
    env = atari.ClipRewardEnv(atari.MaxAndSkipEnv(atari.NoopResetEnv(env, noop_max=3), skip=2))
    env.reset(seed=0)
    assert env.step(1)[0].shape == (32, 48, 3)


@pytest.mark.parametrize("skip", [1, 4, 7, 100])
def test_a_whole_frame_rate(endless_world: Path, skip: int) -> None:
    for env in (
        NFDEnv(endless_world, frame_skip=skip, **CPU),
        NFDVectorEnv(endless_world, 2, frame_skip=skip, **CPU),
    ):
        fps = env.metadata["render_fps"]
        assert type(fps) is int and fps == max(1, round(35 / skip))


def test_a_closed_env_says_so(endless_world: Path) -> None:
    single, batch = NFDEnv(endless_world, **CPU), NFDVectorEnv(endless_world, 2, **CPU)
    single.reset(seed=0), batch.reset(seed=0)
    state = batch.save_state()
    single.close(), batch.close()
    single.close()  # twice does no harm
    calls: list[Callable[[], Any]] = [
        lambda: single.step(0),
        lambda: single.reset(),
        lambda: single.render(),
        lambda: batch.step([0, 0]),
        lambda: batch.reset(),
        lambda: batch.save_state(),
        lambda: batch.restore_state(state),
        lambda: batch.take([0]),
    ]
    for call in calls:
        with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="was closed"):
            call()


def test_help_shows_the_arguments_of_the_single_env() -> None:
    parameters = inspect.signature(NFDEnv).parameters
    whole = inspect.signature(NFDVectorEnv).parameters
    assert list(parameters) == [n for n in whole if n not in ("num_envs", "autoreset_mode")]
    assert parameters["temperature"].default is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sampling_step", "did you mean 'sampling_steps'"), ("num_envs", ""), ("x", "see help")],
)
def test_unknown_arguments(endless_world: Path, name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'.*{hint}"):
        NFDEnv(endless_world, "cpu", **{name: 1})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'.*{hint}"):
        gymnasium.make(ID, world=endless_world, **{name: 1})
