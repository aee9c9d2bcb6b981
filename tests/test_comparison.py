"""llmkit.comparison: a grid of calls through the whole chain, each with an ending of its own."""

from __future__ import annotations

import asyncio
import signal
import threading
from decimal import Decimal

import pytest

import llmkit
from llmkit import comparison
from llmkit.comparison import COLUMNS, Comparison, Version
from llmkit.errors import ConfigError
from llmkit.testing import FakeClock, Fault, Simulator

PRICE = {"input": 1, "output": 2}


def config_of(tmp_path, **more):
    models = {name: {"provider": "own", "model": name, "price": PRICE} for name in ("a", "b", "c")}
    models["chain"] = {"chain": ["a", "b"]}
    return llmkit.Config.of(
        environ={},
        model="a",
        models=models,
        providers={"own": {"base_url": "http://127.0.0.1:9/v1"}},
        state={"url": "memory"},
        retry={"attempts": 1},
        **more,
    )


def answer(body):
    """What was asked, and at what temperature, so that a row shows what it was made of."""
    said = " / ".join(message["content"] for message in body["messages"])
    return f"{body['model']} {body.get('temperature')} {said}"


@pytest.fixture
def simulator():
    return Simulator(answer, clock=FakeClock())


@pytest.fixture
def client(tmp_path, simulator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with llmkit.Client(transport=simulator, config=config_of(tmp_path)) as made:
        yield made


def held(client):
    return client.budgets()["held"].sum()


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_every_model_meets_every_temperature_and_every_prompt(client, simulator) -> None:
    prompts = {"short": "in short", "long": "at length"}
    frame = client.compare(models="a, b", temperatures=[0, 0.5], prompts=prompts, repeat=2)
    assert list(frame) == list(COLUMNS)
    assert len(frame) == simulator.calls == 16
    places = list(frame[["model", "temperature", "prompt", "repeat"]].itertuples(index=False, name=None))
    assert places[:5] == [
        ("a", 0.0, "short", 0),
        ("a", 0.0, "short", 1),
        ("a", 0.0, "long", 0),
        ("a", 0.0, "long", 1),
        ("a", 0.5, "short", 0),
    ]
    assert len(set(places)) == 16
    for row in frame.itertuples():
        assert row.text == f"{row.model} {row.temperature:g} {prompts[row.prompt]}"
        assert (row.status, row.error, row.source, row.answered) == ("complete", None, "provider", row.model)


def test_the_columns_have_types_of_their_own(client) -> None:
    frame = client.compare("hi", models=["a"])
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == COLUMNS
    (row,) = frame.to_dict("records")
    assert (row["input_tokens"], row["output_tokens"]) == (1, 3)
    assert row["cost_usd"] == pytest.approx(7e-6)
    assert row["request_id"] == row["reply"].request_id == client.calls()["request_id"][0]
    assert "".join(chunk.text for chunk in row["reply"]) == row["text"]  # read without await
    assert row["prompt"] is None


def test_without_sides_it_is_the_default_model(client) -> None:
    frame = client.compare("hi")
    assert frame["model"].tolist() == ["a"]
    assert frame["temperature"].isna().all()


def test_a_chain_is_one_model_in_a_list_and_behind_an_alias(client, simulator) -> None:
    simulator.fail(Fault.status(500), times=1)
    frame = client.compare("hi", models=["a,b", "chain"], concurrency=1)
    assert frame["model"].tolist() == ["a,b", "chain"]
    assert frame["answered"].tolist() == ["b", "b"]
    assert frame["source"].tolist() == ["provider", "cache"]  # the same chain, and the same question


def test_samples_have_answers_of_their_own_in_the_cache(client, simulator) -> None:
    client.compare("hi", repeat=2)
    again = client.compare("hi", repeat=3)
    assert again["source"].tolist() == ["cache", "cache", "provider"]
    assert again["cost_usd"].tolist()[:2] == [0.0, 0.0]
    assert simulator.calls == 3


def test_an_async_client_compares_too(tmp_path, simulator) -> None:
    async def compare():
        async with llmkit.AsyncClient(transport=simulator, config=config_of(tmp_path)) as client:
            return await client.compare("hi", models=["a", "b"])

    assert asyncio.run(compare())["text"].tolist() == ["a None hi", "b None hi"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"models": ["a", "a"]}, "the model 'a' stands there twice|the model a stands there twice"),
        ({"temperatures": [0, 0.0]}, "the temperature 0.0 stands there twice"),
        ({"models": []}, "needs a model"),
        ({"models": "a,,b"}, "needs a model"),
        ({"temperatures": [3]}, "temperature is a number from 0 to 2"),
        ({"repeat": 0}, "repeat is a whole number from 1 to 256"),
        ({"repeat": 257}, "repeat is a whole number from 1 to 256"),
        ({"concurrency": 0}, "concurrency is a whole number"),
        ({"models": ["a", "b", "c"], "repeat": 100}, "would have 300 answers; 256 is the most"),
        ({"models": ["a", "nobody"]}, "nobody"),
        ({"models": ["a", "ghost:model"]}, "ghost"),
        ({"modle": "a"}, "did you mean model"),
        ({"request_id": "x"}, "request_id belongs to one call"),
        ({"on_event": print}, "on_event belongs to one call"),
        ({"prompts": {"x": "y"}, "tags": {"prompt": "mine"}}, "the tag prompt says"),
        ({"prompts": "unknown"}, "no prompt is kept as unknown"),
        ({"max_cost": -1}, "max_cost"),
    ],
)
def test_a_wrong_grid_is_an_error_before_anything_is_sent(client, simulator, asked, message) -> None:
    with pytest.raises(ConfigError, match=message):
        client.compare("hi", **asked)
    assert simulator.calls == 0
    assert len(client.calls()) == 0


