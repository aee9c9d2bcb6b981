"""``%llm doctor``: what the shell's doctor finds, and what only a notebook knows."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from llmkit.doctor import Finding, examine, line
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmkit.notebook.magics import LLMMagics

__all__ = ["findings", "run"]


def run(magics: LLMMagics) -> None:
    """Print every finding, each as soon as it is known."""
    worst = "ok"
    for finding in findings(magics):
        print(line(finding), flush=True)
        worst = finding.state if finding.state == "wrong" or worst == "ok" else worst
    print({"ok": "\nAll is well.", "note": "\nllmkit can work."}.get(worst, "\nWhat is WRONG has to be mended."))


def findings(magics: LLMMagics) -> Iterator[Finding]:
    """First what is here, then what the shell's ``llmkit doctor`` says of this folder."""
    yield Finding("frontend", "ok", _frontend(magics.shell))
    yield from _extension(magics)
    yield Finding("config", "ok", _config(magics))
    for look in (_display, _calls, _files, _ledger):
        try:
            yield from look(magics)
        except LLMKitError as error:
            yield Finding(
                look.__name__[1:], "wrong", f"{error.message}{'; ' + error.next_step if error.next_step else ''}"
            )
    yield from examine(folder=magics.session.folder, cell=magics.max_cost)


def _frontend(shell: Any) -> str:
    """Who runs the cells, and who shows them, as far as that is known here."""
    if not hasattr(shell, "kernel"):
        return f"IPython {_version('IPython')} in {'a terminal' if sys.stdout.isatty() else 'no terminal'}"
    kernel = f"ipykernel {_version('ipykernel')}"
    if "google.colab" in sys.modules:
        return f"{kernel} · Colab"
    if "__vsc_ipynb_file__" in shell.user_ns or any(name in os.environ for name in ("VSCODE_PID", "VSCODE_CWD")):
        return f"{kernel} · VS Code"
    notebook = os.environ.get("JPY_SESSION_NAME", "")
    return f"{kernel} · {f'Jupyter, {os.path.basename(notebook)}' if notebook else 'a client of the Jupyter protocol'}"


def _version(name: str) -> str:
    return str(getattr(sys.modules.get(name), "__version__", "of unknown version"))


def _extension(magics: LLMMagics) -> Iterator[Finding]:
    """Whether what loading registered is still in its place."""
    shell, missing = magics.shell, []
    for kind, names in magics.magics.items():
        mark = "%%" if kind == "cell" else "%"
        missing += [mark + name for name, ours in names.items() if shell.magics_manager.magics[kind].get(name) != ours]
    if missing:
        text = (
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} another's; %reload_ext llmkit takes it back"
        )
        yield Finding("magics", "wrong", text)
    else:
        names = sorted({name for each in magics.magics.values() for name in each})
        yield Finding("magics", "ok", f"{', '.join(names)} are registered")
    if LLMKitError not in shell.custom_exceptions:
        text = "another extension shows the errors, so some may be pages long; %reload_ext llmkit takes them back"
        yield Finding("errors", "note", text)


def _config(magics: LLMMagics) -> str:
    """What `%config` says, in so far as somebody has set it."""
    set_here = [
        f"{name} = {str(value)!r:.60}" if isinstance(value, str) else f"{name} = {value}"
        for name in sorted(magics.trait_names(config=True))
        if (value := getattr(magics, name)) != magics.trait_defaults(name)
    ]
    return ", ".join(set_here) or "nothing is set by %config"


def _display(magics: LLMMagics) -> Iterator[Finding]:
    mode = magics.display_mode
    yield Finding(
        "display", "ok", f"{mode}: {'answers grow' if mode == 'live' else 'an answer is shown once, at its end'}"
    )


def _calls(magics: LLMMagics) -> Iterator[Finding]:
    from llmkit.notebook.recording import in_words

    taping = magics.session.taping
    yield Finding("calls", "ok", "asked for real, or from the cache" if taping is None else in_words(taping))
    cache = magics.session.config.cache.enabled if magics.session.is_untouched else magics.session.client.cache.enabled
    yield Finding("cache", "ok" if cache else "note", "on" if cache else "off: the same question is paid for each time")


def _files(magics: LLMMagics) -> Iterator[Finding]:
    """Whether the settings are still those of the file."""
    session = magics.session
    file = session.config.file
    if file is None:
        return
    try:
        changed = file.stat().st_mtime > session.started
    except OSError:
        changed = True
    if changed:
        yield Finding("settings", "note", f"{file} has changed since llmkit was loaded; %reload_ext llmkit reads it")


def _ledger(magics: LLMMagics) -> Iterator[Finding]:
    notice = None if magics.session.is_untouched else magics.session.client.ledger.notice
    if notice:
        yield Finding("ledger", "wrong", notice)
