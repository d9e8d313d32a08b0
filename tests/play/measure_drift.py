"""Where the drift bar should turn red: ``python -m tests.play.measure_drift [WORLD ...]``.

Prints how unlike real pictures (``info["ood"]``) are a world's recorded moments, those of its real
game (which must be installed), and what it makes of random play, also at twice the temperature,
where pictures fall apart.
"""

import argparse

import numpy as np
import torch

from nfd_env import NFDVectorEnv
from nfd_env.play.drift import RED
from nfd_env.worlds.load import make_real, shipped_worlds

PLAYS = 8  # copies that are played at a time
QUANTILES = (0, 50, 95, 100)


def real(env, name, frames):
    """Of the real game under random play."""
    game, model, found, over = make_real(name), env.model, [], True
    game.action_space.seed(0)
    for step in range(frames):
        if over:
            (frame, _), over = game.reset(seed=step), False
        else:
            frame, _, terminated, truncated, _ = game.step(game.action_space.sample())
            over = terminated or truncated
        found.append(model.encode(torch.from_numpy(frame)[None].to(model.device)))
    game.close()
    return relative(env, torch.cat(found))


def relative(env, latents):
    """Re-encoding errors of latents relative to real ones, a chunk at a time."""
    model, found = env.model, []
    for part in latents.split(32):
        part = part.to(model.device, torch.float32)
        found.append(model.reencoding_error(part, model.decode(part)).cpu())
    return torch.cat(found).numpy() / env._ood_scale


def played(env, steps):
    """Of random play, all episodes together."""
    rng, found = np.random.default_rng(0), []
    env.reset(seed=1)
    env.action_space.seed(int(rng.integers(2**31)))
    for _ in range(steps):
        info = env.step(env.action_space.sample())[4]
        found.append(info["ood"][info["_ood"]])
    return np.concatenate(found)


def line(what, drift):
    quantiles = " / ".join(f"{np.percentile(drift, q):.2f}" for q in QUANTILES)
    red = (drift > RED).mean()
    print(f"| {what} | {len(drift)} | {quantiles} | {red:.1%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worlds", nargs="*", default=shipped_worlds())
    parser.add_argument("--steps", type=int, default=60, help="of each play")
    args = parser.parse_args()
    print("| frames | number | drift: least / median / 95th percentile / most | red |")
    print("|---|---|---|---|")
    for name in args.worlds:
        env = NFDVectorEnv(name, PLAYS, ood=True)
        starts = torch.cat([start.latents for start in env.world.starts])
        line(f"{name}: recorded moments", relative(env, starts))
        line(f"{name}: the real game, random play", real(env, name, 4 * PLAYS * args.steps))
        line(f"{name}: random play", played(env, args.steps))
        hot = 2 * env.model.sampling.temperature
        env.set_sampling(temperature=hot)
        line(f"{name}: at twice the temperature", played(env, args.steps))
        env.close()


if __name__ == "__main__":
    main()
