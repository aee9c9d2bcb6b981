"""Benchmarks compare two things in one run, in turn, and state a ratio; single times on a shared machine mean nothing.

Run them by hand: ``python -m pytest tests/benchmarks``. The client keeps one core, the loopback server the other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The base of the loopback server's URLs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("server.py")], stdout=subprocess.PIPE, text=True
    )
    if len(cores) > 1:
        os.sched_setaffinity(process.pid, {cores[1]})
        os.sched_setaffinity(0, {cores[0]})
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()
    if cores:
        os.sched_setaffinity(0, cores)


class Times:
    """Seconds per call, on the wall and of this process's CPU, one pair a round."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    async def round(self, work: Callable[[], Awaitable[object]], calls: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        await work()
        self.cpu.append((time.process_time() - cpu) / calls)
        self.wall.append((time.perf_counter() - wall) / calls)


async def in_turn(a: Callable[[], Awaitable[object]], b: Callable[[], Awaitable[object]], calls: int, rounds: int = 9):
    """Run both in turn; the times of each. One round of each is not counted."""
    times = Times(), Times()
    for number in range(rounds + 1):
        for work, kept in ((a, times[0]), (b, times[1])):
            await (Times() if not number else kept).round(work, calls)
    return times


@pytest.fixture
def state(benchmark, record_property):
    """Say a ratio, and hold it against its target."""

    def say(name: str, a: list[float], b: list[float], target: float, *, at_least: bool = False) -> None:
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        benchmark.extra_info[name] = round(ratio, 3)
        record_property(name, ratio)
        verb = "at least" if at_least else "at most"
        print(
            f"\n{name}: {ratio:.2f} (target: {verb} {target:g}; "
            f"{statistics.median(a) * 1e6:.1f} µs against {statistics.median(b) * 1e6:.1f} µs)"
        )
        assert ratio >= target if at_least else ratio <= target, name

    return say
