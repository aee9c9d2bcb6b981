"""``llmkit export``: the ledger as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.client import Client

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Write the ledger that the settings name to a file."""
    with Client() as client:
        calls = client.export(arguments.path, overwrite=arguments.overwrite)
    print(f"{calls:,} call{'' if calls == 1 else 's'} with all attempts in {arguments.path}")
    return 0
