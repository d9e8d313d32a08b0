"""PPO of skrl in a learned world: ``python -m examples.skrl_ppo``.

Needs ``pip install 'nfd-env[skrl]'``.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.trainers.torch import SequentialTrainer
from skrl.utils.model_instantiators.torch import categorical_model, deterministic_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=2000, help="decisions of each environment")
parser.add_argument("--num-envs", type=int, default=8)
args = parser.parse_args()

world = {"obs_type": "features", "frame_skip": 4, "max_episode_steps": 525}
made = gymnasium.make_vec("nfd_env:NFD/DoomTakeCover-v0", num_envs=args.num_envs, **world)
env = wrap_env(made)
spaces: dict[str, Any] = {
    "observation_space": env.observation_space,
    "action_space": env.action_space,
}
layers = [{"name": "net", "input": "OBSERVATIONS", "layers": [256], "activations": "tanh"}]
common: dict[str, Any] = {**spaces, "device": env.device, "network": layers}
models: dict[str, Any] = {
    "policy": categorical_model(**common, output="ACTIONS"),
    "value": deterministic_model(**common, output="ONE"),
}
steps = min(64, args.steps)
memory = RandomMemory(memory_size=steps, num_envs=env.num_envs, device=env.device)
settings = PPO_CFG(rollouts=steps, learning_epochs=4)
settings.experiment.write_interval = settings.experiment.checkpoint_interval = 0  # no files
agent = PPO(models=models, memory=memory, cfg=settings, device=env.device, **spaces)
trainer = SequentialTrainer(env=env, agents=agent, cfg={"timesteps": args.steps, "headless": True})
trainer.train()
trainer.eval()
print(f"trained and played {args.steps} decisions in each of {env.num_envs} environments")
env.close()