def test_there_must_be_something_to_ask(client) -> None:
    with pytest.raises(ConfigError, match="nothing to ask"):
        client.compare()


# -- kept prompts ------------------------------------------------------------------------------------------------------


def test_versions_are_compared_and_told_apart_in_the_ledger(client) -> None:
    client.prompts.save("sum", "Sum up.")
    client.prompts.save("sum", "Sum up briefly.", "Be terse.")
    frame = client.compare("The text.", prompts="sum@1,sum", tags={"app": "docs"})
    assert frame["prompt"].tolist() == ["sum@1", "sum@2"]
    assert frame["text"].tolist() == ["a None Sum up.\n\nThe text.", "a None Be terse. / Sum up briefly.\n\nThe text."]
    spent = client.spend(by="tag").set_index("tag")["calls"].to_dict()
    assert spent == {"app=docs": 2, "prompt=sum@1": 1, "prompt=sum@2": 1}


def test_a_template_is_not_sent_as_it_is(client, simulator) -> None:
    client.prompts.save("sum", "Sum up {{ text }}.")
    with pytest.raises(ConfigError, match="sum@1 is a template"):
        client.compare(prompts=["sum"])
    client.prompts.save("sum", "Explain {{ x }}.", raw=True)
    assert client.compare(prompts=["sum"])["text"].tolist() == ["a None Explain {{ x }}."]
    assert simulator.calls == 1


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_one_that_fails_is_a_row_and_the_others_go_on(client, simulator) -> None:
    simulator.fail(Fault.status(400, message="no such thing"), times=1)
    frame = client.compare("hi", models="a,b,c", concurrency=1)
    assert frame["status"].tolist() == ["failed", "complete", "complete"]
    assert frame["error"][0].startswith("InvalidRequest: ")
    assert (frame["text"][0], frame["reply"][0]) == (None, None)
    assert (frame["cost_usd"][0], frame["latency_s"].notna().all()) == (0.0, True)
    assert held(client) == 0


def test_one_that_breaks_keeps_its_text_and_its_cost(client, simulator) -> None:
    simulator.fail(Fault.cut(after=2), times=1)
    frame = client.compare("hi", models="a,b", concurrency=1)
    assert frame["status"].tolist() == ["failed", "complete"]
    assert frame["text"][0] == "a None"
    assert frame["cost_usd"][0] > 0
    assert frame["error"][0].startswith("StreamBroken: ")
    assert held(client) == 0


def test_a_budget_refuses_rows_and_not_the_comparison(tmp_path, simulator) -> None:
    config = config_of(tmp_path, budget={"session": {"usd": 0.000435}})
    with llmkit.Client(transport=simulator, config=config) as client:
        frame = client.compare("hi", models="a,b,c", max_tokens=140, concurrency=1, cache="off")
        assert sorted(frame["status"]) == ["complete", "failed", "failed"]
        refused = frame[frame["status"] == "failed"]
        assert refused["error"].str.startswith("BudgetExceeded: ").all()
        assert refused["cost_usd"].tolist() == [0.0, 0.0]
        assert simulator.calls == 1
        assert held(client) == 0


def test_what_is_wrong_with_llmkit_itself_is_a_row_too(client, monkeypatch) -> None:
    complete = llmkit.AsyncClient._open

    async def broken(self, prompt, **more):
        if more["options"]["model"] == "b":
            raise RuntimeError("a bug")
        return await complete(self, prompt, **more)

    monkeypatch.setattr(llmkit.AsyncClient, "_open", broken)
    frame = client.compare("hi", models="a,b,c")
    assert frame["status"].tolist() == ["complete", "failed", "complete"]
    assert frame["error"][1] == "RuntimeError: a bug"


# -- at once, and cancelled --------------------------------------------------------------------------------------------


