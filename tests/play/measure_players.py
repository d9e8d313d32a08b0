"""Many simulated players of a served world: ``python -m tests.play.measure_players``.

Prints what each gets, and how long inputs and ticks take, for each number of workers.
"""

import argparse
import asyncio

import aiohttp
import numpy as np

from tests.play.test_load import play, serving
from tests.play.test_server import Client


async def measure(world, players, workers, seconds):
    """One line about a server with so many workers."""
    options = ("--workers", str(workers)) if workers > 1 else ()
    async with serving(world, players, *options, patience=200) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            clients = [Client(server, http, seed=i) for i in range(players)]
            await asyncio.gather(*(client.__aenter__() for client in clients))
            await play(clients, 10**9, seconds / 2)  # engines learn what batches cost
            await play(clients, 10**9, seconds)
            rates = np.array([len(c.gaps) / seconds for c in clients])
            gaps = np.concatenate([c.gaps for c in clients])
            latencies = np.concatenate([c.latencies for c in clients])
            dropped = sum(c.headers[-1]["dropped"] for c in clients)
            for client in clients:
                await client.__aexit__()
        await server.stop()
    quantiles = [1000 * np.percentile(x, q) for x in (gaps, latencies) for q in (50, 95)]
    return (
        f"| {players} | {workers} | {rates.min():.1f} / {rates.mean():.1f} / {rates.max():.1f} "
        f"| {rates.sum():.0f} | {quantiles[0]:.0f} / {quantiles[1]:.0f} "
        f"| {quantiles[2]:.0f} / {quantiles[3]:.0f} | {dropped} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="BigFish")
    parser.add_argument("--players", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    print(
        "| players | workers | pictures/s each: least / mean / most | all "
        "| ms between two: p50 / p95 "
        "| input to picture, ms: p50 / p95 | dropped |\n|" + "---|" * 7
    )
    for workers in args.workers:
        print(asyncio.run(measure(args.world, args.players, workers, args.seconds)), flush=True)
