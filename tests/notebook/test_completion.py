"""Tab: options, values, commands, names inside braces; and nothing where it is not llmkit's business."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from IPython.core.completer import provisionalcompleter

from llmkit.notebook import completion
from llmkit.notebook.magics import LLMMagics
from tests.notebook.test_magics import run


@pytest.fixture(params=["jedi", "plain"])
def tab(shell, request):
    """What Tab offers at the mark ``|`` of a cell: the texts as the cell would be."""
    shell.Completer.use_jedi = request.param == "jedi"

    def offered(cell):
        before, _, after = cell.partition("¦")
        with provisionalcompleter():
            found = list(shell.Completer.completions(before + after, len(before)))
        return [before[: each.start] + each.text for each in found]

    return offered


def words(tab, cell):
    """The same, the last word of each."""
    return [each.split()[-1] for each in tab(cell)]


def test_options_are_offered(tab) -> None:
    found = words(tab, "%%llm --¦\nhi")
    assert {"--model", "--cache", "--chat", "--schema", "--help"} <= set(found)
    assert words(tab, "%%llm --max¦") == ["--max-cost", "--max-tokens"]
    assert words(tab, "%%llm answer << -t 0 --see¦\nhi") == ["--seed"]
    assert "-m" in words(tab, "%%llm -¦")
    assert "--model" in words(tab, "%%llm ¦\nhi")
    assert "--schema" not in words(tab, "%%llm_compare --¦\nhi")
    assert "--model" in words(tab, "%%llm_compare --¦\nhi")


def test_an_option_is_offered_once_unless_it_may_be_repeated(tab) -> None:
    found = words(tab, "%%llm -m tiny --quiet --tag a=b --¦\nhi")
    assert {"--model", "--quiet"}.isdisjoint(found)
    assert "--tag" in found


@pytest.mark.parametrize(
    "cell, expected",
    [
        ("%%llm --cache ¦\nhi", ["off", "only", "refresh", "use"]),
        ("%%llm --cache re¦\nhi", ["refresh"]),
        ("%%llm --cache=re¦\nhi", ["--cache=refresh"]),
        ("%%llm --format c¦\nhi", ["code"]),
        ("%%llm --tier ¦\nhi", ["hard", "medium", "simple"]),
        ("%%llm --timeout ¦\nhi", ["chat", "code"]),
    ],
)
def test_values_are_offered(tab, cell, expected) -> None:
    assert words(tab, cell) == expected


def test_models_are_offered_from_settings_and_from_the_ledger(tab, shell) -> None:
    assert {"tiny", "deaf", "deaf2", "vllm:tiny", "simulator", "ollama:"} <= set(words(tab, "%%llm -m ¦\nhi"))
    assert words(tab, "%%llm -m ti¦\nhi") == ["tiny"]
    assert words(tab, "%%llm --model tiny,dea¦\nhi") == ["tiny,deaf", "tiny,deaf2"]
    assert words(tab, "%llm use tiny,dea¦") == ["tiny,deaf", "tiny,deaf2"]
    run(shell, "%%llm -m vllm:seen-before\nhi")
    run(shell, "%reload_ext llmkit")
    assert words(tab, "%%llm -m vllm:s¦\nhi") == ["vllm:seen-before"]
    assert LLMMagics.of(shell).session._client is None  # looking has made none


def test_keys_decide_which_providers_are_offered(tab, monkeypatch) -> None:
    assert "openai:" not in words(tab, "%%llm -m ¦\nhi")


def test_chats_schemas_prompts_and_variables_are_offered(tab, shell) -> None:
    run(shell, "%%llm --chat trip\nhi")
    run(shell, "%%llm --save summary\nhi")
    run(shell, "class Model:\n    @classmethod\n    def model_json_schema(cls): ...")
    shell.user_ns |= {"shape": {"type": "object", "properties": {}}, "other": {"a": 1}, "person": 1}
    assert words(tab, "%%llm --chat ¦\nhi") == ["trip"]
    assert words(tab, "%llm chat ¦") == ["trip"]
    assert words(tab, "%llm chat trip ¦") == ["clear", "undo"]
    assert words(tab, "%%llm --schema ¦\nhi") == ["Model", "shape"]
    assert words(tab, "%%llm --with s¦\nhi") == ["summary"]
    assert words(tab, "%%llm -o pers¦\nhi") == ["person"]


def test_commands_and_their_words_are_offered(tab, shell) -> None:
    assert {"budget", "cache", "chat", "why", "show", "help", "use"} <= set(words(tab, "%llm ¦"))
    assert words(tab, "%llm bre¦") == ["breakers"]
    assert words(tab, "%llm breakers ¦") == ["isolate", "reset"]
    assert words(tab, "%llm breakers isolate deaf¦") == ["deaf", "deaf2"]
    assert words(tab, "%llm cache ¦") == ["clear", "off", "on"]
    assert words(tab, "%llm report m¦") == ["model", "month"]
    assert "session=" in words(tab, "%llm budget ¦")
    assert words(tab, "%llm budget day=1usd mo¦") == ["month=", "model."]
    assert words(tab, "%llm help --sche¦") == ["--schema"]
    assert words(tab, "x = %llm cal¦") == ["calls"]
    assert words(tab, "a = 1\n%llm cal¦\nb = 2") == ["calls"]


def test_ids_are_offered(tab, shell) -> None:
    run(shell, "%%llm a <<\nhi")
    request_id = shell.user_ns["a"].request_id
    assert words(tab, "%llm why ¦") == [request_id]
    assert words(tab, f"%llm show {request_id[:5]}¦") == [request_id]


def test_paths_are_offered(tab, folder) -> None:
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"")
    (folder / "pages.csv").write_bytes(b"")
    assert words(tab, "%%llm --image p¦\nhi") == ["pages.csv", "plots/"]
    assert words(tab, "%%llm --image plots/¦\nhi") == ["plots/a.png"]
    assert words(tab, "%llm export pag¦") == ["pages.csv"]


def test_names_inside_braces_are_offered(tab, shell) -> None:
    shell.user_ns |= {"frame": [1], "_private": 2, "text": "abc"}
    found = tab("%%llm\nWhat is {{ fra¦ }}?")
    assert found == ["%%llm\nWhat is {{ frame"]
    assert "%%llm\n{{ text" in tab("%%llm\n{{ ¦")
    assert not any("_private" in each for each in tab("%%llm\n{{ ¦"))
    assert tab("%%llm\n{{ _priv¦") == ["%%llm\n{{ _private"]
    assert tab("%%llm\n{% for x in fra¦ %}") == ["%%llm\n{% for x in frame"]
    assert "%%llm\n{{ text.upper" in tab("%%llm\n{{ text.up¦ }}")
    shell.user_ns["row"] = {"name": "x", "inner": {"deep": 1}}
    assert "%%llm\n{{ row.name" in tab("%%llm\n{{ row.na¦ }}")
    assert tab("%%llm\n{{ row.inner.de¦ }}") == ["%%llm\n{{ row.inner.deep"]
    assert "%%llm\n{{ frame | length" in tab("%%llm\n{{ frame | len¦ }}")


def test_looking_at_an_object_runs_none_of_its_code(tab, shell) -> None:
    class Trap:
        @property
        def inner(self):
            raise AssertionError("Tab has run a property")

    shell.user_ns["trap"] = Trap()
    assert tab("%%llm\n{{ trap.inn¦ }}") == ["%%llm\n{{ trap.inner"]
    offers = completion.Completer(LLMMagics.of(shell))
    assert offers.of("%%llm\n{{ trap.inner.x", 1, 15).words == []


def test_quotes_hold_the_users_own_text(tab) -> None:
    assert not any("--" in each for each in words(tab, '%%llm -s "You --¦\nhi') or [])


@pytest.mark.parametrize(
    "cell", ["pri¦", "import o¦", "%%tim¦", "%%llm¦", "%%llmx --ca¦", "x = '%llm ca¦'", "%%bash\nls --¦"]
)
def test_elsewhere_completion_is_as_it_was(tab, shell, cell) -> None:
    with_llmkit = tab(cell)
    give_back = LLMMagics.of(shell).undo
    matchers = list(shell.Completer.custom_matchers)
    shell.Completer.custom_matchers.clear()
    without = tab(cell)
    shell.Completer.custom_matchers[:] = matchers
    assert with_llmkit == without
    assert give_back


def test_unloading_takes_it_away(tab, shell) -> None:
    run(shell, "%unload_ext llmkit")
    assert [each for each in shell.Completer.custom_matchers if "llmkit" in str(each)] == []
    assert "--cache" not in words(tab, "%%llm --ca¦\nhi")


def test_wrong_settings_offer_what_needs_none(bare, folder) -> None:
    (folder / "llmkit.toml").write_text("modle = 'x'\n", "utf-8")
    run(bare, "%load_ext llmkit")
    offers = completion.Completer(LLMMagics.of(bare))
    assert offers.of("%%llm -m ", 0, 9) is None
    assert offers.of("%%llm --ca", 0, 10).words == ["--cache"]


def test_nothing_is_asked_of_the_network(tab, monkeypatch) -> None:
    def refused(*_, **__):
        raise AssertionError("Tab has reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert "tiny" in words(tab, "%%llm -m ¦\nhi")


def test_a_slow_disk_holds_nobody_up() -> None:
    """What a look finds after its time is offered the next time."""
    lists, go, done = completion._Lists(), threading.Event(), threading.Event()

    def look():
        go.wait(30)
        done.set()
        return ["found", "bad\x1b"]

    began = time.monotonic()
    assert lists.get("x", look) == []
    assert time.monotonic() - began < 10
    go.set()
    assert done.wait(30)
    lists._looking["x"].join(30)
    assert lists.get("x", look) == ["found"]


def test_a_look_that_fails_offers_nothing() -> None:
    def look():
        raise OSError

    assert completion._Lists().get("x", look) == []
