"""The notebook side: ``%load_ext llmkit``, ``%%llm`` and ``%llm``.

Loading must stay instant, so what a cell needs is imported by the first cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.registration import Kept

__all__ = ["load", "unload"]

_KEPT: WeakKeyDictionary[InteractiveShell, Kept] = WeakKeyDictionary()


def load(shell: InteractiveShell, edition: object = None) -> None:
    """Register the magics and say what they will use. Harmless when they are registered already.

    ``edition`` changes when the package is reloaded: then what was set by ``%config`` is set again.
    """
    from llmkit.notebook.magics import LLMMagics

    if LLMMagics.of(shell) is not None:
        return
    kept = _KEPT.pop(shell, None)
    known = list(shell.configurables)
    try:
        magics = LLMMagics(shell)
    except BaseException:  # a wrong value in IPython's own configuration
        shell.configurables[:] = known
        raise
    try:
        magics.begin(kept if kept is not None and kept.edition is not edition else None)
    except BaseException:
        magics.end()
        raise


def unload(shell: InteractiveShell, edition: object = None) -> None:
    """Take everything back that `load` did, and close the client."""
    from llmkit.notebook.magics import LLMMagics

    magics = LLMMagics.of(shell)
    if magics is not None:
        _KEPT[shell] = magics.end(edition)
