"""llmkit.client: the same chain from a script, a running loop, several threads and several loops."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

import llmkit
from llmkit.testing import FakeClock, Fault, Simulator

KEY = "sk-fake-0123456789abcdefghijklmnop"  # no key of anything


def settings(tmp_path: Path, url: str = "http://127.0.0.1:9/v1", **more: object) -> dict[str, object]:
    config = llmkit.Config.of(
        environ={"TEST_KEY": KEY},
        model="m",
        models={
            "m": {"provider": "own", "model": "m-1", "price": {"input": 1, "output": 2}},
            "other": {"provider": "own", "model": "m-2", "price": {"input": 1, "output": 2}},
            "chain": {"chain": ["m", "other"]},
            "claude": {"provider": "own-anthropic", "model": "c-1", "price": {"input": 1, "output": 2}},
        },
        providers={
            "own": {"base_url": url, "api_key_env": "TEST_KEY"},
            "own-anthropic": {"base_url": url, "api_key_env": "TEST_KEY", "wire": "anthropic"},
        },
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
        **more,
    )
    return {"config": config}


@pytest.fixture
def simulator() -> Simulator:
    return Simulator("one two three", clock=FakeClock())


@pytest.fixture
def client(tmp_path, simulator):
    with llmkit.Client(transport=simulator, **settings(tmp_path)) as made:
        yield made


# -- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["m", "claude"])
def test_a_reply_says_everything_whatever_the_wire_format(client, model: str) -> None:
    reply = client.complete("a question", model=model, user="ana", tags={"app": "docs"})
    assert str(reply) == "one two three"
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.estimated) == (2, 3, False)
    assert reply.cost_usd == Decimal("0.000008")
    assert (reply.source, reply.finish_reason, reply.outcome.status) == ("provider", "stop", "complete")
    assert reply.model.startswith(("m-1", "c-1"))
    assert reply.provider in {"own", "own-anthropic"}
    assert reply.latency_s >= reply.time_to_first_token_s >= 0
    assert [attempt.status for attempt in reply.attempts] == ["complete"]
    (row,) = client.calls().to_dict("records")
    assert (row["request_id"], row["user"], row["tags"]) == (reply.request_id, "ana", {"app": "docs"})
    assert row["cost_usd"] == pytest.approx(8e-6)


def test_a_tier_chooses_the_model_of_one_call(tmp_path, simulator) -> None:
    with llmkit.Client(transport=simulator, **settings(tmp_path, tiers={"simple": "other", "hard": "chain"})) as client:
        assert client.complete("a question", tier="simple").model.startswith("m-2")
        assert client.complete("a question", tier="hard").model.startswith("m-1")
        with client.stream("a question") as reply:
            assert "".join(chunk.text for chunk in reply) == "one two three"
        assert reply.model.startswith("m-1")
        sent = simulator.calls
        with pytest.raises(llmkit.ConfigError, match="the tier medium is not set; \\[tiers\\] sets simple, hard"):
            client.complete("a question", tier="medium")
        with pytest.raises(llmkit.ConfigError, match="not both"):
            client.complete("a question", tier="simple", model="m")
        assert (simulator.calls, len(client.calls())) == (sent, 3)


@pytest.mark.parametrize("model", ["m", "claude"])
def test_a_stream_is_read_as_it_arrives(client, model: str) -> None:
    with client.stream("a question", model=model) as reply:
        assert reply.outcome is None
        assert "".join(chunk.text for chunk in reply) == "one two three"
    assert (reply.outcome.status, reply.usage.output_tokens) == ("complete", 3)


def test_messages_of_every_form_and_a_system_prompt(client, simulator) -> None:
    for prompt in (
        "hi",
        llmkit.Message("user", "hi"),
        [{"role": "user", "content": "hi"}],
        [llmkit.Message("user", "hi")],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ):
        client.complete(prompt, system="be brief")
        system, user = simulator.requests[-1].body["messages"]
        assert (system["role"], system["content"], user["role"]) == ("system", "be brief", "user")


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (3, TypeError),
        ([3], TypeError),
        ([{"role": "user"}], ValueError),
        ([{"role": "user", "content": 3}], TypeError),
        ([], ValueError),
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_is_sent(client, simulator, prompt, error) -> None:
    with pytest.raises(error):
        client.complete(prompt)
    assert simulator.calls == 0


def test_wrong_names_are_refused_with_the_nearest_right_one(client, simulator) -> None:
    with pytest.raises(llmkit.ConfigError, match="did you mean max_tokens"):
        client.complete("x", max_token=3)
    with pytest.raises(llmkit.ConfigError, match="other"):
        client.complete("x", model="othr")
    assert simulator.calls == 0


def test_parameters_reach_the_wire(client, simulator) -> None:
    client.complete("x", temperature=0, max_tokens=7, seed=3, stop=["END"], top_p=0.5, extra={"min_p": 0.1})
    body = simulator.requests[-1].body
    assert {key: body[key] for key in ("temperature", "max_tokens", "seed", "stop", "top_p", "min_p")} == {
        "temperature": 0, "max_tokens": 7, "seed": 3, "stop": ["END"], "top_p": 0.5, "min_p": 0.1,
    }  # fmt: skip


def test_a_cap_cuts_a_running_stream_and_says_so(tmp_path) -> None:
    simulator = Simulator("word " * 50, clock=FakeClock())
    with llmkit.Client(**settings(tmp_path), clock=FakeClock(), transport=simulator) as client:
        simulator.fail(Fault.endless())
        with client.stream("x", max_cost="0.0005") as reply:
            assert all(chunk.text for chunk in reply)
        assert (reply.finish_reason, reply.outcome.status) == ("max_cost", "aborted")
        assert reply.text
        simulator.wait_until(lambda it: it.open == 0)
        with pytest.raises(llmkit.BudgetExceeded) as caught:
            client.complete("x " * 5000, max_cost="0.000001")
        assert caught.value.spent == 0


def test_retries_and_fallbacks_end_to_end(tmp_path) -> None:
    clock = FakeClock()
    simulator = Simulator("fine", clock=clock)
    with llmkit.Client(**settings(tmp_path), clock=clock, transport=simulator) as client:
        simulator.fail(Fault.status(503, retry_after=3), times=2)
        reply = client.complete("x")
        assert [attempt.http_status for attempt in reply.attempts] == [503, 503, 200]
        assert clock.sleeps == [3, 3]
        simulator.fail(Fault.auth())
        reply = client.complete("y", model="chain")
        assert (reply.model, reply.skipped[0].endpoint) == ("m-2", "own:m-1")
        assert KEY not in repr(reply.skipped)
        keys = {request.headers["idempotency-key"] for request in list(simulator.requests)[:3]}
        assert len(keys) == 1


def test_degraded(tmp_path) -> None:
    simulator = Simulator(clock=FakeClock())
    simulator.fail(Fault.status(503), times=None)
    config = settings(tmp_path, degraded={"text": "please try again"})
    with llmkit.Client(**config, clock=FakeClock(), transport=simulator) as client:
        reply = client.complete("x", model="chain")
        assert (reply.text, reply.source, reply.cost_usd) == ("please try again", "degraded", 0)
        assert len(reply.attempts) == simulator.calls
        assert list(client.calls()["source"]) == ["degraded"]


def test_circuits_are_seen_and_reset(tmp_path) -> None:
    clock = FakeClock()
    simulator = Simulator("fine", clock=clock)
    simulator.fail(Fault.status(500), times=5)
    with llmkit.Client(**settings(tmp_path), clock=clock, transport=simulator) as client:
        with pytest.raises(llmkit.ProviderOverloaded):
            client.complete("x")
        with pytest.raises(llmkit.CircuitOpen):
            client.complete("x")
        assert list(client.breakers()["state"]) == ["open"]
        client.circuits.reset()
        assert client.complete("x").text == "fine"


# -- where it is used from -----------------------------------------------------------------------------------------------


def test_inside_a_loop_that_runs_the_sync_client_works_and_the_async_one_is_awaited(
    client, tmp_path, simulator
) -> None:
    async def cell() -> None:
        assert client.complete("x").text == "one two three"  # as in a notebook, whose loop runs
        async with llmkit.AsyncClient(transport=simulator, **settings(tmp_path / "b")) as own:
            assert (await own.complete("x")).text == "one two three"
            async with own.stream("x") as reply:
                assert [chunk.text async for chunk in reply]
            reply = await own.stream("x")
            assert await reply.read() == "one two three"

    asyncio.run(cell())


def test_one_client_serves_many_threads(client, simulator) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.extend(client.complete("x", cache="off").text for _ in range(5)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["one two three"] * 40
    assert len(client.calls()) == simulator.calls == 40


def test_one_async_client_serves_several_loops(tmp_path) -> None:
    simulator = Simulator("fine")
    with simulator.server(port=0) as url:
        client = llmkit.AsyncClient(**settings(tmp_path, f"{url.removesuffix('/v1')}/v1"))

        async def ask() -> str:
            return (await client.complete("x")).text

        assert [asyncio.run(ask()) for _ in range(3)] == ["fine"] * 3
        asyncio.run(client.aclose())


def test_any_httpx_transport_can_stand_in(tmp_path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        body = {"choices": [{"index": 0, "message": {"content": "mine"}, "finish_reason": "stop"}]}
        return httpx.Response(200, json=body)

    with llmkit.Client(transport=httpx.MockTransport(answer), **settings(tmp_path)) as client:
        reply = client.complete("x")
        assert (reply.text, reply.usage.estimated) == ("mine", True)


def test_closing_settles_what_is_open(tmp_path) -> None:
    clock = FakeClock(auto=False)
    simulator = Simulator("one two three", clock=clock)
    client = llmkit.Client(transport=simulator, **settings(tmp_path))
    simulator.fail(Fault.stall(1))
    reply = client.stream("x")
    client.close()
    assert reply.outcome.status == "aborted"
    assert simulator.open == 0
    with llmkit.Client(transport=simulator, **settings(tmp_path)) as again:
        assert list(again.calls()["status"]) == ["aborted"]


def test_the_default_model_is_the_simulator_where_there_is_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with llmkit.Client() as client:
        reply = client.complete("x")
        assert (client.default_model(), reply.source, reply.cost_usd) == ("simulator", "simulated", 0)
        assert "simulat" in reply.text.lower()


def test_offline_nothing_leaves_the_machine(tmp_path) -> None:
    config = llmkit.Config.of(environ={"OPENAI_API_KEY": KEY}, offline=True, state={"url": "memory"})
    with llmkit.Client(config=config) as client:
        with pytest.raises(llmkit.CallRejected, match="offline"):
            client.complete("x", model="openai:gpt-5-mini")
        assert client.complete("x").source == "simulated"


# -- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["m", "claude"])
def test_keys_never_come_out(tmp_path, caplog, capsys, model: str) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    faults = [
        Fault.auth(401), Fault.auth(403), Fault.status(500, message=f"bad key {KEY}"), Fault.error_in_stream(2, message=KEY),
        Fault.error_in_stream(0, message=f"key={KEY}"), Fault.garbage(), Fault.cut(),
    ]  # fmt: skip
    simulator = Simulator(f"your key is {KEY} and", clock=FakeClock())
    with llmkit.Client(transport=simulator, clock=FakeClock(), **settings(tmp_path)) as client:
        for fault in faults:
            for ask in (client.complete, lambda p, **o: list(client.stream(p, **o))):
                simulator.fail(fault, times=4)
                with pytest.raises(llmkit.LLMKitError) as caught:
                    ask("x", model=model)
                error = caught.value
                shown += traceback.format_exception(error)
                shown += [repr(error), str(error), error.block(), repr(error.__dict__), repr(error.args)]
                simulator.heal()
                client.circuits.reset()
        reply = client.complete("x", model=model)
        shown += [reply.text, repr(reply), repr(reply.attempts), repr(client), repr(client.config)]
        shown += [client.calls().to_csv(), json.dumps(client.attempts(reply.request_id), default=str)]
    shown += [caplog.text, *capsys.readouterr()]
    shown += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert simulator.requests[0].headers.get("authorization", simulator.requests[0].headers.get("x-api-key"))
    assert not [text for text in shown if KEY in text or KEY[3:] in text]


# -- interrupts and crashes: real processes, real signals ------------------------------------------------------------------

PROGRAM = """
import sys, llmkit
models = {"m": {"provider": "vllm", "model": "m", "base_url": sys.argv[1]}}
client = llmkit.Client(model="m", models=models, cache={"enabled": False})
reply = None
try:
    with client.stream("x") as reply:
        for chunk in reply:
            print(chunk.text, flush=True)
