"""``%llm``: one line for everything beside asking."""

from __future__ import annotations

import difflib
import shlex
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit import spending
from llmkit.errors import ConfigError
from llmkit.money import money
from llmkit.notebook import budgets, chats, history, manual, prompts, recording
from llmkit.notebook.formats import plain
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from llmkit.layers.breaker import Circuit
    from llmkit.notebook.magics import LLMMagics

__all__ = ["LATER", "Command", "commands", "run", "split"]

# Promised for later, so neither unknown nor misspelt.
LATER = ("dashboard",)


class Command(NamedTuple):
    """One word after ``%llm``.

    Attributes:
        run: runs it, with the words that follow; what it returns is the cell's value.
        forms: how it is written, and what that does, a pair for each line of ``%llm help``.
        more: what ``%llm help NAME`` says beside them: examples.
    """

    run: Callable[[LLMMagics, list[str]], Any]
    forms: tuple[tuple[str, str], ...]
    more: str = ""


def run(magics: LLMMagics, line: str) -> Any:
    """Run one command; what it returns is the cell's value.

    Raises:
        ConfigError: no such command (with the nearest one), or not with these words.
    """
    name, *words = split(line) or ["status"]
    command = _COMMANDS.get(name)
    if command is not None:
        return command.run(magics, words)
    if name in LATER:
        raise ConfigError(f"%llm {name} is not in this version yet", next_step="%llm help lists what is")
    near = difflib.get_close_matches(name, [*_COMMANDS, *LATER], 1)
    hint = f"; did you mean %llm {near[0]}?" if near else ""
    step = "%llm help lists them all; a prompt stands in a cell of its own, below %%llm"
    raise ConfigError(f"there is no command %llm {name:.60}{hint}", next_step=step)


def commands() -> Mapping[str, Command]:
    """All of them, by name."""
    return _COMMANDS


