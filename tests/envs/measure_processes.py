"""One process against several on one machine: ``python -m tests.envs.measure_processes``.

Prints the env steps a second of all processes together, which share the environments and the cores.
"""

import argparse
import multiprocessing
import os
import time

import numpy as np
import torch

from nfd_env import NFDVectorEnv


def play(world, num_envs, seconds, seed, ready, done):
    """Step one process's part with random actions from when all are ready on."""
    env = NFDVectorEnv(world, num_envs, obs_type="latent", output="torch")
    env.reset(seed=seed)
    actions = np.random.default_rng(seed)
    space = env.single_action_space
    space.seed(seed)
    chosen = [np.array([space.sample() for _ in range(num_envs)]) for _ in range(64)]
    for step in range(16):  # the window fills
        env.step(chosen[step])
    ready.wait()
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        env.step(chosen[actions.integers(64)])
        steps += num_envs
    done.put(steps / seconds)


def measure(world, num_envs, processes, threads, seconds):
    """Env steps a second of all processes."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(processes), context.Queue()
    share = num_envs // processes
    # Else each had one thread: see nfd_env.envs.guests.
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    workers = [
        context.Process(
            target=play, args=(world, share, seconds, n * share, ready, done), daemon=True
        )
        for n in range(processes)
    ]
    for worker in workers:
        worker.start()
    return sum(done.get(timeout=seconds + 300) for _ in workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="BigFish")
    parser.add_argument("--num-envs", type=int, default=32, help="of all processes together")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3, help="each measured in turn")
    args = parser.parse_args()
    rates = {n: [] for n in args.processes}
    for _ in range(args.rounds):
        for n, found in rates.items():
            found.append(measure(args.world, args.num_envs, n, args.threads, args.seconds))
    print("| processes | env steps/s, all rounds | relative to the first |\n| --- | --- | --- |")
    first = np.median(rates[args.processes[0]])
    for n, found in rates.items():
        shown = ", ".join(f"{rate:.0f}" for rate in found)
        print(f"| {n} | {shown} | {np.median(found) / first:.2f} |")
