"""``llmkit demo``: the main job in a terminal, and what happens when things go wrong.

Without ``--model`` everything is asked of the simulator and booked in memory, whatever keys and settings there are.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

from llmkit import portal
from llmkit.client import AsyncClient
from llmkit.config import Config
from llmkit.errors import LLMKitError
from llmkit.money import money
from llmkit.notebook.asking import ask
from llmkit.notebook.display import Terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import httpx

__all__ = ["run"]

PROMPT = "Explain server-sent events in one line."
COLUMNS = ("model", "status", "attempts", "tokens", "cost", "source", "error")


def run(arguments: argparse.Namespace) -> int:
    """Ask a model, or show what llmkit does on the simulator. Always 0: what fails on purpose is no failure."""
    prompt = arguments.prompt or PROMPT
    if arguments.model is not None:
        with _Stage(Config.load(model=arguments.model)) as stage:
            stage.ask(prompt, model=arguments.model)
        return 0
    from llmkit.testing import Fault, Simulator

    simulator = Simulator(latency_s=0.2, token_delay_s=0.02)
    with _Stage(Config.of(model="simulator", state_url="memory"), simulator) as stage:
        stage.title("A prompt. Below the answer: model, tokens, cost, time, and where it came from")
        stage.ask(prompt)
        stage.title("The server is overloaded and asks for two seconds: the wait is shown, then it is asked again")
        simulator.fail(Fault.status(503, retry_after=2))
        stage.ask("Are you there?", model="simulator:steady")
        stage.title("No credit left at the first model of a chain: the second one answers")
        simulator.fail(Fault.quota())
        stage.ask("Who answers?", model="simulator:premium,simulator:spare")
        stage.title("The connection breaks in the middle: what had arrived is kept, and the error says what to do")
        simulator.fail(Fault.cut(after=12))
        stage.fail("Tell me a long story.", model="simulator:shaky")
        stage.title("The ledger: one row a call, every attempt counted")
        stage.table()
    print("\nIn a notebook: llmkit lab. With a real model: llmkit demo --model provider:model")
    return 0


class _Stage:
    """A client, and the terminal it is shown in."""

    def __init__(self, config: Config, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._client = AsyncClient(config=config, transport=transport)
        self._portal = portal.shared()
        self._bold, self._plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        self._titles = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._portal.run(self._client.aclose())

    def title(self, text: str) -> None:
        self._titles += 1
        print(f"{'' if self._titles == 1 else chr(10)}{self._bold}{self._titles}. {text}{self._plain}", flush=True)

    def ask(self, prompt: str, **options: Any) -> None:
        print(f"> {prompt}", flush=True)
        options.setdefault("model", self._client.default_model())
        ask(self._portal, self._client, prompt, options, Terminal("text"), stream=True)

    def fail(self, prompt: str, **options: Any) -> None:
        """Ask what is going to fail, and show the error as a cell would."""
        try:
            self.ask(prompt, **options)
        except LLMKitError as error:
            print(error.block(), flush=True)

    def table(self) -> None:
        rows = [COLUMNS, *(_cells(row) for row in self._client.ledger.calls())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            print("  ".join(_padded(row, widths)).rstrip())


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    known = row["output_tokens"] is not None
    return (
        row["model"],
        row["status"],
        str(row["attempts"]),
        f"{row['input_tokens']} → {row['output_tokens']}" if known else "",
        "unknown" if row["cost_usd"] is None else money(row["cost_usd"]),
        row["source"] or "",
        row["error"] or "",
    )


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
