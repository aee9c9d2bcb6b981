"""llmkit.shield: an ending runs to its end."""

from __future__ import annotations

import asyncio

import pytest

from llmkit.shield import shielded
from tests.layers.script import run


def test_endings_are_out_of_reach_of_cancellation() -> None:
    async def main() -> None:
        steps: list[str] = []
        gate = asyncio.Event()

        async def ending() -> None:
            steps.append("begun")
            await gate.wait()
            steps.append("middle")
            await asyncio.sleep(0)
            steps.append("done")

        task = asyncio.create_task(shielded(ending()))
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["begun", "middle", "done"]

    run(main)


def test_shielded_hands_on_what_the_work_raises_before_and_after_it_waits() -> None:
    async def main() -> None:
        async def fails(wait: bool) -> None:
            if wait:
                await asyncio.sleep(0)
            raise ValueError("x")

        for wait in (False, True):
            with pytest.raises(ValueError, match="x"):
                await shielded(fails(wait))

    run(main)
