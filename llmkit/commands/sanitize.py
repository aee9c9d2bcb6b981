"""``llmkit sanitize``: where the file is that nbval needs for notebooks saved with the live display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import llmkit.notebook

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]


def run(_: argparse.Namespace) -> int:
    """Print the path, for ``pytest --nbval-sanitize-with``."""
    print(Path(llmkit.notebook.__file__).with_name("nbval.cfg"))
    return 0
