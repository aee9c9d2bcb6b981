"""The commands at the shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import llmkit
from llmkit.__main__ import main
from llmkit.commands import demo, lab
from llmkit.doctor import examine
from llmkit.testing import FakeClock, Simulator

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """No settings of a folder above may matter."""
    folder = tmp_path / "somewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_version(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"llmkit {llmkit.__version__}\n"


def test_python_m_llmkit_and_its_help() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert "examples:" in done.stdout
    for command in ("demo", "lab", "doctor", "report", "export", "simulate"):
        assert f"llmkit {command}" in done.stdout


@pytest.mark.parametrize(
    "words", [[], ["nothing"], ["doctor", "--fast"], ["simulate", "--port", "70000"], ["simulate", "--port", "x"]]
)
def test_wrong_words_exit_with_2(words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_an_error_is_one_block_on_stderr(capsys) -> None:
    assert main(["lab", "no/such/folder"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ConfigError: there is no notebook or folder no/such/folder\nnext: ")
    assert "Traceback" not in err


def test_an_interrupt_exits_with_130(monkeypatch, capsys) -> None:
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.commands.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- lab -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The commands that would have started JupyterLab."""
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            return 3

    monkeypatch.setattr(lab.subprocess, "Popen", Process)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 1000, raising=False)
    return commands


def test_lab_opens_the_quickstart_of_the_clone(started, capsys) -> None:
    assert main(["lab"]) == 3
    address = "--LabApp.default_url=/lab/tree/quickstart.ipynb"
    assert started == [[sys.executable, "-m", "jupyterlab", str(ROOT / "notebooks" / "quickstart.ipynb"), address]]
    assert "quickstart.ipynb" in capsys.readouterr().out


def test_lab_puts_a_copy_into_a_folder_and_keeps_one_that_is_there(started, elsewhere) -> None:
    assert main(["lab", "."]) == 3
    copy = elsewhere / "quickstart.ipynb"
    assert json.loads(copy.read_text("utf-8"))["nbformat"] == 4
    copy.write_text("mine", "utf-8")
    assert main(["lab", str(elsewhere)]) == 3
    assert copy.read_text("utf-8") == "mine"


def test_lab_without_a_clone_copies_the_packaged_notebook(started, elsewhere, monkeypatch, tmp_path) -> None:
    packaged = tmp_path / "site-packages" / "llmkit" / "quickstart.ipynb"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("{}", "utf-8")
    monkeypatch.setattr(lab, "_original", lambda: packaged)
    assert main(["lab"]) == 3
    assert (elsewhere / "quickstart.ipynb").read_text("utf-8") == "{}"
    assert started[0][3] == str(elsewhere / "quickstart.ipynb")


def test_lab_hands_on_what_it_does_not_know(started) -> None:
    main(["lab", "--port", "9999", "--no-browser"])
    assert started[0][5:] == ["--port", "9999", "--no-browser"]
    main(["lab", ".", "--ip=0.0.0.0"])
    assert started[1][5:] == ["--ip=0.0.0.0"]


def test_lab_lets_root_in(started, monkeypatch) -> None:
    monkeypatch.setattr(lab.os, "geteuid", lambda: 0, raising=False)
    main(["lab"])
    main(["lab", "--allow-root=False"])
    assert [command[-1] for command in started] == ["--allow-root", "--allow-root=False"]


def test_lab_says_how_to_get_jupyterlab(monkeypatch, capsys) -> None:
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda _: None)
    assert main(["lab"]) == 1
    assert 'pip install "llmkit[lab]"' in capsys.readouterr().err


def test_lab_in_a_folder_that_cannot_be_written(started, monkeypatch, capsys) -> None:
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lab.shutil, "copyfile", refuse)
    assert main(["lab", "."]) == 1
    assert "cannot be written: Permission denied" in capsys.readouterr().err


# -- doctor ----------------------------------------------------------------------------------------------------------

OFFLINE = {"LLMKIT_OFFLINE": "1"}


def findings(environ):
    return {finding.subject: finding for finding in examine(environ)}


