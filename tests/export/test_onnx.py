"""A world's ONNX files, run by onnxruntime, against the environment."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from nfd_env.cli import main  # noqa: E402
from nfd_env.envs.vector_env import START_SALT, NFDVectorEnv  # noqa: E402
from nfd_env.export.onnx import ring_shape  # noqa: E402
from nfd_env.inference.noise import mix, noise  # noqa: E402


class Player:
    """What static/world.js does: one environment, by the ONNX files of ``folder`` alone."""

    def __init__(self, folder, world):
        self.spec, self.model = world.spec, world.model
        self.starts = len(world.starts)
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(path) for path in folder.glob("*.onnx")
        }

    def run(self, name, **inputs):
        return self.sessions[name].run(None, inputs)

    def noise(self, frame):
        shape = 2 + self.spec.sampling.renoisings, *self.model.dynamics.config.latent_shape
        keys, frames = torch.tensor([self.key]), torch.tensor([frame])
        normal, uniform = noise(keys, frames, int(np.prod(shape)))
        return normal[0].view(shape).numpy(), uniform.item()

    def reset(self, seed, episode):
        c = self.model.dynamics.config
        self.key = mix(seed, episode)
        start = np.array([mix(seed, episode, START_SALT) % self.starts])
        latents, actions = self.run("starts", start=start)
        latents, actions = latents.astype(np.float32), actions.astype(np.float32)
        self.memory = np.zeros((1, self.model.heads.memory_size), np.float32)
        for k in range(1, len(latents)):
            self.judge(latents[k], actions[k])
        self.before = np.zeros(c.latent_shape, np.float32)
        self.recent = np.zeros((c.recent, *c.latent_shape), np.float32)
        self.ring = [np.zeros(ring_shape(c), np.float32)] * 2
        for frame, (z, action) in enumerate(list(zip(latents, actions, strict=True))[-c.window :]):
            if frame:
                self.draw(self.action, self.noise(frame - 1)[0])
            self.frame = frame
            self.remember(z, self.noise(frame)[0], action)
        return self.run("decoder", latents=latents[-1:])[0]

    def remember(self, latents, normal, action):
        level = np.float32(self.spec.sampling.history_level)
        self.recent = np.concatenate((self.recent, self.before[None]))[1:]
        self.before, self.action = latents + level * (normal[1] - latents), action

    def draw(self, action, normal):
        latents, *self.ring = self.run(
            "dynamics",
            before=self.before[None],
            action_before=self.action[None],
            action=action[None],
            frame=np.array([self.frame]),
            noise=np.delete(normal, 1, 0),
            keys=self.ring[0],
            values=self.ring[1],
            **({"recent": self.recent[None]} if len(self.recent) else {}),
        )
        return latents

    def judge(self, latents, action):
        reward, hazard, self.memory = self.run(
            "heads", latents=latents[None], action=action[None], memory=self.memory
        )
        return reward[0], hazard[0]

    def step(self, action):
        normal, uniform = self.noise(self.frame + 1)
        latents = self.draw(action, normal)
        self.frame += 1
        reward, hazard = self.judge(latents[0], action)
        self.remember(latents[0], normal, action)
        return self.run("decoder", latents=latents)[0], reward, uniform < hazard


def check(world, folder, steps=50, episodes=2):
    """Frames, rewards and ends of the files are the environment's, over resets too."""
    env = NFDVectorEnv(world, device="cpu", precision="fp32")
    frames, _ = env.reset(seed=7)
    player, episode = Player(folder, env.world), 0
    assert np.abs(player.reset(7, 0).astype(int) - frames[0]).max() <= 1
    env.action_space.seed(0)
    seen = 0
    for _ in range(steps):
        actions = env.action_space.sample()
        encoded = env.world.codec.encode(torch.from_numpy(actions))[0].numpy()
        frame, reward, terminated = player.step(encoded)
        frames, rewards, terminations, truncations, _ = env.step(actions)
        assert np.abs(frame.astype(int) - frames[0]).max() <= 2
        assert reward == pytest.approx(rewards[0], abs=1e-3)
        assert terminated == terminations[0]
        seen = max(seen, int(np.abs(frames[0].astype(int) - 128).max()))
        if terminated:
            episode += 1
            frames = env.step(actions)[0]  # which resets
            assert np.abs(player.reset(7, episode).astype(int) - frames[0]).max() <= 1
    assert seen > 30  # pictures of one grey would always agree
    return episode


BOX = {"type": "Box", "low": [-1.0, 0.0], "high": [1.0, 4.0], "dtype": "float32"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"distilled": True, "hazard_bias": -2.0},
        {"hazard_bias": -1000.0, "action_space": BOX, "window": 3},
    ],
    ids=["one step of a student, ends", "two steps of a flow model, longer starts than its window"],
)
def test_files_play_as_the_environment_does(make_world, tmp_path, kwargs):
    world = make_world(**kwargs)
    assert main(["export-onnx", str(world), "-o", str(tmp_path / "files")]) == 0
    names = ["decoder.onnx", "dynamics.onnx", "heads.onnx", "starts.onnx"]
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == names
    for path in (tmp_path / "files").iterdir():
        assert b"nfd_env/" not in path.read_bytes()  # sources, and where they lie
    episodes = check(world, tmp_path / "files")
    assert episodes >= 1 if "distilled" in kwargs else episodes == 0
