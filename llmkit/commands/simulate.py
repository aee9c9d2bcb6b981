"""``llmkit simulate``: the simulator as a server, for any client of either wire format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        ConfigError: the address cannot be had.
    """
    from llmkit.testing import Simulator

    simulator = Simulator(token_delay_s=0.02)
    try:
        simulator.run_forever(arguments.host, arguments.port, _say_where)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or type(error).__name__
        message = f"{arguments.host}:{arguments.port} cannot be used: {why}"
        raise ConfigError(message, next_step="--port 0 takes a free one") from None
    calls = "1 call" if simulator.calls == 1 else f"{simulator.calls} calls"
    print(f"\n{calls}, {simulator.billed.total_tokens} tokens, and no bill")
    return 0


def _say_where(url: str) -> None:
    print(f"the simulator answers at {url}/chat/completions (OpenAI's format) and {url}/messages (Anthropic's)")
    print(f"try: OPENAI_BASE_URL={url} OPENAI_API_KEY=none llmkit demo --model openai:simulated")
    print("Ctrl-C ends it", flush=True)
