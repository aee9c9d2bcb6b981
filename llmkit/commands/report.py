"""``llmkit report``: what the calls in the ledger have cost, and what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import spending
from llmkit.client import Client

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Print a report of the ledger that the settings name."""
    by, since = spending.asked([word for word in (arguments.by, arguments.since) if word])
    with Client() as client:
        frame = client.spend(by=by, since=since)
    print(spending.summary(frame, by, since))
    if len(frame):
        print(f"\n{spending.table(spending.brief(frame))}")
    return 0
