"""Plan in the learned world, act in the real game: ``python -m examples.planning``.

Random shooting: the world continues from the game's last frames once for every candidate plan, with
the same luck for all; the key that begins the plan with the best chance to survive is held next.
"""

from __future__ import annotations

import argparse

import gymnasium
import numpy as np

from nfd_env import NFDVectorEnv, make_real
from nfd_env.sources.source import SourceError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=350, help="frames to act for")
parser.add_argument("--plans", type=int, default=16, help="candidates at each decision")
parser.add_argument("--keys", type=int, default=3, help="keys in a plan, each held for 8 frames")
args = parser.parse_args()

try:
    game, name = make_real("DoomTakeCover"), "real game"
except SourceError as error:
    game, name = gymnasium.make("nfd_env:NFD/DoomTakeCover-v0"), "learned world"
    print(f"acting in the learned world, which proves nothing about the game: {error}")

seen = NFDVectorEnv("DoomTakeCover", 1, obs_type="latent")
plans = NFDVectorEnv("DoomTakeCover", args.plans, obs_type="latent", frame_skip=8)
rng = np.random.default_rng(0)
frames, actions, score, key = [game.reset(seed=0)[0]], [], 0.0, 0
for step in range(args.steps):
    if step % 4 == 0:  # look again
        past = {"frames": np.stack(frames), "actions": np.array(actions, int)}
        seen.reset(seed=step, options={"context": past})
        plans.restore_state(seen.save_state([0] * args.plans))
        candidates = rng.integers(3, size=(args.keys, args.plans))
        survival = np.ones(args.plans)
        for keys in candidates:
            _, _, died, _, infos = plans.step(keys)
            survival *= np.where(died, 0.0, 1 - infos["hazard"])
        key = int(candidates[0, survival.argmax()])
    frame, reward, terminated, truncated, _ = game.step(key)
    frames, actions, score = [*frames[-15:], frame], [*actions[-14:], key], score + float(reward)
    if terminated or truncated:
        break
print(f"{name}: score {score:.0f} in at most {args.steps} frames")
