"""The cells of a notebook file that matter to llmkit, as they stand there. Nothing of them is run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import ConfigError
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_BYTES", "MOST_CELLS", "Cell", "Line", "read"]

MAX_BYTES = 100_000_000
"""The largest file that is read. Outputs are most of one; they are passed over."""

MOST_CELLS = 10_000

_CELL_MAGIC = re.compile(r"%%(?P<name>llm\w*)(?:[ \t]+(?P<line>[^\n]*))?(?:\n(?P<body>.*))?", re.DOTALL)
_LINE_MAGIC = re.compile(r"%(?P<name>llm|config|reload_ext)[ \t]+(?P<words>.*)")


class Cell(NamedTuple):
    """A cell that asks: ``number`` is its place among all cells, from 1; ``id`` as the frontend knows it.

    ``magic`` is ``llm``, ``llm_compare`` …, ``line`` what follows it, and ``body`` the rest.
    """

    number: int
    id: str | None
    magic: str
    line: str
    body: str


class Line(NamedTuple):
    """A line of a cell that runs Python: ``%llm …``, ``%config …``; ``name`` is the magic, without its sign."""

    number: int
    name: str
    words: str


def read(path: str) -> list[Cell | Line]:
    """What a notebook asks and sets, in its order.

    Raises:
        ConfigError: there is no such file, it is no notebook, or too large.
    """
    file = Path(path).expanduser()
    shown = tidy(str(file), limit=200)
    try:
        if file.exists() and not file.is_file() and not file.is_dir():  # a device or a pipe may never end
            raise _no_notebook(shown, "it is no file")
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{shown} is larger than {MAX_BYTES // 1_000_000} MB", next_step="clear its outputs first"
            )
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise _no_notebook(shown, "it is not UTF-8") from None
    except (OSError, ValueError) as error:
        raise _unreadable(file, shown, error) from None
    cells = _cells(text, shown)
    if len(cells) > MOST_CELLS:
        raise ConfigError(f"{shown} has {len(cells):,} cells; {MOST_CELLS:,} is the most")
    return [found for number, cell in enumerate(cells, 1) for found in _of(number, cell)]


def _unreadable(file: Path, shown: str, error: OSError | ValueError) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        near = sorted(each.name for each in Path().glob("*.ipynb"))[:5] if not file.is_absolute() else []
        hint = f"here there are {', '.join(tidy(name, limit=60) for name in near)}" if near else "say where it is"
        return ConfigError(f"there is no notebook {shown}", next_step=hint)
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"{shown} cannot be read: {tidy(reason, limit=100)}")


def _no_notebook(shown: str, why: str) -> ConfigError:
    return ConfigError(f"{shown} is no notebook: {why}", next_step="%llm plan takes a file of Jupyter's, .ipynb")


def _cells(text: str, shown: str) -> list[Any]:
    import nbformat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is amiss with ids and versions does not matter here
            notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
        cells = notebook["cells"]
    except RecursionError:
        raise _no_notebook(shown, "it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - nbformat raises whatever it meets in a file that is none
        why = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise _no_notebook(shown, tidy(why, limit=120)) from None
    if not isinstance(cells, list):
        raise _no_notebook(shown, "its cells are no list")
    return cells


def _of(number: int, cell: Any) -> Iterator[Cell | Line]:
    if not isinstance(cell, dict) or cell.get("cell_type") != "code":
        return
    source = cell.get("source")
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    if not isinstance(source, str):
        return
    text = source.lstrip("\n")  # as IPython does
    magic = _CELL_MAGIC.fullmatch(text)
    if magic is not None:
        name = cell.get("id")
        yield Cell(
            number, name if isinstance(name, str) else None, magic["name"], magic["line"] or "", magic["body"] or ""
        )
    elif not text.startswith("%%"):
        for line in text.split("\n"):
            if found := _LINE_MAGIC.fullmatch(line.rstrip()):
                yield Line(number, found["name"], found["words"].strip())
