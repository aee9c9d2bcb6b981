"""``%%llm`` in a shell: prompt, options, variables, display, errors."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from IPython.utils.capture import capture_output

from llmkit.errors import (
    AllModelsFailed,
    ConfigError,
    InvalidRequest,
    LLMKitError,
    NotCached,
    StreamBroken,
    TemplateError,
)
from llmkit.events import AttemptStarted
from llmkit.notebook.asking import Interrupted, Progress
from llmkit.notebook.display import Terminal
from llmkit.notebook.magics import LLMMagics
from llmkit.reply import Reply
from tests.notebook.server import CUT, Gone, refused, said, silent


def run(shell, code):
    """Run a cell as a user would; what it displayed, printed and ended in."""
    with capture_output() as shown:
        shown.result = shell.run_cell(code, store_history=True)
    shown.error = shown.result.error_in_exec
    return shown


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_says_in_one_line_what_will_be_used(bare, folder) -> None:
    shown = run(bare, "%load_ext llmkit")
    caps = "caps for paid models: $0.50 a request, $5 a session, $20 a day (%llm budget off lifts them)"
    assert shown.stdout == f"llmkit: model tiny (from llmkit.toml) · {caps}\n"


def test_budgets_that_were_set_are_named(bare, folder, server) -> None:
    (folder / "llmkit.toml").write_text(
        server.settings() + "[budget]\nday = { usd = 2 }\nsession = { usd = 'off' }\n", "utf-8"
    )
    said = run(bare, "%load_ext llmkit").stdout
    assert "· caps: $2 a day; by default, for paid models: $0.50 a request (%llm budget off lifts them)\n" in said


def test_notices_are_said(bare, folder, server) -> None:
    (folder / "llmkit.toml").write_text(server.settings() + "[rate_limit]\nrequests = 5\n", "utf-8")
    assert "\nllmkit: [rate_limit] has no effect" in run(bare, "%load_ext llmkit").stdout


def test_a_second_load_is_harmless(shell) -> None:
    first = LLMMagics.of(shell)
    run(shell, "import llmkit\nllmkit.load_ipython_extension(get_ipython())")
    run(shell, "%load_ext llmkit")
    assert LLMMagics.of(shell) is first
    assert sum(isinstance(each, LLMMagics) for each in shell.configurables) == 1


def test_unloading_leaves_the_shell_as_it_was(bare, folder) -> None:
    def traces():
        magics = bare.magics_manager
        names = [name for name in (*magics.magics["line"], *magics.magics["cell"]) if "llm" in name]
        kinds = [type(each).__name__ for each in (*bare.configurables, *magics.registry.values())]
        return names, kinds.count("LLMMagics"), bare.custom_exceptions

    nothing = traces()
    assert nothing == ([], 0, ())
    run(bare, "%load_ext llmkit")
    run(bare, "%%llm\nhi")
    assert traces() == (["llm", "llm", "llm_compare", "llm_map", "llm_eval"], 2, (LLMKitError,))
    run(bare, "%unload_ext llmkit")
    assert traces() == nothing
    run(bare, "%load_ext llmkit")
    assert run(bare, "%%llm\nhi").error is None


def test_wrong_settings_are_said_at_once_and_fail_the_first_cell(bare, folder, server) -> None:
    (folder / "llmkit.toml").write_text("modle = 'x'\n", "utf-8")
    shown = run(bare, "%load_ext llmkit")
    assert shown.error is None
    assert "did you mean" in shown.stderr
    assert isinstance(run(bare, "%%llm\nhi").error, ConfigError)
    (folder / "llmkit.toml").write_text(server.settings(), "utf-8")  # mended: no reload needed
    assert run(bare, "%%llm\nhi").error is None


def test_settings_are_those_of_the_notebooks_folder(shell, server, tmp_path_factory, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert run(shell, "%%llm\nhi").error is None
    assert len(server.requests) == 1


# -- asking ------------------------------------------------------------------------------------------------------------


def test_the_cell_is_sent_and_the_reply_is_bound(shell, server) -> None:
    shown = run(shell, "%%llm answer << -o other\nWhat is {{ 6 * 7 }}?\n  keep  \n\n")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "What is 42?\n  keep"}]
    assert str(shell.user_ns["answer"]) == "Hello there."
    assert shell.user_ns["other"] is shell.user_ns["answer"] is shell.user_ns["_"]
    assert shown.result.result is None
    assert shown.stdout.startswith("Hello there.\n\ntiny-1 · 7 → 5 tokens · $0.000017 · ")
    assert shown.stdout.count("Hello there.") == 1


def test_underscore_goes_on_as_in_any_notebook(shell) -> None:
    run(shell, "1 + 1")
    run(shell, "%%llm\nhi")
    run(shell, "kept = (_.text, __)")
    assert shell.user_ns["kept"] == ("Hello there.", 2)


def test_a_reply_can_be_read_again(shell) -> None:
    run(shell, "%%llm a <<\nhi")
    assert "".join(chunk.text for chunk in shell.user_ns["a"]) == "Hello there."


def test_every_option_reaches_the_wire(shell, server) -> None:
    shell.user_ns["who"] = "Ana"
    run(shell, "%%llm -s 'Terse, {{ who }}' -t 0.5 --max-tokens 9 --seed 3 --stop END --user ana --tag k=v\nhi")
    (body,) = server.requests
    assert body["messages"][0] == {"role": "system", "content": "Terse, Ana"}
    assert (body["temperature"], body["seed"], body["stop"]) == (0.5, 3, ["END"])
    assert 9 in body.values()
    assert body["stream"] is True
    row = LLMMagics.of(shell).session.client.ledger.calls(limit=1)[0]
    assert (row["user"], row["tags"]) == ("ana", {"k": "v"})


def test_a_cell_that_is_run_again_costs_nothing_and_says_so(shell, server) -> None:
    run(shell, "%%llm\nhi")
    shown = run(shell, "%%llm a <<\nhi")
    assert shown.stdout.startswith("Hello there.\n\ntiny-1 · 7 → 5 tokens · $0 · ")
    assert shown.stdout.endswith(" · cache, saved $0.000017\n")
    assert shell.user_ns["a"].source == "cache"
    assert len(server.requests) == 1


def test_a_hit_is_drawn_once(shell, monkeypatch) -> None:
    run(shell, "%%llm\nhi")
    drawn = []
    for name in ("waiting", "growing", "done"):
        monkeypatch.setattr(Terminal, name, lambda *_, name=name: drawn.append(name))
    run(shell, "%%llm\nhi")
    assert drawn == ["done"]


def test_the_cache_is_used_as_the_cell_or_the_settings_say(shell, server) -> None:
    assert isinstance(run(shell, "%%llm --cache only\nhi").error, NotCached)
    run(shell, "%%llm\nhi")
    run(shell, "%%llm --cache refresh\nhi")
    run(shell, "%%llm --cache off\nhi")
    assert len(server.requests) == 3
    run(shell, "%config LLMMagics.cache = 'only'")
    assert isinstance(run(shell, "%%llm\nanother").error, NotCached)
    assert run(shell, "%%llm\nhi").error is None
    assert run(shell, "%%llm --cache use\nanother").error is None
    assert len(server.requests) == 4


def test_a_warning_and_an_alert_stand_below_the_line(bare, folder, server) -> None:
    limits = "[budget]\nrequest = { usd = 0.5 }\nday = { usd = 0.001 }\nwarn_at = 0.01\n[alerts]\ncall_usd = 0.00001\n"
    (folder / "llmkit.toml").write_text(server.settings() + limits, "utf-8")
    run(bare, "%load_ext llmkit")
    said = run(bare, "%%llm --max-tokens 9\nhi").stdout.splitlines()
    line = next(at for at, text in enumerate(said) if text.startswith("tiny-1 · "))
    assert "day" in said[line + 1]
    assert said[-1] == "this call cost $0.000017, more than $0.00001"


def test_settings_hold_for_cells_that_say_nothing(shell, server) -> None:
    run(shell, "%config LLMMagics.temperature = 0.25")
    run(shell, "%config LLMMagics.system = 'Be brief.'")
    run(shell, "%%llm\nhi")
    run(shell, "%%llm -t 1\nhi")
    assert [body["temperature"] for body in server.requests] == [0.25, 1.0]
    assert server.requests[0]["messages"][0]["content"] == "Be brief."


def test_an_impossible_setting_is_refused(shell) -> None:
    magics = LLMMagics.of(shell)
    with pytest.raises(ConfigError, match="temperature is a number from 0 to 2"):
        magics.temperature = 5
    with pytest.raises(ConfigError, match="chat, code"):
        magics.timeout = "slow"
    assert (magics.temperature, magics.timeout) == (None, None)


def test_the_settings_are_listed(shell) -> None:
    shown = run(shell, "%config LLMMagics").stdout
    for name in ("model", "temperature", "max_cost", "timeout", "traceback", "display"):
        assert f"LLMMagics.{name}=" in shown


def test_the_line_is_not_expanded_by_ipython(shell, server) -> None:
    shell.user_ns["cost"] = 3
    run(shell, "%%llm -s 'costs {cost} $cost'\nhi")
    assert server.requests[0]["messages"][0]["content"] == "costs {cost} $cost"


def test_raw_sends_the_cell_as_it_is(shell, server) -> None:
    run(shell, "%%llm --raw\n{{ nothing }} {% if %}")
    assert server.requests[0]["messages"][0]["content"] == "{{ nothing }} {% if %}"


def test_quiet_shows_nothing_and_binds(shell) -> None:
    shown = run(shell, "%%llm a << --quiet\nhi")
    assert (shown.stdout, shown.stderr, shown.outputs) == ("", "", [])
    assert shell.user_ns["a"].text == "Hello there."


def test_without_streaming(shell, server) -> None:
    shown = run(shell, "%%llm --no-stream\nhi")
    assert not server.requests[0].get("stream")
    assert shown.stdout.startswith("Hello there.\n")


def test_a_format_that_must_be_whole_is_printed_at_the_end(shell, server) -> None:
    server.next(said('{"a"', ": 1}"))
    assert run(shell, "%%llm --format json\nhi").stdout.startswith('{\n  "a": 1\n}\n\ntiny-1')


def test_a_terminal_is_not_commanded_by_a_model(shell, server) -> None:
    server.next(said("a\x1b]0;owned\x07b\x1b[2J"))
    assert run(shell, "%%llm\nhi").stdout.startswith("ab\n")


def test_shown_once_at_the_end(shell, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_DISPLAY", "final")
    shown = run(shell, "%%llm\nhi")
    answer, footer = shown.outputs
    assert answer.data == {"text/markdown": "Hello there.", "text/plain": "Hello there."}
    assert answer.metadata["llmkit"]["request_id"] == shell.user_ns["_"].request_id
    assert footer.data["text/plain"] == "tiny-1 · 7 → 5 tokens · $0.000017 · vllm"
    assert shown.stdout == ""


def test_a_wrong_display_is_an_error_before_any_spend(shell, server, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_DISPLAY", "loud")
    error = run(shell, "%%llm\nhi").error
    assert isinstance(error, ConfigError)
    assert "LLMKIT_DISPLAY is live or final, not 'loud'" in error.message
    assert server.requests == []


@pytest.mark.parametrize(
    "cell, kind",
    [
        ("%%llm\n{{ nothing }}", TemplateError),
        ("%%llm -s '{{ nothing }}'\nhi", TemplateError),
        ("%%llm --nonsense\nhi", ConfigError),
        ("%%llm -t 9\nhi", ConfigError),
        ("%%llm --max-cost free\nhi", ConfigError),
        ("%%llm --max-tokens 0\nhi", ConfigError),
        ("%%llm --timeout soon\nhi", ConfigError),
        ("%%llm -m nosuch\nhi", ConfigError),
        ("%%llm\n\n  \n", ConfigError),
        ("%%llm\n{{ '' }}", ConfigError),
    ],
)
def test_mistakes_cost_nothing(shell, server, cell, kind) -> None:
    shown = run(shell, cell)
    assert isinstance(shown.error, kind)
    assert server.requests == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_block_and_fails_the_cell(shell, server) -> None:
    server.next(refused(400, "bad key sk-abcdefghij0123456789 here"))
    shown = run(shell, "%%llm\nhi")
    assert isinstance(shown.error, InvalidRequest)
    assert "Traceback" not in shown.stdout + shown.stderr
    assert shown.stdout.count("InvalidRequest: vllm:tiny answered 400") == 1
    assert "spent: nothing" in shown.stdout
    assert "sk-abc" not in shown.stdout + shown.stderr


def test_when_all_models_fail_it_is_still_one_block(shell) -> None:
    shown = run(shell, "%%llm -m deaf,deaf2\nhi")
    assert isinstance(shown.error, AllModelsFailed)
    assert shown.stdout.count("AllModelsFailed: none of the 2") == 1
    assert "Traceback" not in shown.stdout + shown.stderr
    assert shown.stderr == ""


def test_python_code_gets_the_same_block(shell) -> None:
    code = "import llmkit\nwith llmkit.Client() as client:\n    client.complete('hi', model='deaf,deaf2')"
    shown = run(shell, code)
    assert isinstance(shown.error, AllModelsFailed)
    assert shown.stdout.startswith("AllModelsFailed: none of the 2")
    assert shown.stderr == ""


def test_long_messages_break_between_words(shell) -> None:
    shown = run(shell, "%%llm -m deaf,deaf2\nhi").stdout
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_the_traceback_is_shown_where_asked_for(shell, server) -> None:
    server.next(refused(400, "bad key sk-abcdefghij0123456789 here"))
    run(shell, "%config LLMMagics.traceback = True")
    shown = run(shell, "%%llm\nhi")
    assert "Traceback (most recent call last)" in shown.stdout
    assert shown.stdout.rstrip().endswith("spent: nothing")
    assert "sk-abc" not in shown.stdout


def test_a_partial_answer_stays(shell, server) -> None:
    server.next(said("The first half ", CUT))
    shown = run(shell, "%%llm a <<\nhi")
    assert isinstance(shown.error, StreamBroken)
    assert shown.stdout.index("The first half") < shown.stdout.index("broken off") < shown.stdout.index("StreamBroken:")
    assert shell.user_ns["a"].text == shell.user_ns["_"].text == "The first half "
    assert shell.user_ns["a"].outcome.status == "failed"


def interrupt_at(moment):
    """Interrupt this process once ``moment`` has come."""

    def press() -> None:
        if moment.wait(30):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def test_an_interrupt_keeps_what_had_arrived(shell, server, monkeypatch) -> None:
    gone, seen = Gone(), threading.Event()
    growing = Terminal.growing

    def drawn(view, text, status) -> None:
        growing(view, text, status)
        seen.set()

    monkeypatch.setattr(Terminal, "growing", drawn)
    server.next(said("The beginning ", gone))
    interrupt_at(seen)
    shown = run(shell, "%%llm a <<\nhi")
    assert isinstance(shown.error, Interrupted)
    assert gone.left.wait(30)
    assert shown.error.reply is shell.user_ns["a"] is shell.user_ns["_"]
    assert shell.user_ns["a"].text == "The beginning "
    assert "interrupted\nInterrupted: the connection is closed\nspent: $" in shown.stdout
    assert "kept: 14 characters" in shown.stdout
    assert "Traceback" not in shown.stdout + shown.stderr


def test_an_interrupt_before_anything_arrived(shell, server) -> None:
    gone = Gone()
    server.next(silent(gone))
    interrupt_at(gone.reached)
    shown = run(shell, "%%llm a <<\nhi")
    assert isinstance(shown.error, Interrupted)
    assert gone.left.wait(30)
    assert "a" not in shell.user_ns
    assert "spent: nothing that was seen; the provider may bill more" in shown.stdout


@pytest.mark.parametrize("lost", [AttemptStarted, Reply])
def test_an_interrupt_that_comes_when_a_report_is_taken_out(shell, server, monkeypatch, lost) -> None:
    """What it reported was heard by nobody then, and counts all the same."""
    gone, hear = Gone(), Progress.hear

    def interrupted(progress, news) -> None:
        if isinstance(news, lost):
            monkeypatch.setattr(Progress, "hear", hear)
            assert gone.reached.wait(30)
            raise KeyboardInterrupt
        hear(progress, news)

    monkeypatch.setattr(Progress, "hear", interrupted)
    server.next(said("The beginning ", gone) if lost is Reply else silent(gone))
    shown = run(shell, "%%llm a <<\nhi")
    assert isinstance(shown.error, Interrupted)
    assert "Interrupted: the connection is closed" in shown.stdout
    assert ("a" in shell.user_ns) is (lost is Reply)


def test_an_interrupt_before_anything_was_sent() -> None:
    assert Interrupted(None, None, sent=False, billed=False).block() == "Interrupted: nothing was sent"
    assert "spent: unknown" in Interrupted(None, None, sent=True, billed=False).block()


def test_a_degraded_answer_is_shown_and_marked(shell, folder, server) -> None:
    (folder / "llmkit.toml").write_text(server.settings() + "[degraded]\ntext = 'Please try again.'\n", "utf-8")
    run(shell, "%reload_ext llmkit")
    shown = run(shell, "%%llm -m deaf\nhi")
    assert shown.error is None
    assert shown.stdout.startswith("Please try again.\n\n$0 · ")
    assert "degraded: the text set for when no model answers" in shown.stdout


def test_a_cut_answer_says_at_what_cap(shell, server) -> None:
    server.next(said(*["word "] * 500))
    shown = run(shell, "%%llm --max-cost 0.001\nhi")
    assert shown.error is None
    assert "cut at the cap of $0.001" in shown.stdout


def test_somebody_elses_handler_of_errors_goes_on(bare, folder) -> None:
    seen = []
    bare.set_custom_exc((KeyError,), lambda shell, kind, error, tb, tb_offset=None: seen.append(kind))
    run(bare, "%load_ext llmkit")
    run(bare, "{}['x']")
    run(bare, "%%llm --nonsense\nhi")
    run(bare, "%unload_ext llmkit")
    run(bare, "{}['x']")
    assert seen == [KeyError, KeyError]
    bare.set_custom_exc((), None)


def test_the_help_of_the_cell_is_there(shell) -> None:
    shown = run(shell, "print(get_ipython().find_cell_magic('llm').__doc__)").stdout
    assert "--max-cost" in shown
    assert "%%llm answer <<" in shown


# -- tiers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiered(bare, folder, server):
    (folder / "llmkit.toml").write_text(
        server.settings() + '[tiers]\nsimple = "simulator"\nhard = "tiny"\n', encoding="utf-8"
    )
    run(bare, "%load_ext llmkit")
    return bare


def test_a_tier_chooses_the_model_of_a_cell(tiered, server) -> None:
    run(tiered, "%%llm a << --tier simple\nhi")
    run(tiered, "%%llm b << --tier hard\nhi")
    assert (tiered.user_ns["a"].provider, tiered.user_ns["b"].provider) == ("simulator", "vllm")
    error = run(tiered, "%%llm --tier medium\nhi").error
    assert "the tier medium is not set" in str(error)
    assert 'medium = "provider:model"' in error.block()
    assert "not both" in str(run(tiered, "%%llm --tier hard -m tiny\nhi").error)
    assert "invalid choice: 'auto'" in str(run(tiered, "%%llm --tier auto\nhi").error)
    assert len(server.requests) == 1


def test_of_a_model_and_a_tier_for_all_cells_the_last_one_set_holds(tiered, server) -> None:
    magics = LLMMagics.of(tiered)
    run(tiered, '%config LLMMagics.tier = "simple"')
    assert run(tiered, "%%llm\nhi").error is None
    assert server.requests == []
    assert "simulator (tier simple)" in run(tiered, "%llm").stdout
    assert "tiers\n  simple: simulator\n  hard: tiny\n" in run(tiered, "%llm models").stdout
    run(tiered, "%%llm -m tiny\nhi")  # a cell says either over it
    run(tiered, "%%llm --tier hard\nhi --")
    assert len(server.requests) == 2
    run(tiered, "%llm use tiny")
    assert (magics.model, magics.tier) == ("tiny", "")
    run(tiered, "%%llm --tier simple\nhi")
    assert len(server.requests) == 2
    run(tiered, '%config LLMMagics.tier = "hard"')
    assert (magics.model, magics.tier) == ("", "hard")


def test_a_tier_that_is_not_set_is_refused_when_it_is_chosen(tiered, caplog) -> None:
    run(tiered, '%config LLMMagics.tier = "medium"')
    assert "the tier medium is not set" in caplog.text  # where %config says what it refuses
    assert LLMMagics.of(tiered).tier == ""


def test_a_table_is_written_for_the_model(shell, server) -> None:
    run(shell, "import pandas as pd\ndf = pd.DataFrame({'a': range(300), 'b': '{{ secrets }}'})")
    assert run(shell, "%%llm\nRead this:\n{{ df | table(1) }}\n{{ {'n': df.a.max()} }}").error is None
    (message,) = server.requests[0]["messages"]
    table = "| a | b |\n| --- | --- |\n| 0 | {{ secrets }} |\n\n(first 1 of 300 rows)"
    assert message["content"] == f'Read this:\n{table}\n{{"n": 299}}'
    error = run(shell, "%%llm\n{{ df | tabel }}").error
    assert isinstance(error, TemplateError)
    assert "did you mean table?" in error.block()
    assert len(server.requests) == 1
