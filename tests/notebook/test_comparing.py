"""``%%llm_compare`` and ``%%llm --repeat`` in a shell and in a kernel, over a real socket."""

from __future__ import annotations

import os
import re
import signal
import threading

import nbformat
import pytest
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

from llmkit.errors import ConfigError, LLMKitError, TemplateError
from llmkit.notebook.comparing import ComparisonInterrupted, TerminalGrid
from llmkit.notebook.magics import LLMMagics
from llmkit.testing import Fault, Simulator
from tests.notebook.strict import nbval
from tests.notebook.test_kernel import kernel, running  # noqa: F401 - fixtures
from tests.notebook.test_saved import environment, sanitize  # noqa: F401 - a fixture among them

TEXTS = {"a": "The quick fox.", "b": "The slow fox.", "c": "Something else entirely: cats."}
PRICES = {"a": (1, 2), "b": (1, 9), "c": (0.1, 0.2)}


@pytest.fixture
def simulator():
    return Simulator(lambda body: TEXTS[body["model"]], models=["a", "b", "c"])


@pytest.fixture
def models(simulator):
    """An ``llmkit.toml`` with three models of the simulator, and one that it does not have."""
    with simulator.server(port=0) as url:
        lines = ['model = "a"']
        for name in ("a", "b", "c", "ghost"):
            cost, out = PRICES.get(name, (1, 1))
            lines += [f"[models.{name}]", 'provider = "vllm"', f'model = "{name}"', f'base_url = "{url}"']
            lines += [f"price = {{ input = {cost}, output = {out} }}"]
        yield "\n".join([*lines, "[retry]", "attempts = 2", "initial = 0.1"]) + "\n"


@pytest.fixture
def grids(bare, folder, models, monkeypatch):
    """A shell whose cells show their end only."""
    (folder / "llmkit.toml").write_text(models, "utf-8")
    monkeypatch.setenv("LLMKIT_DISPLAY", "final")
    bare.run_line_magic("load_ext", "llmkit")
    return bare


def run(shell, code):
    with capture_output() as shown:
        shown.result = shell.run_cell(code, store_history=True)
    shown.error = shown.result.error_in_exec
    shown.html = "".join(output.data.get("text/html", "") for output in shown.outputs)
    shown.text = "\n".join(output.data.get("text/plain", "") for output in shown.outputs)
    return shown


# -- the comparison ----------------------------------------------------------------------------------------------------


def test_models_are_asked_side_by_side_and_the_variable_is_a_frame(grids, simulator) -> None:
    shown = run(grids, "%%llm_compare grid << -m a,b,c -t 0\nWhat jumps over {{ 1 + 1 }} dogs?")
    assert shown.error is None
    frame = grids.user_ns["grid"]
    assert frame is grids.user_ns["_"]
    assert frame["model"].tolist() == ["a", "b", "c"]
    assert frame["text"].tolist() == [TEXTS[name] for name in "abc"]
    assert (frame["temperature"].tolist(), frame["status"].tolist()) == ([0.0] * 3, ["complete"] * 3)
    assert {request.body["messages"][0]["content"] for request in simulator.requests} == {"What jumps over 2 dogs?"}
    assert shown.html.count('aria-label="answer ') == 3
    assert len(shown.outputs) == 1
    about = shown.outputs[0].metadata["llmkit"]["comparison"]
    assert [each["request_id"] for each in about] == frame["request_id"].tolist()


def test_the_cheapest_is_marked_and_differences_are(grids) -> None:
    shown = run(grids, "%%llm_compare -m a,b,c\nhi")
    (cheapest,) = [line for line in shown.text.split("\n") if "cheapest" in line]
    assert cheapest.startswith("3  c")
    assert "fastest" not in shown.text + shown.html  # it differs from run to run
    assert "against answer 1: +1 -1 words" in shown.text
    assert "differs from answer 1 throughout" in shown.text
    assert ">quick </del>" in shown.html
    assert ">slow </ins>" in shown.html


def test_what_is_shown_at_the_end_is_the_same_each_time(grids) -> None:
    cell = "%%llm_compare -m a,b -t 0,1 --repeat 2 --cache off\nhi"
    first, second = run(grids, cell), run(grids, cell)
    assert first.html == second.html
    assert first.text == second.text
    assert "8 answers" in first.text


def test_one_that_fails_is_a_card_with_its_error_and_the_cell_goes_well(grids) -> None:
    shown = run(grids, "%%llm_compare grid << -m a,ghost,b\nhi")
    assert shown.error is None
    assert grids.user_ns["grid"]["status"].tolist() == ["complete", "failed", "complete"]
    assert "ModelNotFound: " in shown.html
    assert "2 whole" in shown.text
    assert "1 failed" in shown.text


