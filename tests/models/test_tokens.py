from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import lzma
import threading
import time
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.call import Message
from llmkit.endpoint import Endpoint
from llmkit.models import tokens
from llmkit.reply import Usage

GPT_4 = Endpoint(provider="openai", model="gpt-4", base_url="https://api.openai.com/v1")
GPT_4O = replace(GPT_4, model="gpt-4o")
UNKNOWN = Endpoint(provider="vllm", model="Qwen/Qwen3-8B", base_url="http://127.0.0.1:8000/v1", local=True)
SIMULATED = Endpoint(provider="simulator", model="gpt-4o", base_url="http://simulator.invalid/v1", simulated=True)
ANY_TEXT = st.text(st.characters(exclude_categories=[]))  # surrogates and controls as well


def ask(text):
    return [Message("user", text)]


# -- the encodings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, encoding",
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("gpt-5.1-codex", "o200k_base"),
        ("o1", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-oss-120b", "o200k_base"),
        ("openai/gpt-4o", "o200k_base"),
        ("openrouter/openai/o4-mini", "o200k_base"),
        ("ft:gpt-4o-mini:org::id", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-4-turbo-2024-04-09", "cl100k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("gpt-35-turbo", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("gpt-6", None),
        ("gpt-50", None),
        ("gpt-4-x-alpaca", None),
        ("TheBloke/gpt-4o", None),
        ("claude-haiku-4-5", None),
        ("o2", None),
        ("", None),
    ],
)
def test_the_encoding_of_a_model(model, encoding):
    assert tokens.encoding_for(model) == encoding


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_the_rank_files_are_the_published_ones(name):
    data = lzma.decompress((files("llmkit.models") / "data" / f"{name}.tiktoken.xz").read_bytes())
    assert hashlib.sha256(data).hexdigest() == tokens._ENCODINGS[name][0]


def test_the_licence_of_the_rank_files_comes_with_them():
    assert "MIT License" in (files("llmkit.models") / "data" / "LICENSE-tiktoken").read_text("utf-8")


@pytest.mark.parametrize(
    "text, in_gpt_4, in_gpt_4o",
    [  # as tiktoken's own encodings give them
        ("", [], []),
        ("hello world", [15339, 1917], [24912, 2375]),
        ("Don't 12345!\n\n  x", None, None),
        ("<|endoftext|>", [27, 91, 8862, 728, 428, 91, 29], [27, 91, 419, 1440, 919, 91, 29]),
    ],
)
def test_texts_are_encoded_as_the_model_does(text, in_gpt_4, in_gpt_4o):
    for endpoint, ids in ((GPT_4, in_gpt_4), (GPT_4O, in_gpt_4o)):
        count = tokens.count_text(endpoint, text)
        encoded = tokens._encoding(tokens.encoding_for(endpoint.model)).encode_ordinary(text)
        assert ids is None or encoded == ids
        assert (count.tokens, count.exact) == (len(encoded), True)


def test_an_encoding_is_loaded_once_whoever_asks_first(monkeypatch):
    loads = []

    def load(name):
        loads.append(name)
        time.sleep(0)  # lets the other threads run up to the lock
        return object()

    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setattr(tokens, "_load", load)
    assert not tokens.is_loaded(GPT_4O)
    threads = [threading.Thread(target=tokens.load, args=(GPT_4O,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["o200k_base"]
    assert tokens.is_loaded(GPT_4O)
    assert not tokens.is_loaded(GPT_4)


def test_there_is_nothing_to_load_for_unknown_and_simulated_models(monkeypatch):
    monkeypatch.setattr(tokens, "_loaded", {})
    for endpoint in (UNKNOWN, SIMULATED):
        tokens.load(endpoint)
        assert tokens.is_loaded(endpoint)
    assert tokens._loaded == {}


def test_an_encoding_that_cannot_be_loaded_is_said_once_and_estimated(monkeypatch, caplog):
    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setitem(tokens._ENCODINGS, "o200k_base", ("0" * 64, *tokens._ENCODINGS["o200k_base"][1:]))
    with caplog.at_level(logging.ERROR):
        counts = [tokens.count_text(GPT_4O, "hello world") for _ in range(3)]
    assert [count.exact for count in counts] == [False] * 3
    assert len(caplog.records) == 1


def test_a_count_that_must_not_wait_is_an_estimate_until_the_encoding_is_there(monkeypatch):
    monkeypatch.setattr(tokens, "_loaded", {})
    assert not tokens.count_text(GPT_4, "hello", wait=False).exact
    tokens.load(GPT_4)
    assert tokens.count_text(GPT_4, "hello", wait=False).exact


# -- no text is too strange ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", [GPT_4, GPT_4O, UNKNOWN, SIMULATED], ids=lambda e: f"{e.provider}-{e.model}")
@pytest.mark.parametrize("unit", ["a", " ", "\n", "\t", " \n", "\x00", "　", "!", "中", "👍🏽", "\ud800", "'s", "1"])
def test_any_number_of_anything_is_counted_in_bounded_time(endpoint, unit, caplog):
    text = unit * (1_000_000 if unit == " " else 200_000)
    started = time.process_time()
    count = tokens.count_text(endpoint, text)
    assert time.process_time() - started < 5
    assert 0 <= count.tokens <= len(text.encode("utf-8", "surrogatepass"))
    assert not caplog.records


def test_a_text_beyond_measure_is_estimated():
    count = tokens.count_text(GPT_4O, "word " * 500_000)
    assert not count.exact
    assert 300_000 < count.tokens < 700_000


def test_an_encoder_that_panics_fails_no_call(monkeypatch):
    class Panic(BaseException):
        pass

    class Encoding:
        def encode_ordinary(self, text):
            raise Panic

    monkeypatch.setitem(tokens._loaded, "o200k_base", Encoding())
    count = tokens.count_text(GPT_4O, "hello world")
    assert not count.exact
    assert count.tokens > 0


def test_an_interrupt_is_not_swallowed(monkeypatch):
    class Encoding:
        def encode_ordinary(self, text):
            raise KeyboardInterrupt

    monkeypatch.setitem(tokens._loaded, "o200k_base", Encoding())
    with pytest.raises(KeyboardInterrupt):
        tokens.count_text(GPT_4O, "hello world")


def test_long_texts_are_cut_where_no_token_reaches_across():
    text = "def f(x):\n    return {'a': x, \"b\": [1, 2.5]}  # naïve – 中文 😀\n\n" * 3000
    whole = len(tokens._encoding("o200k_base").encode_ordinary(text))
    assert len(text) > 3 * tokens._PIECE
    assert tokens.count_text(GPT_4O, text) == tokens.Count(whole, exact=True, method="o200k_base")


@settings(deadline=None, max_examples=200)
@given(ANY_TEXT)
def test_no_text_has_more_tokens_than_the_bound(text):
    bound = tokens.upper_bound(ask(text))
    for endpoint in (GPT_4, GPT_4O, UNKNOWN, SIMULATED):
        assert tokens.count_text(endpoint, text).tokens <= len(text.encode("utf-8", "surrogatepass"))
        assert tokens.count_messages(endpoint, ask(text)).tokens <= bound
        assert asyncio.run(tokens.safe_count(endpoint, ask(text))) <= bound


# -- estimates -------------------------------------------------------------------------------------------------------

SAMPLES = {
    "prose": "It was agreed that nothing could be decided before the spring, although several members had asked for it. ",
    "code": "    def __init__(self, clock: Clock) -> None:\n        self._clock = clock\n        self.items = [x for x in y]\n",
    "json": json.dumps([{"id": 17, "name": "user17", "score": 0.8731, "tags": ["a", "b"], "active": True}]),
    "html": '<div class="row"><a href="https://example.org/a/b?c=1&d=2">link</a></div>\n',
    "table": "0.1234,17.5,3,2026-11-20\n",
    "capitals": "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG ",
    "chinese": "人工智能正在改变世界。我们需要认真思考它的影响，并且采取适当的措施。",
    "japanese": "人工知能は世界を変えつつあります。私たちはその影響を真剣に考えます。",
    "russian": "Искусственный интеллект меняет мир. Нам необходимо серьёзно задуматься о его влиянии.",
    "german": "Künstliche Intelligenz verändert die Welt. Wir müssen geeignete Maßnahmen ergreifen.",
    "arabic": "الذكاء الاصطناعي يغير العالم. نحن بحاجة إلى التفكير بجدية في تأثيره.",
    "emoji": "😀🎉🚀👍🏽❤️🔥 ",
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_an_estimate_is_near_what_todays_encodings_say(kind):
    text = SAMPLES[kind] * 20
    low, high = sorted(tokens.count_text(endpoint, text).tokens for endpoint in (GPT_4, GPT_4O))
    assert 0.7 * low <= tokens.estimate(text) <= 1.35 * high


@pytest.mark.parametrize("text", ["a", "中", " ", "\n", "\ud800", "\x00", "hi"])
def test_the_shortest_text_is_a_token(text):
    assert tokens.estimate(text) >= 1


def test_no_text_is_no_token():
    assert tokens.estimate("") == 0
    assert tokens.count_text(UNKNOWN, "").tokens == 0


@pytest.mark.parametrize("text, words", [("", 0), ("  \n ", 0), ("one", 1), (" one  two\nthree ", 3)])
def test_the_simulator_counts_words(text, words):
    assert tokens.simulated_tokens(text) == words
    assert tokens.count_text(SIMULATED, text) == tokens.Count(
        words, exact=True, method="words, as the simulator counts"
    )


# -- messages --------------------------------------------------------------------------------------------------------


def test_a_chat_has_the_overhead_that_openai_documents():
    messages = [Message("system", "You are helpful."), Message("user", "hello world")]
    # 3 for the reply; 3, the role and the text for each message
    assert tokens.count_messages(GPT_4O, messages).tokens == 3 + (3 + 1 + 4) + (3 + 1 + 2)
    assert tokens.count_messages(GPT_4O, messages).exact
    assert not tokens.count_messages(replace(GPT_4O, model="gpt-5"), messages).exact
    assert not tokens.count_messages(UNKNOWN, messages).exact
    assert tokens.count_messages(SIMULATED, messages).tokens == 5


def test_parts_that_are_no_text_are_counted_at_their_bound():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    message = [Message("user", [{"type": "text", "text": "hello world"}, picture])]
    count = tokens.count_messages(GPT_4O, message)
    assert (count.tokens, count.exact) == (3 + 3 + 1 + 2 + 1_445, False)


@pytest.mark.parametrize(
    "model, most",
    [
        ("gpt-4o", 1_445),
        ("gpt-4o-mini", 2_833 + 8 * 5_667),
        ("claude-haiku-4-5", 5_000),
        ("Qwen/Qwen3-VL-8B", tokens.MOST_TOKENS_PER_IMAGE),
        ("", tokens.MOST_TOKENS_PER_IMAGE),
    ],
)
@pytest.mark.parametrize("kind", ["image_url", "image", "input_image"])
def test_the_bound_of_an_image_is_its_familys_or_the_highest(model, most, kind):
    with_image = tokens.upper_bound([Message("user", [{"type": kind}])], model=model)
    assert with_image - tokens.upper_bound(ask(""), model=model) == most


def test_the_bound_takes_in_what_else_the_model_reads():
    tools = {"tools": [{"type": "function", "function": {"name": "weather", "description": "说明" * 100}}]}
    more = tokens.upper_bound(ask("hi"), extra=tools) - tokens.upper_bound(ask("hi"))
    assert more >= tokens.count_text(GPT_4, json.dumps(tools, ensure_ascii=False)).tokens
    document = {"type": "document", "source": {"type": "base64", "data": "A" * 200_000}}
    assert tokens.upper_bound([Message("user", [document])]) > 200_000
    elsewhere = {"type": "file", "file": {"file_id": "file-1"}}
    assert tokens.upper_bound([Message("user", [elsewhere])]) > 50_000
    result = {"type": "tool_result", "tool_use_id": "t", "content": "ok"}
    assert tokens.upper_bound([Message("user", [result])]) < 500


@pytest.mark.parametrize(
    "part",
    [
        None,
        7,
        "text",
        [],
        {},
        {"type": None},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "x", "y": object()},
    ],
)
def test_parts_of_no_known_shape_fail_nothing(part):
    messages = [Message("user", [part])]
    assert tokens.upper_bound(messages) >= 0
    for endpoint in (GPT_4O, UNKNOWN, SIMULATED):
        assert tokens.count_messages(endpoint, messages).tokens >= 0


def test_a_part_that_holds_itself_fails_nothing():
    part = {"type": "loop"}
    part["part"] = part
    assert tokens.upper_bound([Message("user", [part])]) >= tokens.MOST_TOKENS_PER_IMAGE


# -- on the event loop -----------------------------------------------------------------------------------------------


def test_what_is_quick_is_counted_on_the_loop_and_the_rest_on_a_thread(monkeypatch):
    where = []
    count_text = tokens.count_text

    def spy(endpoint, text, **options):
        where.append(threading.current_thread() is threading.main_thread())
        return count_text(endpoint, text, **options)

    monkeypatch.setattr(tokens, "count_text", spy)
    tokens.load(GPT_4O)
    assert asyncio.run(tokens.count(GPT_4O, "hello world")).tokens == 2
    assert asyncio.run(tokens.count(GPT_4O, "hello " * 10_000)).exact
    monkeypatch.setattr(tokens, "_loaded", {})
    assert asyncio.run(tokens.count(GPT_4O, "hello world")).tokens == 2
    assert where == [True, False, False]


def test_a_settlement_gets_its_number_when_no_thread_can_be_started(monkeypatch):
    async def refuse(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(asyncio, "to_thread", refuse)
    assert asyncio.run(tokens.count(GPT_4O, "hello " * 10_000)).tokens > 9_000


@pytest.mark.parametrize("endpoint", [GPT_4O, UNKNOWN, SIMULATED], ids=lambda e: e.provider)
def test_a_usage_that_was_never_reported_is_counted_and_says_so(endpoint):
    usage = asyncio.run(tokens.counted(endpoint, ask("hello world"), "four words of answer", "two thoughts"))
    answer = tokens.count_text(endpoint, "four words of answer").tokens
    thought = tokens.count_text(endpoint, "two thoughts").tokens
    asked = tokens.count_messages(endpoint, ask("hello world")).tokens
    assert usage == Usage(input_tokens=asked, output_tokens=answer + thought, reasoning_tokens=thought, estimated=True)


def test_the_safe_count_is_near_where_the_encoding_is_known():
    messages = ask("hello world " * 200)

    def safe(endpoint):
        return asyncio.run(tokens.safe_count(endpoint, messages))

    assert tokens.count_messages(GPT_4O, messages).tokens < safe(GPT_4O) < 450
    assert safe(UNKNOWN) == tokens.upper_bound(messages) > 2_400
    assert safe(SIMULATED) == 400
