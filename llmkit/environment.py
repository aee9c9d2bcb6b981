"""The environment, where keys are: it can be asked, but not shown.

A traceback with the variables of its frames (``%xmode Verbose``, rich, an error tracker) would show a plain mapping whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Environment"]


class Environment(Mapping[str, str]):
    """A mapping of environment variables whose repr names none of them."""

    __slots__ = ("_held",)

    def __init__(self, held: Mapping[str, str]) -> None:
        self._held = held

    @classmethod
    def over(cls, held: Mapping[str, str]) -> Environment:
        return held if isinstance(held, Environment) else cls(held)

    def __getitem__(self, name: str) -> str:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __repr__(self) -> str:
        return f"<an environment of {len(self)} variables>"
