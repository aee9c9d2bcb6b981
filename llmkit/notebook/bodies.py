"""Cells that are a line and nothing more: ``%%llm --with summary``, ``%%llm --help``.

IPython refuses a cell magic without a body before the magic hears of it, and with an error that nbval takes for success.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["allow_empty", "with_body"]

_ALONE = re.compile(r"%%llm(?:_\w+)?(?:\s.*)?\n?")


def with_body(lines: list[str]) -> list[str]:
    """The cell's ``lines``, with an empty one below a line of llmkit's that stands alone."""
    if len(lines) == 1 and _ALONE.fullmatch(lines[0]):
        return [lines[0] if lines[0].endswith("\n") else lines[0] + "\n", "\n"]
    return lines


def allow_empty(shell: Any) -> Callable[[], None]:
    """Let such cells through; what is returned takes it back."""
    transforms = shell.input_transformers_cleanup
    transforms.append(with_body)

    def give_back() -> None:
        if with_body in transforms:
            transforms.remove(with_body)

    return give_back
