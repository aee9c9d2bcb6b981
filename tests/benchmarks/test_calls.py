"""A guarded call against bare httpx with its defaults doing the same request and parsing the same JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from typing import Self

import aiohttp
import httpx
import pytest

import llmkit
from tests.benchmarks.conftest import Times, in_turn

PROMPT = "Explain SSE in one line."
_NUMBERS = itertools.count()


def new_prompt() -> str:
    """One that was never asked: a stored answer is another matter (test_cache.py)."""
    return f"{PROMPT} {next(_NUMBERS)}"


def body(*, stream: bool = False, tokens: int | None = None) -> dict:
    document = {"model": "bench", "messages": [{"role": "user", "content": PROMPT}], "stream": stream}
    if tokens:
        document |= {"max_tokens": tokens, "stream_options": {"include_usage": True}}
    return document


def config(url: str, tmp_path, latency_ms: int = 0, **settings) -> llmkit.Config:
    """Every layer on: a price known, so budgets hold and settle, ledger and cache on disk."""
    return llmkit.Config.load(
        start=tmp_path,
        environ={"LLMKIT_DATA_DIR": str(tmp_path)},
        model="bench",
        models={
            "bench": {
                "provider": "vllm",
                "model": "bench",
                "base_url": f"{url}/{latency_ms}",
                "price": {"input": 0.1, "output": 0.3},
                "max_output": 4096,
            }
        },
        **settings,
    )


async def pooled(one, calls: int, at_once: int) -> None:
    """``calls`` calls, never more than ``at_once`` under way: workers, as bulk work is done."""
    left = iter(range(calls))

    async def worker() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*[worker() for _ in range(at_once)])


class Pair:
    """The same request by both."""

    def __init__(self, url: str, tmp_path, latency_ms: int = 0) -> None:
        self.url = f"{url}/{latency_ms}/chat/completions"
        self.httpx = httpx.AsyncClient()
        self.llmkit = llmkit.AsyncClient(config=config(url, tmp_path, latency_ms))

    async def by_httpx(self) -> str:
        response = await self.httpx.post(self.url, json=body())
        return response.json()["choices"][0]["message"]["content"]

    async def by_llmkit(self) -> str:
        return (await self.llmkit.complete(new_prompt())).text

    async def __aenter__(self) -> Self:
        assert await self.by_httpx() == await self.by_llmkit()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.httpx.aclose()
        await self.llmkit.aclose()


def repeat(one, calls: int):
    async def run() -> None:
        for _ in range(calls):
            await one()

    return run


def test_sequential_call(benchmark, server, tmp_path, state) -> None:
    async def main():
        async with Pair(server, tmp_path) as pair:
            return await in_turn(repeat(pair.by_llmkit, 50), repeat(pair.by_httpx, 50), 50, rounds=40)

    ours, bare = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    state("sequential call, wall", ours.wall, bare.wall, 0.55)
    state("sequential call, CPU", ours.cpu, bare.cpu, 0.55)


def test_64_at_once(benchmark, server, tmp_path, state) -> None:
    async def main():
        async with Pair(server, tmp_path) as pair:
            return await in_turn(
                lambda: pooled(pair.by_llmkit, 2000, 64), lambda: pooled(pair.by_httpx, 2000, 64), 2000, rounds=3
            )

    ours, bare = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    state("calls per second, 64 at once", bare.wall, ours.wall, 6, at_least=True)


def test_64_at_once_at_50_ms(benchmark, server, tmp_path, state) -> None:
    """Bare aiohttp stands beside it: how near to the ideal this machine, this loop and this server let anybody come."""

    async def main():
        async with (
            Pair(server, tmp_path, 50) as pair,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        ):

            async def by_aiohttp() -> None:
                async with session.post(pair.url, json=body()) as response:
                    await response.json()

            return await in_turn(
                lambda: pooled(pair.by_llmkit, 2000, 64), lambda: pooled(by_aiohttp, 2000, 64), 2000, rounds=3
            )

    ours, bare = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    ideal = [0.05 / 64] * 3
    print(
        f"\nbare aiohttp, share of the ideal: {statistics.median(i / b for i, b in zip(ideal, bare.wall, strict=True)):.2f}"
    )
    state("share of the ideal 64 per 50 ms", ideal, ours.wall, 0.9, at_least=True)


def test_sequential_call_after_a_burst(benchmark, server, tmp_path, state) -> None:
    async def main():
        after, before = [], []
        for _ in range(5):  # a fresh client each time: a burst leaves its connections behind
            async with Pair(server, tmp_path) as fresh:
                await repeat(fresh.by_llmkit, 100)()
                first, second = Times(), Times()
                for _ in range(3):
                    await first.round(repeat(fresh.by_llmkit, 300), 300)
                await pooled(fresh.by_llmkit, 640, 64)
                for _ in range(3):
                    await second.round(repeat(fresh.by_llmkit, 300), 300)
            before.append(min(first.wall))
            after.append(min(second.wall))
        return after, before

    after, before = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    state("a call after a burst of 64 against one before", after, before, 1.1)


@pytest.mark.parametrize("chunks", [500])
def test_streamed_chunk(benchmark, server, tmp_path, state, chunks: int) -> None:
    async def main():
        async with Pair(server, tmp_path) as pair:

            async def by_httpx() -> int:
                text = []
                async with pair.httpx.stream("POST", pair.url, json=body(stream=True, tokens=chunks)) as response:
                    async for line in response.aiter_lines():
                        if not line.startswith("data: ") or line == "data: [DONE]":
                            continue
                        choices = json.loads(line[6:])["choices"]
                        if choices and (piece := choices[0]["delta"].get("content")):
                            text.append(piece)
                return len("".join(text))

            async def by_llmkit() -> int:
                text = []
                async with pair.llmkit.stream(new_prompt(), max_tokens=chunks) as reply:
                    async for chunk in reply:
                        text.append(chunk.text)
                return len("".join(text))

            assert await by_httpx() == await by_llmkit() == 5 * chunks
            return await in_turn(repeat(by_llmkit, 5), repeat(by_httpx, 5), 5 * chunks)

    ours, bare = benchmark.pedantic(lambda: asyncio.run(main()), rounds=1)
    state("streamed chunk, CPU", ours.cpu, bare.cpu, 0.8)
