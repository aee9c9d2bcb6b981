"""The notebook side: ``%load_ext llmkit``, ``%%llm`` and ``%llm``.

Loading must stay instant, so what a cell needs is imported by the first cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.magics import LLMMagics
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
    magics = _made(shell)
    try:
        magics.begin(kept if kept is not None and kept.edition is not edition else None)
    except BaseException:
        magics.end()
        raise


def _made(shell: InteractiveShell) -> LLMMagics:
    """The magics, set as IPython's configuration says, but for what is wrong there: it is said, and left out.

    IPython keeps there what ``%config`` was given, whether it was taken or refused.
    """
    from traitlets import TraitError
    from traitlets.config import Config

    from llmkit.errors import LLMKitError
    from llmkit.notebook.magics import LLMMagics

    known = list(shell.configurables)
    try:
        return LLMMagics(shell)
    except (TraitError, LLMKitError):
        shell.configurables[:] = known
    magics = LLMMagics(shell, config=Config())
    magics.set_again(shell.config.get(LLMMagics.__name__, {}))
    return magics


def unload(shell: InteractiveShell, edition: object = None) -> None:
    """Take everything back that `load` did, and close the client."""
    from llmkit.notebook.magics import LLMMagics

    magics = LLMMagics.of(shell)
    if magics is not None:
        _KEPT[shell] = magics.end(edition)
