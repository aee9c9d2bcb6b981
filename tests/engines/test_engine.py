"""llmkit against a real engine (``docs/engines.md``): what it reports is what the engine did."""

import asyncio
import os
import signal
import threading
from decimal import Decimal

import pytest

import llmkit
from tests.engines.engine import LONGEST, WINDOW, cut_short

pytestmark = pytest.mark.engine

PROMPT = "Say hello in three words."
BROKEN = "\ufffd"
GREEDY = {"temperature": 0, "max_tokens": 24}
ENDLESS = {"max_tokens": LONGEST}


def test_an_answer_and_its_tokens_are_the_engines_own(client, engine) -> None:
    own = engine.asked(PROMPT, **GREEDY)
    reply = client.complete(PROMPT, **GREEDY)
    choice = own["choices"][0]
    assert reply.text == choice["message"]["content"] != ""
    assert reply.finish_reason == choice["finish_reason"]
    assert reply.usage.input_tokens == own["usage"]["prompt_tokens"]
    assert reply.usage.output_tokens == own["usage"]["completion_tokens"]
    assert not reply.usage.estimated
    assert (reply.model, reply.provider, reply.source) == (own["model"], engine.provider, "provider")
    assert reply.cost_usd == Decimal(0)
    assert reply.outcome.status == "complete"


def test_a_stream_says_the_same_in_pieces(client) -> None:
    whole = client.complete(PROMPT, **GREEDY)
    with client.stream(PROMPT, **GREEDY) as reply:
        pieces = [chunk.text for chunk in reply]
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text
    assert reply.text.rstrip(BROKEN) == whole.text.rstrip(
        BROKEN
    )  # some engines stream no character that is cut in half
    assert reply.usage == whole.usage
    assert reply.finish_reason == whole.finish_reason
    assert 0 < reply.time_to_first_token_s < reply.latency_s


def test_a_system_prompt_arrives(client) -> None:
    alone = client.complete(PROMPT, **GREEDY)
    told = client.complete(PROMPT, system="the cat sat on the mat", **GREEDY)
    assert told.usage.input_tokens > alone.usage.input_tokens
    assert told.text != alone.text


def test_limits_of_the_answer_arrive(client) -> None:
    short = client.complete(PROMPT, max_tokens=5, temperature=0)
    assert (short.usage.output_tokens, short.finish_reason) == (5, "length")
    free = client.complete(PROMPT, max_tokens=60, temperature=0).text
    stop = next(letter for letter in free if letter not in free[:8] and letter.isalpha())
    cut = client.complete(PROMPT, max_tokens=60, temperature=0, stop=stop)
    assert cut.finish_reason == "stop"
    assert cut.usage.output_tokens < 60
    assert cut.text.startswith(free[: free.index(stop)])  # some engines leave in the token that has the stop text


def test_a_seed_repeats_an_answer(client, vllm) -> None:
    first, again, other = (client.complete(PROMPT, max_tokens=24, temperature=1, seed=seed).text for seed in (1, 1, 2))
    assert first == again != other


def test_every_token_booked_is_a_token_counted(client, vllm) -> None:
    before = vllm.counted("prompt_tokens_total"), vllm.counted("generation_tokens_total")
    for n in range(4):
        client.complete(f"{PROMPT} {n}", max_tokens=10 + n, temperature=0)
        with client.stream(f"{PROMPT} {n}", max_tokens=20 + n, temperature=0) as reply:
            list(reply)
    rows = client.calls()
    vllm.settles("prompt_tokens_total", before[0] + rows.input_tokens.sum())
    vllm.settles("generation_tokens_total", before[1] + rows.output_tokens.sum())
    assert list(rows.status) == ["complete"] * 8
    assert not rows.estimated.any()


def test_a_prompt_longer_than_the_window_has_its_numbers(client, vllm) -> None:
    for prompt in ("xyz " * 1500, "the cat sat on the mat " * 2500):
        with pytest.raises(llmkit.ContextTooLong) as caught:
            client.complete(prompt)
        assert caught.value.window == WINDOW
        assert caught.value.tokens is None or caught.value.tokens > WINDOW
        assert len(client.attempts(caught.value.request_id)) == 1


def test_an_unknown_model_is_told_from_a_wrong_address(client, engine) -> None:
    with pytest.raises(llmkit.ModelNotFound) as caught:
        client.complete(PROMPT, model=elsewhere(client, engine, model="no-such-model"))
    assert "no-such-model" in caught.value.message
    with pytest.raises(llmkit.ModelNotFound, match="404") as caught:
        client.complete(PROMPT, model=elsewhere(client, engine, base_url=f"{engine.url}/nowhere"))
    assert "base URL" in caught.value.next_step


