"""The notebook side: ``%load_ext llmkit``, ``%%llm`` and ``%llm``.

Loading must stay instant, so what a cell needs is imported by the first cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load", "unload"]


def load(shell: InteractiveShell) -> None:
    """Register the magics and say what they will use. Harmless when they are registered already."""
    from llmkit.notebook.magics import LLMMagics

    if LLMMagics.of(shell) is not None:
        return
    magics = LLMMagics(shell)
    shell.register_magics(magics)
    magics.begin()


def unload(shell: InteractiveShell) -> None:
    """Take everything back that `load` did, and close the client."""
    from llmkit.notebook.magics import LLMMagics

    magics = LLMMagics.of(shell)
    if magics is not None:
        magics.end()
