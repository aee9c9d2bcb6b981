"""``%llm record``, ``%llm replay``, ``%llm live``: calls beside the notebook, and the notebook from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.layers.replay import Recordist, Replay
    from llmkit.notebook.magics import LLMMagics

__all__ = ["RECORD", "REPLAY", "greeting", "in_words", "live", "record", "replay", "until"]

_RECORDS = (
    "record the calls of the cells that follow, to replay them anywhere; keys are left out, with --scrub personal data "
    "as well; --overwrite begins anew, --new records only what is not in the file yet"
)
_ANSWERS = (
    "answer the cells that follow from a recording: no key, no network, nothing spent; a question that is not in it is "
    "an error, or with --live asked for real"
)
RECORD = ("%llm record PATH [--scrub] [--overwrite|--new]", _RECORDS)
REPLAY = ("%llm replay PATH [--live]", _ANSWERS)


def record(magics: LLMMagics, words: list[str]) -> None:
    """Record the cells that follow."""
    path, options = _read(words, ("--scrub", "--overwrite", "--new"), RECORD[0])
    session = magics.session
    said = {name.removeprefix("--"): True for name in options}
    session.client.record(session.folder / path, **said)
    # While a replay is forced by the environment, the cell says what it said when it was recorded.
    print(until(path))
    session.tell_recording()


def replay(magics: LLMMagics, words: list[str]) -> None:
    """Answer the cells that follow from a file."""
    path, options = _read(words, ("--live",), REPLAY[0])
    session = magics.session
    session.client.replay(session.folder / path, live="--live" in options)
    taping = session.client.taping
    assert taping is not None  # it would have been an error
    print(f"llmkit: {in_words(taping)}")


def live(magics: LLMMagics, words: list[str]) -> None:
    """Ask for real, and record nothing."""
    if words:
        raise ConfigError(f"{words[0]!r:.60} has no place here", next_step="write %llm live")
    client = magics.session.client
    before = client.taping
    client.live()
    if before is None:
        print("llmkit: live already: calls are neither recorded nor replayed")
    else:
        print(f"llmkit: live from here on; {before.path.name} has {_calls(before)}")


def _read(words: list[str], known: tuple[str, ...], usage: str) -> tuple[str, list[str]]:
    options = [word for word in words if word.startswith("--")]
    paths = [word for word in words if not word.startswith("--")]
    for option in options:
        if option not in known:
            raise ConfigError(f"there is no {option:.60} here", next_step=f"write {usage}")
    if len(paths) != 1:
        raise ConfigError("which file?" if not paths else "one file at a time", next_step=f"write {usage}")
    return paths[0], options


def until(path: str) -> str:
    """What a cell that begins a recording says; true of its replay as well, so that both are the same."""
    return f"llmkit: calls are recorded in {path} until %llm live"


def in_words(taping: Recordist | Replay) -> str:
    """What becomes of calls, in a few words."""
    name = taping.path.name
    if taping.replays is True:
        rest = "what is not there is asked for real" if taping.live else "nothing is sent"
        return f"replaying {name}, {_calls(taping)}; {rest}"
    known = "what is there is answered from it" if taping.new else "keys are left out"
    people = ", personal data as well" if taping.recorder.scrub.of_people and not taping.new else ""
    return f"recording to {name}, {_calls(taping)} so far; {known}{people}"


def greeting(taping: Recordist | Replay, otherwise: str) -> str:
    """What is said when llmkit is loaded, and the environment has calls recorded or replayed.

    The notebook that is replayed says what it said when it was recorded; ``otherwise`` is what it would say without.
    """
    if taping.replays is False:
        return f"{otherwise} · recording or replaying {taping.path.name}"
    return str(taping.recording.head.get("greeting") or f"llmkit: {in_words(taping)}")


def _calls(taping: Recordist | Replay) -> str:
    count = len(taping.recording.takes)
    return f"{count:,} call{'' if count == 1 else 's'}"