def split(line: str) -> list[str]:
    """The words of a line; quotes keep one together, and a backslash is one, since paths have them."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError:  # a quote that is not closed: a sentence, perhaps
        return line.split()


def _no_more(words: list[str], usage: str) -> None:
    if words:
        raise ConfigError(f"{words[0]!r:.60} has no place here", next_step=f"write {usage}")


# -- what is in force ------------------------------------------------------------------------------------------------


def _status(magics: LLMMagics, words: list[str]) -> None:
    _no_more(words, "%llm")
    session = magics.session
    chosen = f"{magics.model} (chosen here)" if magics.model else magics.of_tier or str(session.default)
    lines = [("model", chosen), ("request", budgets.of_request(session.budget, magics.max_cost))]
    lines += [("budget", line) for line in budgets.in_brief(_budgets(magics), session.budget)]
    if (taping := session.taping) is not None:
        lines.append(("calls", recording.in_words(taping)))
    lines += [("spent", _spent(magics)), ("cache", _cached(magics))]
    unwell = [circuit for circuit in session.client.circuits if circuit.state != "closed"]
    lines.append(("circuits", "; ".join(_circuit(circuit) for circuit in unwell) or "all closed"))
    if session.config.file:
        lines.append(("settings", str(session.config.file)))
    lines.append(("ledger", session.client.ledger.location))
    notices = [*session.config.notices, *filter(None, [session.client.ledger.notice])]
    lines += [("note", notice) for notice in notices]
    print("\n".join(f"{name:<10}{text}" for name, text in lines))


def _caps(magics: LLMMagics) -> str:
    return budgets.in_words(magics.session.budget, magics.max_cost)


def _spent(magics: LLMMagics) -> str:
    """What the calls of this kernel have cost, from the ledger."""
    from llmkit.state.owner import current_owner

    rows = magics.session.client.ledger.calls(since=magics.session.started)
    mine = [row for row in rows if row["owner"] == current_owner()]
    costs = [row["cost_usd"] for row in mine]
    total = sum((cost for cost in costs if cost is not None), Decimal(0))
    unknown = sum(cost is None for cost in costs)
    calls = f"{len(mine)} call{'' if len(mine) == 1 else 's'}"
    return f"{money(total)} in this session, {calls}" + (f", {unknown} of unknown cost" if unknown else "")


# -- budgets ---------------------------------------------------------------------------------------------------------


def _budgets(magics: LLMMagics) -> pd.DataFrame:
    session = magics.session
    return session.portal.run(session.client.budgets())


def _budget(magics: LLMMagics, words: list[str]) -> None:
    session = magics.session
    if words == ["off"]:
        session.client.set_budgets(**budgets.lifted(session.budget))
        print(
            "llmkit: all limits are lifted for this session: nothing caps what calls cost. %reload_ext llmkit restores them"
        )
        return
    head = ""
    if words:
        session.client.set_budgets(**budgets.read(words))
        if session.taping is not None:  # what is spent and left differs where it is replayed
            print(f"llmkit: {' '.join(words)} set for this session; %llm budget shows what is left")
            return
        head = "set for this session; to keep it, write it to [budget] in llmkit.toml\n\n"
    print(head + budgets.table(_budgets(magics), session.budget, magics.max_cost))


# -- the cache -------------------------------------------------------------------------------------------------------


def _cache(magics: LLMMagics, words: list[str]) -> None:
    if len(words) > 1 or (words and words[0] not in {"clear", "off", "on"}):
        raise ConfigError(f"%llm cache {' '.join(words)[:60]}?", next_step="write %llm cache [clear|off|on]")
    cache, run = magics.session.client.cache, magics.session.portal.run
    if words == ["clear"]:
        removed = run(cache.clear())
        print(f"llmkit: {removed:,} {'answer is' if removed == 1 else 'answers are'} removed from {cache.location}")
    elif words:
        cache.enabled = words == ["on"]
        state = "on" if cache.enabled else "off: nothing is looked up or stored until %llm cache on"
        print(f"llmkit: the cache is {state}")
    else:
        saved = Decimal(str(magics.session.client.spend("model")["saved_usd"].sum()))
        lines = [
            ("answers", _cached(magics)),
            ("in all", f"saved {money(saved)}, by all calls in the ledger"),
            ("kept in", cache.location),
        ]
        print("\n".join(f"{name:<10}{text}" for name, text in lines))


def _cached(magics: LLMMagics) -> str:
    """What is stored, and what this session had of it."""
    cache = magics.session.client.cache
    entries, size = magics.session.portal.run(cache.contents())
    hits = (
        f"{cache.hits} hit{'' if cache.hits == 1 else 's'} and {cache.misses} miss{'' if cache.misses == 1 else 'es'}"
    )
    return (
        ("" if cache.enabled else "off; ")
        + f"{entries:,} answer{'' if entries == 1 else 's'} ({_bytes(size)}); "
        + f"{hits} in this session, saved {money(cache.saved_usd)}"
    )


def _bytes(size: int) -> str:
    scale = next((each for each in (10**9, 10**6, 10**3) if size >= each), 1)
    unit = {10**9: "GB", 10**6: "MB", 10**3: "kB"}.get(scale, "bytes")
    return f"{size / scale:.3g} {unit}"


def _models(magics: LLMMagics, words: list[str]) -> None:
    _no_more(words, "%llm models")
    config = magics.session.config
    lines = [f"in use: {magics.model or magics.of_tier or magics.session.default}"]
    if aliases := config.aliases():
        lines += ["", "aliases"]
        lines += [f"  {name}: {' → '.join(link.endpoint.name for link in links)}" for name, links in aliases.items()]
    if config.tiers:
        lines += ["", "tiers", *(f"  {tier}: {model}" for tier, model in config.tiers.items())]
    lines += ["", "providers (a model is PROVIDER:MODEL)"]
    keyless = []
    for entry in config.providers.values():
        if entry.simulated:
            lines.append(f"  {entry.name}: built in, nothing is billed")
        elif entry.api_key_env and config.environ.get(entry.api_key_env, "").strip():
            lines.append(f"  {entry.name}: {entry.api_key_env} is set")
        elif not entry.key_required:
            lines.append(f"  {entry.name}: no key needed, {entry.base_url}")
        else:
            keyless.append(f"  {entry.name}: {entry.api_key_env}")
    if keyless:
        lines += ["", "providers whose key is not set", *keyless]
    print("\n".join(lines))


def _use(magics: LLMMagics, words: list[str]) -> None:
    model = ",".join("".join(words).split(","))
    if not model:
        raise ConfigError("which model?", next_step="%llm use MODEL[,FALLBACK…]; %llm models lists them")
    taping = magics.session.taping
    # What is replayed needs no model that is known here.
    links = [] if taping is not None and taping.replays else magics.session.config.route(model)
    magics.model = model
    if taping is not None:
        print(f"llmkit: model {model}")  # all that is the same where it is recorded and where it is replayed
    else:
        print(f"llmkit: model {' → '.join(link.endpoint.name for link in links)} · {_caps(magics)}")


# -- circuits --------------------------------------------------------------------------------------------------------


def _breakers(magics: LLMMagics, words: list[str]) -> None:
    action, *names = words or [""]
    if action not in {"", "reset", "isolate"} or len(names) > 1 or (action == "isolate" and not names):
        usage = "%llm breakers, %llm breakers reset [ENDPOINT] or %llm breakers isolate ENDPOINT"
        raise ConfigError(f"%llm breakers {' '.join(words)[:60]}?", next_step=f"write {usage}")
    circuits = magics.session.client.circuits
    if action == "isolate":
        for link in magics.session.config.route(names[0]):
            circuits.of(link.endpoint).isolate()
    elif action == "reset":
        for circuit in _named(magics, names):
            circuit.reset()
    print("\n".join(_circuit(circuit) for circuit in circuits) or "no endpoint has been used yet")


def _named(magics: LLMMagics, names: list[str]) -> list[Circuit]:
    circuits = magics.session.client.circuits
    if not names:
        return list(circuits)
    return [circuits.of(link.endpoint) for link in magics.session.config.route(names[0])]


def _circuit(circuit: Circuit) -> str:
    text = f"{circuit.endpoint.name}: {circuit.state.replace('_', ' ')}"
    if circuit.retry_after is not None:
        text += f", next probe in {circuit.retry_after:.0f} s"
    if circuit.failures_in_row:
        text += f", {circuit.failures_in_row} failures in a row"
    return text + (f" (last: {tidy(circuit.last_failure, limit=160)})" if circuit.last_failure else "")


# -- the ledger ------------------------------------------------------------------------------------------------------


def _calls(magics: LLMMagics, words: list[str]) -> Any:
    number = words[0] if words else "10"
    if len(words) > 1 or not number.isdecimal() or not 1 <= int(number) <= 1_000_000:
        raise ConfigError(f"%llm calls {' '.join(words)[:60]}?", next_step="%llm calls N shows the newest N calls")
    return _to_see(magics.session.client.calls(limit=int(number)))


def _to_see(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame without what a terminal would obey: pandas writes texts out as they are."""
    for name in frame.columns[[kind.name in {"object", "string", "str"} for kind in frame.dtypes]]:
        frame[name] = frame[name].map(_cell).astype(frame[name].dtype)
    return frame


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain(str(key)): _cell(inner) for key, inner in value.items()}
    return plain(value) if isinstance(value, str) else value


