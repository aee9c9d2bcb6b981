"""llmkit: LLM calls in Jupyter that are safe, cheap and visible.

In a notebook: ``%load_ext llmkit``, then ``%%llm``. In Python: `Client`, or `AsyncClient`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmkit import errors
from llmkit.errors import *  # noqa: F403  the tree is defined there, with its own __all__

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.call import Message
    from llmkit.client import AsyncClient, Client
    from llmkit.config import Config
    from llmkit.plan import Plan
    from llmkit.reply import Reply, Usage

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Config",
    "Message",
    "Plan",
    "Reply",
    "Usage",
    "load_ipython_extension",
    "unload_ipython_extension",
]
__all__ += errors.__all__

# Loaded when first asked for, so that `%load_ext llmkit` is instant.
_HOMES = {
    "AsyncClient": "llmkit.client",
    "Client": "llmkit.client",
    "Config": "llmkit.config",
    "Message": "llmkit.call",
    "Plan": "llmkit.plan",
    "Reply": "llmkit.reply",
    "Usage": "llmkit.reply",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "testing":
        return import_module("llmkit.testing")
    raise AttributeError(f"module 'llmkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "testing"})


_EDITION = object()  # another one after ``%reload_ext llmkit``


def load_ipython_extension(shell: InteractiveShell) -> None:
    """What ``%load_ext llmkit`` calls."""
    from llmkit.notebook import load

    load(shell, _EDITION)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """What ``%unload_ext llmkit`` calls."""
    from llmkit.notebook import unload

    unload(shell, _EDITION)
