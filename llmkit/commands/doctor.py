"""``llmkit doctor``: what llmkit finds here, a line each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llmkit.doctor import examine, line

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]


def run(_: argparse.Namespace) -> int:
    """Print every finding; 1 if something is wrong."""
    wrong = False
    for finding in examine():
        print(line(finding, coloured=sys.stdout.isatty()), flush=True)
        wrong = wrong or finding.state == "wrong"
    return int(wrong)