def test_doctor_finds_nothing_wrong_here(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "WRONG" not in out
    assert "the simulator (offline: no call leaves this machine)" in out
    assert "ledger.sqlite3" in out


def test_doctor_never_shows_a_key() -> None:
    found = findings(OFFLINE | {"OPENAI_API_KEY": "sk-verysecretindeed", "GROQ_API_KEY": "gsk_alsosecret"})
    assert found["keys"].text == "OPENAI_API_KEY, GROQ_API_KEY are set"
    assert "secret" not in str(found)


def test_doctor_names_wrong_settings(elsewhere, capsys) -> None:
    (elsewhere / "llmkit.toml").write_text("[timeout]\ntotl = 3\n", "utf-8")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG settings" in out
    assert "line 2" in out
    assert "total" in out


def test_doctor_names_a_missing_key() -> None:
    found = list(examine({"LLMKIT_MODEL": "openai:gpt-5-mini"} | {"HTTPS_PROXY": "http://127.0.0.1:9"}))
    assert ("model", "wrong") in [(f.subject, f.state) for f in found]
    assert any("OPENAI_API_KEY is not set" in f.text for f in found)


def test_doctor_tells_a_server_that_cannot_be_reached() -> None:
    environ = {"OPENAI_API_KEY": "k" * 20, "OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"}
    found = findings(environ)
    assert found["openai"].state == "wrong"
    assert "cannot be reached" in found["openai"].text
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert findings(environ)["openai"].state == "ok"


def test_doctor_tells_a_store_that_cannot_be_written(elsewhere) -> None:
    (elsewhere / "llmkit.toml").write_text(f'[state]\nurl = "sqlite:///{elsewhere}/llmkit.toml/ledger"\n', "utf-8")
    assert findings(OFFLINE)["store"].state == "wrong"


def test_doctor_tells_a_server_that_does_not_answer(elsewhere) -> None:
    (elsewhere / "llmkit.toml").write_text(f'[state]\nurl = "redis://127.0.0.1:{free_port()}/0"\n', "utf-8")
    found = findings(OFFLINE)
    assert found["server"].state == "wrong"
    assert "refused" in found["server"].text
    assert found["store"].state == "ok"  # the ledger is on this machine


# -- report and export -----------------------------------------------------------------------------------------------


@pytest.fixture
def booked():
    """A ledger with a call and one that was answered from the cache."""
    with llmkit.Client(model="simulator") as client:
        for _ in range(2):
            client.complete("Hello", user="ana", tags={"app": "docs"})


def test_a_report_of_an_empty_ledger(capsys) -> None:
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "no call in the last 30d\n"


def test_a_report_by_user(booked, capsys) -> None:
    assert main(["report", "user", "7d"]) == 0
    head, _, names, row = capsys.readouterr().out.splitlines()
    assert head == "$0 for 2 calls, by user, last 7d"
    assert names.split()[:3] == ["user", "calls", "attempts"]
    assert row.split()[:3] == ["ana", "2", "1"]
    assert main(["report", "usr"]) == 1
    assert "did you mean user?" in capsys.readouterr().err


def test_the_export(booked, elsewhere, capsys) -> None:
    assert main(["export", "calls.jsonl"]) == 0
    assert capsys.readouterr().out == "2 calls with all attempts in calls.jsonl\n"
    lines = [json.loads(line) for line in (elsewhere / "calls.jsonl").read_text("utf-8").splitlines()]
    assert [line["source"] for line in lines] == ["simulated", "cache"]
    assert main(["export", "calls.jsonl"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["export", "calls.jsonl", "--overwrite"]) == 0


# -- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unhurried(monkeypatch):
    """The demo on a clock that does not wait."""
    clock = FakeClock()
    monkeypatch.setattr(demo, "AsyncClient", partial(demo.AsyncClient, clock=clock))
    monkeypatch.setattr("llmkit.testing.Simulator", partial(Simulator, clock=clock))


def test_the_demo_shows_a_retry_a_fallback_a_break_and_the_ledger(unhurried, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k" * 20)  # it must not matter
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "· simulated · 1 retry (503)" in out
    assert "fell back from simulator:premium (QuotaExhausted)" in out
    assert "StreamBroken: simulator:shaky" in out
    table = [line.split() for line in out.split("5. The ledger")[1].splitlines()]
    assert [row[1] for row in table if len(row) > 5 and "→" in row] == ["complete", "complete", "complete", "failed"]


def test_the_demo_books_nothing_on_disk(unhurried, capsys) -> None:
    assert main(["demo", "Hello there"]) == 0
    assert "> Hello there" in capsys.readouterr().out
    assert not Path(os.environ["LLMKIT_DATA_DIR"]).exists()


def test_the_demo_with_a_model_asks_only_that(capsys) -> None:
    assert main(["demo", "--model", "simulator:other", "Hello"]) == 0
    out = capsys.readouterr().out
    assert "simulated" in out
    assert "other · 1 → " in out
    assert main(["demo", "--model", "openai:gpt-5-mini"]) == 1  # offline: refused before anything is sent
    assert "CallRejected: openai:gpt-5-mini is not on this machine" in capsys.readouterr().err


# -- simulate --------------------------------------------------------------------------------------------------------


def test_simulate_serves_until_it_is_interrupted() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llmkit", "simulate", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        url = process.stdout.readline().split()[4].removesuffix("/chat/completions")
        client = llmkit.Client(model="vllm:any", providers={"vllm": {"base_url": url, "local": True}})
        assert "simul" in client.complete("Hello").text.lower()
        client.close()
        process.send_signal(signal.SIGINT)
        try:
            assert "1 call, " in process.communicate(timeout=20)[0]
        finally:
            process.kill()
        assert process.returncode == 0


def test_simulate_on_a_port_that_is_taken(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main(["simulate", "--port", str(server.getsockname()[1])]) == 1
    assert "cannot be used: Address already in use\nnext: --port 0" in capsys.readouterr().err