def test_where_not_one_comes_the_cell_fails_and_the_frame_is_kept(grids) -> None:
    shown = run(grids, "%%llm_compare grid << -m ghost -t 0,1\nhi")
    assert type(shown.error) is LLMKitError
    assert "none of the 2 answers came: ModelNotFound" in shown.error.message
    assert "spent: nothing" in shown.error.block()
    assert grids.user_ns["grid"]["status"].tolist() == ["failed", "failed"]


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        ("%%llm_compare -m a,b\n", ConfigError, "the prompt is empty"),
        ("%%llm_compare -m a,\nhi", ConfigError, "-m is names with commas between"),
        ("%%llm_compare -t 0,x\nhi", ConfigError, "-t is numbers with commas between"),
        ("%%llm_compare -t 0,5\nhi", ConfigError, "temperature is a number from 0 to 2"),
        ("%%llm_compare -m a,a\nhi", ConfigError, "the model 'a' stands there twice|model a stands there twice"),
        ("%%llm_compare -m a,nobody\nhi", ConfigError, "nobody"),
        ("%%llm_compare --chat x\nhi", ConfigError, "%%llm_compare: there is no option --chat"),
        ("%%llm_compare --modle a\nhi", ConfigError, "did you mean --model"),
        ("%%llm_compare -m a\n{{ nowhere }}", TemplateError, "nowhere is not defined"),
        ("%%llm_compare --with unknown\nhi", ConfigError, "no prompt is kept as unknown"),
        ("%%llm_compare -m a,b,c --repeat 100\nhi", ConfigError, "256 is the most"),
        ("%%llm --repeat 2 --chat trip\nhi", ConfigError, "--repeat and --chat exclude each other"),
        ("%%llm --repeat 0\nhi", ConfigError, "--repeat is a whole number from 1"),
        ("%%llm_map frame\nhi", ConfigError, "%%llm_map is not in this version yet; nothing was sent"),
        ("%%llm_eval cases", ConfigError, "%%llm_eval is not in this version yet; nothing was sent"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_sent(grids, simulator, cell, kind, message) -> None:
    shown = run(grids, cell)
    assert type(shown.error) is kind
    assert re.search(message, shown.error.message)
    assert simulator.calls == 0


def test_versions_of_a_prompt_are_compared(grids, simulator) -> None:
    grids.user_ns["x"] = 3
    run(grids, "%%llm --save sum\nSum up {{ x }}.")
    run(grids, "%%llm --save sum -s 'Be {{ x }} words short.'\nSum up {{ x }} again.")
    assert run(grids, "%%llm_compare grid << --with sum@1,sum@2\nNow.").error is None
    frame = grids.user_ns["grid"]
    assert frame["prompt"].tolist() == ["sum@1", "sum@2"]
    asked = sorted([m["content"] for m in request.body["messages"]] for request in list(simulator.requests)[-2:])
    assert asked == [["Be 3 words short.", "Sum up 3 again.\n\nNow."], ["Sum up 3.\n\nNow."]]
    assert [reply.call.tags for reply in frame["reply"]] == [{"prompt": "sum@1"}, {"prompt": "sum@2"}]
    twice = run(grids, "%%llm_compare --with sum@2,sum\nNow.").error
    assert "sum@2" in twice.message
    assert "stands there twice" in twice.message


def test_help_says_its_own_options(grids) -> None:
    text = run(grids, "%%llm_compare --help").stdout
    assert "several models with commas between" in text
    assert "--chat" not in text


def test_quiet_shows_nothing(grids) -> None:
    shown = run(grids, "%%llm_compare grid << -m a,b --quiet\nhi")
    assert (shown.outputs, shown.stdout) == ([], "")
    assert len(grids.user_ns["grid"]) == 2


def test_a_comparison_is_planned_and_not_asked(grids, simulator) -> None:
    shown = run(grids, "%%llm_compare -m a,b -t 0,1 --plan\nhi")
    assert shown.error is None
    assert "4 calls: 4 would be asked" in shown.text
    assert simulator.calls == 0


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_a_list_of_replies(grids, simulator) -> None:
    shown = run(grids, "%%llm r << --repeat 3\nhi")
    assert shown.error is None
    assert [reply.text for reply in grids.user_ns["r"]] == [TEXTS["a"]] * 3
    assert [reply.call.repeat for reply in grids.user_ns["r"]] == [0, 1, 2]
    assert "".join(chunk.text for chunk in grids.user_ns["_"][2]) == TEXTS["a"]
    assert simulator.calls == 3
    assert "the same as answer 1" in shown.text
    again = run(grids, "%%llm r << --repeat 4\nhi")
    assert [reply.source for reply in grids.user_ns["r"]] == ["cache"] * 3 + ["provider"]
    assert "cheapest" not in again.text  # all would cost the same


def test_a_sample_that_fails_fails_the_cell_and_the_others_are_kept(grids, simulator) -> None:
    simulator.fail(Fault.status(400, message="no"), times=1)
    shown = run(grids, "%%llm r << --repeat 3 --cache off\nhi")
    assert "1 of the 3 samples did not come: InvalidRequest" in shown.error.message
    assert [reply.text for reply in grids.user_ns["r"]] == [TEXTS["a"]] * 2


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_an_interrupt_closes_every_connection_and_keeps_what_had_arrived(
    bare, folder, models, simulator, monkeypatch
) -> None:
    (folder / "llmkit.toml").write_text(models, "utf-8")
    bare.run_line_magic("load_ext", "llmkit")
    simulator.fail(Fault.stall(after=2), times=None)
    seen = threading.Event()
    growing = TerminalGrid.growing

    def drawn(view, trials, status) -> None:
        growing(view, trials, status)
        if all(len(trial.text.split()) == 2 for trial in trials):
            seen.set()

    def press() -> None:
        if seen.wait(30):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TerminalGrid, "growing", drawn)
    threading.Thread(target=press, daemon=True).start()
    shown = run(bare, "%%llm_compare grid << -m a,b\nhi")
    assert isinstance(shown.error, ComparisonInterrupted)
    simulator.wait_until(lambda it: it.disconnects == 2)
    frame = bare.user_ns["grid"]
    assert frame["status"].tolist() == ["aborted", "aborted"]
    assert frame["text"].tolist() == ["The quick", "The slow"]
    assert "kept: 0 of 2 answers, and 2 in part" in shown.stdout
    assert "Interrupted: the connections are closed\nspent: $" in shown.stdout
    assert shown.stdout.count("Interrupted:") == 1
    budgets = LLMMagics.of(bare).session
    assert budgets.portal.run(budgets.client.budgets())["held"].sum() == 0
    assert [reply.attempts[0].status for reply in frame["reply"]] == ["aborted", "aborted"]