def stalling():
    simulator = Simulator("one two three")
    simulator.fail(Fault.stall(after=2), times=None)
    return simulator


def test_so_many_are_in_flight_and_no_more_and_a_cancel_closes_them_all(tmp_path) -> None:
    simulator = stalling()

    async def run():
        async with llmkit.AsyncClient(transport=simulator, config=config_of(tmp_path)) as client:
            made = await client._comparison("hi", models=["a", "b", "c"], concurrency=2)
            task = asyncio.create_task(made.run(client))
            while [trial.text for trial in made.trials[:2]] != ["one two", "one two"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert (simulator.open, made.trials[2].status) == (2, "waiting")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await simulator.until(lambda it: it.disconnects == 2)
            return (
                made.frame(),
                (await client.budgets())["held"].sum(),
                [row["status"] for row in client.ledger.calls()],
            )

    frame, held, booked = asyncio.run(run())
    assert frame["status"].tolist() == ["aborted", "aborted", "not asked"]
    assert frame["text"].tolist() == ["one two", "one two", None]
    assert (frame["cost_usd"][:2] > 0).all()
    assert (held, booked, simulator.open) == (0, ["aborted", "aborted"], 0)


def test_cancelled_before_it_began_nothing_was_asked(tmp_path, simulator) -> None:
    async def run():
        async with llmkit.AsyncClient(transport=simulator, config=config_of(tmp_path)) as client:
            made = await client._comparison("hi", models=["a", "b"])
            task = asyncio.create_task(made.run(client))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return made.frame()

    frame = asyncio.run(run())
    assert frame["status"].tolist() == ["not asked", "not asked"]
    assert (simulator.calls, frame["cost_usd"].tolist()) == (0, [0.0, 0.0])


def test_an_interrupt_of_the_sync_client_keeps_what_there_is(tmp_path) -> None:
    simulator = stalling()
    arrived = threading.Event()

    def press():
        simulator.wait_until(lambda it: it.open == 2, timeout=30)
        assert arrived.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def heard(trials):
        if all(trial.text == "one two" for trial in trials):
            arrived.set()

    with llmkit.Client(transport=simulator, config=config_of(tmp_path)) as client:
        loop = client._portal.loop
        real, made = Comparison.run, []

        async def watched(self, *arguments):
            made.append(self)
            watching = loop.create_task(watch(self.trials))
            try:
                await real(self, *arguments)
            finally:
                watching.cancel()

        async def watch(trials):
            while not arrived.is_set():
                heard(trials)
                await asyncio.sleep(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Comparison, "run", watched)
            threading.Thread(target=press, daemon=True).start()
            with pytest.raises(KeyboardInterrupt) as caught:
                client.compare("hi", models="a,b")
        partial = caught.value.partial
        assert partial["text"].tolist() == ["one two", "one two"]
        assert partial["status"].tolist() == ["aborted", "aborted"]
        assert partial["reply"][0].text == "".join(chunk.text for chunk in partial["reply"][0])
        assert held(client) == 0
    simulator.wait_until(lambda it: it.open == 0)


def test_a_cancelled_task_of_the_async_client_keeps_what_there_is(tmp_path) -> None:
    simulator = stalling()

    async def run():
        async with llmkit.AsyncClient(transport=simulator, config=config_of(tmp_path)) as client:
            task = asyncio.create_task(client.compare("hi", models=["a"]))
            await simulator.until(lambda it: it.open == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            return caught.value.partial

    assert asyncio.run(run())["status"].tolist() == ["aborted"]


def test_news_comes_with_its_trial(tmp_path, simulator) -> None:
    async def run():
        heard = []
        async with llmkit.AsyncClient(transport=simulator, config=config_of(tmp_path)) as client:
            made = await client._comparison("hi", models=["a", "b"])
            await made.run(client, lambda trial, news: heard.append((trial.model, type(news).__name__)))
        return heard

    heard = asyncio.run(run())
    assert {model for model, _ in heard} == {"a", "b"}
    of_a = [kind for model, kind in heard if model == "a"]
    assert (of_a[0], of_a[-1]) == ("NoneType", "NoneType")
    assert {"AttemptStarted", "AttemptEnded", "Reply"} <= set(of_a)


def test_costs_are_known_while_they_arrive_only_where_they_are() -> None:
    (trial,) = Comparison(
        [Version("", "hi")], models=["a"], temperatures=[None], repeat=1, options={}, new_id=lambda: "x"
    ).trials
    assert trial.cost_usd == Decimal(0)  # nothing was sent
    trial.sent = True
    assert trial.cost_usd is None


def test_a_kept_prompt_and_what_follows_are_apart() -> None:
    assert comparison.joined("Sum up.\n", "The text.") == "Sum up.\n\nThe text."
    assert comparison.joined("Sum up.", "") == "Sum up."
    assert comparison.joined("", "The text.") == "The text."
