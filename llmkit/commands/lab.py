"""``llmkit lab``: JupyterLab on the quickstart notebook."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]

NAME = "quickstart.ipynb"


def run(arguments: argparse.Namespace) -> int:
    """Open the notebook, and stay until JupyterLab ends; its exit code.

    Raises:
        ConfigError: JupyterLab is not installed, or there is no such place.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise ConfigError("JupyterLab is not installed here", next_step='pip install "llmkit[lab]"')
    notebook = _notebook(arguments.path)
    # The address that is printed leads to the notebook as well: not everybody has a browser that opens by itself.
    address = f"--LabApp.default_url=/lab/tree/{quote(notebook.name)}"
    command = [sys.executable, "-m", "jupyterlab", str(notebook), address, *arguments.others]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and not any(o.startswith("--allow-root") for o in arguments.others):
        command.append("--allow-root")  # in a container one is root, and Jupyter would refuse to start
    print(f"opening {notebook} in JupyterLab; Ctrl-C twice ends it", flush=True)
    process = subprocess.Popen(command)  # noqa: S603  the user's own arguments
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # JupyterLab got it as well, and asks whether it is meant


def _notebook(path: str | None) -> Path:
    """The notebook to open: a given one, else the clone's, else a copy of the packaged one, kept if it is there."""
    original = _original()
    if path is None:
        if original.parent.name == "notebooks":
            return original
        return _copied(original, Path.cwd())
    place = Path(path).expanduser()
    if place.is_dir():
        return _copied(original, place)
    if not place.is_file():
        raise ConfigError(f"there is no notebook or folder {path}", next_step="llmkit lab alone opens the quickstart")
    return place


def _original() -> Path:
    package = Path(__file__).resolve().parent.parent
    packaged = package / NAME
    return packaged if packaged.is_file() else package.parent / "notebooks" / NAME


def _copied(original: Path, folder: Path) -> Path:
    copy = folder / NAME
    if not copy.exists():
        try:
            shutil.copyfile(original, copy)
        except OSError as error:
            raise ConfigError(f"{copy} cannot be written: {error.strerror}", next_step="llmkit lab FOLDER") from None
    return copy
