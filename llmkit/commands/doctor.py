"""``llmkit doctor``: what llmkit finds here, a line each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llmkit.doctor import examine

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]

_MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
_COLOURS = {"ok": "\x1b[32m", "note": "\x1b[33m", "wrong": "\x1b[31m"}


def run(_: argparse.Namespace) -> int:
    """Print every finding; 1 if something is wrong."""
    coloured = sys.stdout.isatty()
    wrong = False
    for finding in examine():
        mark = _MARKS[finding.state]
        mark = f"{_COLOURS[finding.state]}{mark}\x1b[0m" if coloured else mark
        print(f"{mark} {finding.subject:<9} {finding.text}", flush=True)
        wrong = wrong or finding.state == "wrong"
    return int(wrong)