def _report(magics: LLMMagics, words: list[str]) -> Any:
    by, since = spending.asked(words)
    frame = magics.session.client.spend(by=by, since=since)
    print(spending.summary(frame, by, since))
    frame = spending.brief(frame)
    if hasattr(magics.shell, "kernel"):
        return _to_see(frame)
    print(f"\n{spending.table(frame)}")  # pandas would leave columns out
    return None


def _export(magics: LLMMagics, words: list[str]) -> None:
    paths = [word for word in words if word != "--overwrite"]
    if len(paths) != 1 or len(words) > 2:
        raise ConfigError("export where to?", next_step="%llm export PATH.csv, .jsonl or .parquet [--overwrite]")
    calls = magics.session.client.export(paths[0], overwrite=len(words) == 2)
    print(f"llmkit: {calls:,} call{'' if calls == 1 else 's'} with all attempts in {paths[0]}")


def _plan(magics: LLMMagics, words: list[str]) -> Any:
    from llmkit.notebook.course import run as run_plan

    return run_plan(magics, words)


def _doctor(magics: LLMMagics, words: list[str]) -> None:
    from llmkit.notebook import checkup

    _no_more(words, "%llm doctor")
    checkup.run(magics)


_COMMANDS: dict[str, Command] = {
    "status": Command(
        _status,
        (("%llm", "what is in force: model, budgets, spending, cache, circuits"),),
        more="%llm",
    ),
    "models": Command(_models, (("%llm models", "aliases and providers"),), more="%llm models"),
    "use": Command(
        _use,
        (("%llm use MODEL[,FALLBACK…]", "the model of the cells that follow"),),
        more="""%llm use gpt-5-mini                 one model
%llm use openai:gpt-5-mini,local    and another one for when it cannot answer""",
    ),
    "budget": Command(
        _budget,
        (
            ("%llm budget", "every limit: spent, held, left, when it resets"),
            (
                "%llm budget NAME=AMOUNT …",
                "set limits for this session: session, hour, day, week, month, total, request;",
            ),
            ("", "user.ana.day=2usd, tag.app=docs.day=1usd, month=100000tokens, at_limit=warn"),
            ("%llm budget NAME=off …", "lift one"),
            ("%llm budget off", "lift all"),
        ),
        more="""%llm budget session=1usd day=5usd
%llm budget user.ana.day=2usd month=100000tokens
%llm budget tag.app=docs.day=1usd at_limit=warn warn_at=70%
%llm budget day=off""",
    ),
    "plan": Command(
        _plan,
        (
            (
                "%llm plan NOTEBOOK.ipynb",
                "what all its cells would take and cost, what the cache has, which budget refuses; nothing is sent",
            ),
        ),
        more="""%llm plan report.ipynb              a row a cell, in order, each counting those before it; also as a DataFrame
%%llm --plan                        the same for a single cell""",
    ),
    "cache": Command(
        _cache,
        (
            ("%llm cache", "how many answers are stored, and what they saved"),
            ("%llm cache clear", "remove them"),
            ("%llm cache off|on", "neither look nor store for the rest of this session; and do so again"),
        ),
        more="""%llm cache clear
%llm cache off""",
    ),
    "report": Command(
        _report,
        (
            (
                "%llm report [day|hour|week|month|model|user|tag] [SINCE]",
                "what was spent, and saved, as a DataFrame; SINCE is 7d, 12h, 30m …",
            ),
        ),
        more="""%llm report              by day
%llm report model 7d     by model, of the last seven days
%llm report tag""",
    ),
    "export": Command(
        _export,
        (("%llm export PATH [--overwrite]", "the ledger as .csv, .jsonl or .parquet"),),
        more="""%llm export calls.csv
%llm export calls.jsonl --overwrite""",
    ),
    "breakers": Command(
        _breakers,
        (
            ("%llm breakers", "the circuit of every endpoint used"),
            ("%llm breakers reset [ENDPOINT]", "close them, or one"),
            ("%llm breakers isolate ENDPOINT", "admit no call until reset"),
        ),
        more="""%llm breakers reset
%llm breakers isolate openai:gpt-5-mini""",
    ),
    "calls": Command(
        _calls,
        (("%llm calls [N]", "the newest calls of the ledger, as a DataFrame"),),
        more="""%llm calls               the newest ten
%llm calls 100""",
    ),
    "prompts": Command(
        prompts.run,
        (
            ("%llm prompts", "the prompts that are kept in this project (%%llm --save NAME)"),
            ("%llm prompts NAME", "its versions, and what the last one changed"),
            ("%llm prompts NAME@1 NAME@3", "what lies between two; one alone is shown whole"),
            ("%llm prompts NAME[@N] remove", "forget it, or one version"),
        ),
        more="""%%llm --save summary                          keep the cell's prompt, as the next version of summary
%%llm --with summary                          begin with its newest version; what the cell says follows
%%llm_compare --with summary@1,summary@2      compare two versions
%llm prompts summary@1 summary@2              what lies between them
%llm report tag                               what the calls of each version have cost""",
    ),
    "why": Command(
        history.why,
        (("%llm why [REQUEST_ID]", "the life of one call; without an id, of the last one"),),
        more="""%llm why                 cache, budget, waits, attempts and choice of the last call
%llm why 019ac2          the call whose id begins so; %llm calls lists them""",
    ),
    "show": Command(
        history.show,
        (
            ("%llm show [REQUEST_ID]", "an answer again, as it was shown; without an id, the last one"),
            ("%llm show clear", "forget all answers that were kept to be shown again"),
        ),
        more="""%llm show                the last answer, also of a kernel that is gone
%llm show 019ac2         the one whose id begins so
%llm show clear""",
    ),
    "chat": Command(
        chats.chat,
        (
            ("%llm chat", "the conversations of this kernel"),
            ("%llm chat NAME", "what was said in one"),
            ("%llm chat NAME undo", "bring back the turns that the last one left out"),
            ("%llm chat NAME clear", "forget it"),
        ),
        more="""%%llm --chat trip        a cell that goes on with the conversation trip, or begins it
%llm chat
%llm chat trip
%llm chat trip clear""",
    ),
    "record": Command(
        recording.record,
        (recording.RECORD,),
        more="""%llm record calls.jsonl
%llm record calls.jsonl --scrub
%llm record calls.jsonl --new""",
    ),
    "replay": Command(
        recording.replay,
        (recording.REPLAY,),
        more="""%llm replay calls.jsonl
%llm replay calls.jsonl --live""",
    ),
    "live": Command(recording.live, (("%llm live", "neither record nor replay"),), more="%llm live"),
    "doctor": Command(
        _doctor,
        (("%llm doctor", "what llmkit finds here, and what is wrong: keys (never shown), servers, store"),),
        more="%llm doctor    asks no model, sends no key, and takes some seconds at most",
    ),
    "help": Command(
        manual.run,
        (("%llm help [TOPIC]", "this list; or a command, an option or a topic, with examples"),),
        more="""%llm help
%llm help budget
%llm help --schema
%llm help templates""",
    ),
}