# -- in a kernel -------------------------------------------------------------------------------------------------------


def test_a_grid_grows_in_a_frame_that_ends_empty_and_is_put_out_once(kernel, models, simulator) -> None:  # noqa: F811
    (kernel.folder / "llmkit.toml").write_text(models, "utf-8")
    assert kernel.run("%reload_ext llmkit") == "ok"
    simulator.fail(Fault.slow(0.3, 0.05), times=None)
    assert kernel.run("%%llm_compare grid << -m a,b,ghost\n<b>hi</b>") == "ok"
    first, *drawn, _, last = [m for m in kernel.messages if m["msg_type"] in {"display_data", "update_display_data"}]
    assert (first["msg_type"], first["content"]["data"]) == ("display_data", {})
    assert (last["msg_type"], last["content"]["data"]) == ("update_display_data", {})
    assert 1 <= len(drawn) <= 40
    assert all("aria-busy" in m["content"]["data"]["text/html"] for m in drawn)
    (final,) = kernel.outputs()
    assert final["kind"] == "display_data"
    assert "aria-busy" not in final["data"]["text/html"]
    assert "The quick fox." in final["data"]["text/plain"]
    assert kernel.value("[list(grid.status), grid.text[0]]") == [["complete", "complete", "failed"], "The quick fox."]


# -- saved -------------------------------------------------------------------------------------------------------------


def test_a_grid_that_was_saved_live_passes_strict_nbval(folder, models, environment, monkeypatch) -> None:  # noqa: F811
    (folder / "llmkit.toml").write_text(models, "utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sources = ["%load_ext llmkit", "%%llm_compare -m a,b,c,ghost\nhi", "%%llm --repeat 2\nhi"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(book, resources={"metadata": {"path": str(folder)}}, kernel_name="python3").execute()
    assert book.cells[1].outputs[0]["data"] == {}
    nbformat.write(book, folder / "saved.ipynb")
    for display in ("live", "final"):
        shown = environment | {"LLMKIT_DISPLAY": display}
        done = nbval(folder, shown, "--nbval-sanitize-with", sanitize(), "saved.ipynb")
        assert done.returncode == 0, done.stdout
