"""100,000 calls in one process leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import resource
from pathlib import Path

import llmkit
from tests.benchmarks.test_calls import config, new_prompt, pooled


def resident_mb() -> float:
    status = Path("/proc/self/statm")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6


def test_100_000_calls(benchmark, server, tmp_path) -> None:
    async def main() -> list[float]:
        levels = []
        async with llmkit.AsyncClient(
            config=config(server, tmp_path, cache={"memory_bytes": "1MB"}, budget={"session": {"usd": 1000}})
        ) as client:
            for _ in range(10):
                await pooled(lambda: client.complete(new_prompt()), 10_000, 64)
                gc.collect()
                levels.append(resident_mb())
            assert len(client.calls(limit=200_000)) == 100_000
        return levels

    levels = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    print("\nMB resident after each 10,000 calls:", [round(level, 1) for level in levels])
    assert levels[-1] - levels[1] < 3  # the first rounds fill pools and caches