def elsewhere(client, engine, **changes):
    """The name of an alias that differs from the engine's own by ``changes``."""
    fields = {"provider": engine.provider, "model": engine.model, "base_url": engine.url, **changes}
    client._client.config = client.config.with_(models={"other": fields})
    return "other"


def test_a_wrong_value_is_refused_once(client, vllm) -> None:
    with pytest.raises(llmkit.InvalidRequest, match="top_k") as caught:
        client.complete(PROMPT, extra={"top_k": -7})
    assert not caught.value.retryable
    assert len(client.attempts(caught.value.request_id)) == 1


@pytest.fixture
def warm(client):
    """A client that has loaded all it needs, so that short time limits measure the engine."""
    client.complete(PROMPT, **GREEDY)
    return client


def test_the_engine_stops_when_the_reader_leaves(warm, vllm) -> None:
    with cut_short(vllm), warm.stream(PROMPT, **ENDLESS) as reply:
        pieces = iter(reply)
        next(pieces)
        next(pieces)
        vllm.settles("num_requests_running", 1)
    assert reply.outcome.status == "aborted"
    assert reply.text
    row = warm.calls().iloc[-1]
    assert (row.status, bool(row.estimated)) == ("aborted", True)
    assert 0 < row.output_tokens < ENDLESS["max_tokens"]


def test_the_engine_stops_at_an_interrupt(warm, vllm) -> None:
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with cut_short(vllm), pytest.raises(KeyboardInterrupt), warm.stream(PROMPT, **ENDLESS) as reply:
        for _ in reply:
            begun.set()
    assert reply.outcome.status == "aborted"
    assert warm.calls().iloc[-1].status == "aborted"


def test_the_engine_stops_at_a_time_limit(warm, vllm) -> None:
    with cut_short(vllm), pytest.raises(llmkit.TotalTimeout), warm.stream(PROMPT, timeout=0.4, **ENDLESS) as reply:
        list(reply)
    assert warm.calls().iloc[-1].status == "failed"


def test_the_engine_stops_when_nobody_waits_for_a_whole_answer(folder, vllm) -> None:
    async def scenario():
        async with llmkit.AsyncClient() as client:
            await client.complete(PROMPT, **GREEDY)
            with cut_short(vllm):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.4):
                        await client.complete(PROMPT, **ENDLESS)
                await asyncio.sleep(
                    0
                )  # the loop closes sockets at its next turn; looking at the engine would hold it up
            return client.calls().iloc[-1]

    assert asyncio.run(scenario()).status == "aborted"


@pytest.mark.parametrize("calls", [16, 64])
def test_many_at_once_are_all_answered_and_counted(folder, engine, calls) -> None:
    async def scenario():
        async with llmkit.AsyncClient() as client:
            asked = (client.complete(f"{PROMPT} {n}", max_tokens=12, temperature=0) for n in range(calls))
            return await asyncio.gather(*asked), client.calls()

    before = engine.counted("generation_tokens_total") if engine.provider == "vllm" else 0
    replies, rows = asyncio.run(scenario())
    assert all(reply.outcome.status == "complete" and reply.text for reply in replies)
    assert len(rows) == calls
    assert rows.output_tokens.sum() == sum(reply.usage.output_tokens for reply in replies)
    if engine.provider == "vllm":
        engine.settles("generation_tokens_total", before + rows.output_tokens.sum())


def test_the_other_wire_format_says_the_same(client, vllm, folder) -> None:
    plain = client.complete(PROMPT, **GREEDY)
    (folder / "llmkit.toml").write_text(
        f'model = "twin:{vllm.model}"\n[providers.twin]\nbase_url = "{vllm.url}"\nwire = "anthropic"\n[cache]\nenabled = false\n'
    )
    with llmkit.Client() as twin:
        whole = twin.complete(PROMPT, **GREEDY)
        with twin.stream(PROMPT, **GREEDY) as streamed:
            list(streamed)
        with pytest.raises(llmkit.ContextTooLong):
            twin.complete("xyz " * 1500)
        with pytest.raises(llmkit.ModelNotFound):
            twin.complete(PROMPT, model="twin:no-such-model")
    for reply in (whole, streamed):
        assert (reply.text, reply.usage, reply.finish_reason) == (plain.text, plain.usage, plain.finish_reason)