except KeyboardInterrupt:
    import threading, asyncio
    tasks = asyncio.all_tasks(client._portal.loop)
    print("interrupted", reply and reply.text, reply and reply.outcome.status, len(tasks), flush=True)
"""


def started(url: str, tmp_path: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "LLMKIT_DATA_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), url],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("fault", [Fault.hang(), Fault.stall(1)])
def test_ctrl_c_closes_the_connection_at_once_settles_and_leaves_no_task(tmp_path, fault: Fault) -> None:
    simulator = Simulator("one two three")
    simulator.fail(fault)
    with simulator.server(port=0) as url:
        process = started(f"{url.removesuffix('/v1')}/v1", tmp_path)
        simulator.wait_until(lambda it: it.calls == 1, timeout=30)
        if fault.kind == "stall":
            assert process.stdout.readline().strip() == "one"
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        simulator.wait_until(lambda it: it.disconnects == 1)
        took = time.monotonic() - pressed
        out, _ = process.communicate(timeout=30)
    text, status = ("one", "aborted") if fault.kind == "stall" else ("None", "None")
    assert out.strip().split("\n")[-1] == f"interrupted {text} {status} 0"
    assert took < 2, took  # 0.2 s is promised; a busy machine gets ten times that before the test speaks up
    ledger = llmkit.ledger.Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite3")
    (row,) = ledger.calls()
    assert row["status"] == "aborted"
    ledger.close()


def test_a_killed_process_loses_the_call_in_flight_and_the_next_start_says_so(tmp_path) -> None:
    simulator = Simulator("one two three")
    with simulator.server(port=0) as url:
        done = started(f"{url.removesuffix('/v1')}/v1", tmp_path)
        done.communicate(timeout=30)
        simulator.fail(Fault.stall(1))
        process = started(f"{url.removesuffix('/v1')}/v1", tmp_path)
        assert process.stdout.readline().strip() == "one"
        process.kill()
        process.communicate()
    ledger = llmkit.ledger.Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite3")
    complete, lost = ledger.calls()
    assert (complete["status"], lost["status"]) == ("complete", "lost")
    assert ledger.lost == 1
    (attempt,) = ledger.attempts(lost["request_id"])
    assert attempt["maybe_billed"]
    ledger.close()
