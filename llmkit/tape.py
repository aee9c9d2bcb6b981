"""Recording and replaying as a client begins them: by a method, or by ``LLMKIT_RECORD`` and ``LLMKIT_REPLAY``.

What the environment says holds for every client of the process, so that a notebook is replayed without a change to it:
all of them go on in one recording, and while it replays, a cell that would record, or ask for real, does neither.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from llmkit.errors import ConfigError
from llmkit.lock import new_lock

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from llmkit.client import AsyncClient
    from llmkit.clock import Clock
    from llmkit.config import Config
    from llmkit.layers.replay import Recordist, Replay
    from llmkit.recording.file import Recording

__all__ = [
    "RECORD",
    "REPLAY",
    "lead",
    "of_environment",
    "of_notebook",
    "place",
    "recordist",
    "replay",
    "start_over",
    "told_by",
]

RECORD, REPLAY = "LLMKIT_RECORD", "LLMKIT_REPLAY"

_places: dict[str, Path] = {}
_replays: dict[Path, Replay] = {}
_guard = new_lock()
_notebooks: WeakSet[AsyncClient] = WeakSet()


def place(path: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """``path`` in full; a relative one begins at ``folder``, or where the process is."""
    return Path(folder or Path.cwd(), Path(path).expanduser())


def told_by(environ: Mapping[str, str]) -> tuple[str, Path] | None:
    """What the environment says: `RECORD` or `REPLAY`, and the file; a relative path begins where it was first asked for.

    Raises:
        ConfigError: it says both.
    """
    said = [(name, environ[name].strip()) for name in (RECORD, REPLAY) if environ.get(name, "").strip()]
    if len(said) > 1:
        raise ConfigError(f"{RECORD} and {REPLAY} are both set", next_step="unset one of them")
    if not said:
        return None
    name, path = said[0]
    return name, _places.setdefault(path, place(path))


def start_over() -> None:
    """A notebook begins: what the environment has replayed begins with its first call again."""
    with _guard:
        _places.clear()
        _replays.clear()


def lead(client: AsyncClient) -> None:
    """``client`` asks what the cells of a notebook ask: other clients of the process are recorded and replayed with it."""
    _notebooks.add(client)


def of_notebook() -> Recordist | Replay | None:
    """What records or replays the cells of the notebook; None where there is none, or nothing does."""
    if not _notebooks:
        return None
    return next((client.own_taping for client in list(_notebooks) if client.own_taping is not None), None)


def of_environment(config: Config, clock: Clock) -> Recordist | Replay | None:
    """What every client of this process does, if the environment says anything. Waits for a file.

    Raises:
        ConfigError: the file cannot be used.
    """
    told = told_by(config.environ)
    if told is None:
        return None
    name, path = told
    if name == RECORD:
        return recordist(config, path, clock)
    with _guard:
        if path not in _replays:
            _replays[path] = replay(config, path, clock)
        return _replays[path]


def recordist(
    config: Config, path: Path, clock: Clock, *, scrub: bool = False, overwrite: bool = False, new: bool = False
) -> Recordist:
    """A layer that records to ``path``; see `llmkit.AsyncClient.record`."""
    from llmkit.layers.replay import Recordist
    from llmkit.recording.recorder import recorder_at
    from llmkit.recording.scrubbing import Scrub

    recorder = recorder_at(path, Scrub(partial(_secrets, config), of_people=scrub), overwrite=overwrite)
    return Recordist(recorder, clock, new=new)


def replay(
    config: Config, path: Path, clock: Clock, *, live: bool = False, recording: Recording | None = None
) -> Replay:
    """A layer that answers from ``path``; see `llmkit.AsyncClient.replay`."""
    from llmkit.layers.replay import Replay
    from llmkit.recording.file import read
    from llmkit.recording.scrubbing import Scrub

    recording = read(path) if recording is None else recording
    scrub = Scrub(partial(_secrets, config), of_people=bool(recording.head.get("scrubbed")))
    return Replay(path, recording, scrub, clock, live=live)


def _secrets(config: Config) -> frozenset[str]:
    from llmkit.recording.scrubbing import secrets_in

    named = [entry.api_key_env for entry in config.providers.values()]
    named += [link.endpoint.api_key_env for links in config.aliases().values() for link in links]
    return secrets_in(config.environ, named)
