"""Pictures from a call to the wire, to the bill and into the books, in both wire formats."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from decimal import Decimal

import httpx
import pytest

import llmkit
from llmkit.call import Message
from llmkit.images import Picture
from llmkit.testing import FakeClock, Simulator
from tests.models.test_pictures import RULES
from tests.pictures import gif, png, png_url
from tests.test_client import KEY

WIRES = ["openai", "anthropic"]


def settings(tmp_path, wire="openai", model="m-1"):
    return llmkit.Config.of(
        environ={"TEST_KEY": KEY},
        model="m",
        models={"m": {"provider": "own", "model": model, "price": {"input": 2.5, "output": 10}}},
        providers={"own": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "TEST_KEY", "wire": wire}},
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
        retry={"attempts": 1},
    )


@pytest.fixture
def simulator():
    return Simulator(clock=FakeClock())


@pytest.fixture(params=WIRES)
def client(request, tmp_path, simulator):
    with llmkit.Client(transport=simulator, config=settings(tmp_path, request.param)) as made:
        yield made


def pictures_in(body):
    """Each picture's URL, or its bytes, as the service finds them."""
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            source = part.get("source", part.get("image_url"))
            if source is not None and source.get("type") == "base64":
                yield base64.b64decode(source["data"])
            elif source is not None:
                url = source["url"]
                yield base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else url


@pytest.mark.parametrize("streamed", [False, True])
def test_the_service_gets_what_was_given(client, simulator, tmp_path, streamed) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(640, 480))
    given = [path, gif(3, 4), "https://x.test/b.png", png_url(1, 1)]
    if streamed:
        with client.stream("What is it?", images=given, max_cost=5) as reply:
            text = "".join(chunk.text for chunk in reply)
    else:
        text = client.complete("What is it?", images=given, max_cost=5).text
    body = simulator.requests[-1].body
    assert list(pictures_in(body)) == [png(640, 480), gif(3, 4), "https://x.test/b.png", png(1, 1)]
    assert body["messages"][0]["content"][-1] == {"type": "text", "text": "What is it?"}
    assert "- picture 1: PNG, 640 × 480," in text
    assert "- picture 2: GIF, 3 × 4," in text
    assert "- picture 3: at https://x.test/b.png, not looked at" in text


def test_a_single_picture_needs_no_list(client, simulator) -> None:
    for given in (png(), png_url(), Picture.of(png()), [png()], (png(),)):
        client.complete("What is it?", images=given)
    assert simulator.calls == 1  # all the same question: one answer for all
    assert client.calls()["source"].tolist() == ["provider", *["cache"] * 4]


def test_parts_of_either_form_are_taken_by_either_wire(client, simulator) -> None:
    data = base64.b64encode(png(6, 7)).decode()
    forms = [
        {"type": "image_url", "image_url": {"url": png_url(6, 7)}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}},
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
    ]
    for form in forms:
        client.complete([Message("user", [form, {"type": "text", "text": "What is it?"}])], cache="off")
    found = [next(pictures_in(request.body)) for request in simulator.requests]
    assert found == [png(6, 7), png(6, 7), "https://x.test/a.png", "https://x.test/a.png"]


def test_answers_are_kept_by_what_the_picture_holds(client, simulator) -> None:
    for given in (
        png(2, 2),
        png(2, 3),
        png(2, 2),
        "https://x.test/a.png",
        "https://x.test/b.png",
        "https://x.test/a.png",
    ):
        client.complete("What is it?", images=[given])
    assert client.calls()["source"].tolist() == ["provider", "provider", "cache", "provider", "provider", "cache"]
    client.complete("What is it?")
    assert simulator.calls == 5


@pytest.mark.parametrize("given", [[b""], ["nowhere.png"], [3], [png()] * 101, ["https://a:b@x.test/"], [b"<svg/>"]])
def test_what_is_no_picture_is_refused_before_anything_is_sent(client, simulator, given) -> None:
    with pytest.raises(llmkit.ConfigError):
        client.complete("What is it?", images=given)
    with pytest.raises(llmkit.ConfigError):
        client.stream("What is it?", images=given)
    assert simulator.calls == 0
    assert len(client.calls()) == 0


def test_pictures_need_a_message_of_the_user(client, simulator) -> None:
    with pytest.raises(llmkit.ConfigError, match="a message of the user"):
        client.complete([{"role": "assistant", "content": "x"}], images=[png()])
    assert simulator.calls == 0


def test_no_book_holds_the_data(client, tmp_path) -> None:
    data = png(64, 64)
    client.complete("What is it?", images=[data])
    client.export(tmp_path / "ledger.jsonl")
    client.close()
    encoded = base64.b64encode(data)
    books = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert books
    for path in books:
        held = path.read_bytes()
        assert encoded[20:60] not in held, path
        assert data[20:60] not in held, path


def test_a_picture_that_the_service_cannot_read_is_its_error(client, simulator) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    with pytest.raises(llmkit.InvalidRequest, match="could not process image"):
        client.complete([Message("user", [broken])])
    assert simulator.calls == 1


def test_async_clients_take_them_too(tmp_path, simulator) -> None:
    async def main():
        async with llmkit.AsyncClient(transport=simulator, config=settings(tmp_path)) as client:
            plan = await client.plan("What is it?", images=[png(9, 9)])
            reply = await client.complete("What is it?", images=[png(9, 9)])
            return plan, reply.text

    plan, text = asyncio.run(main())
    assert "picture 1: PNG, 9 × 9" in text
    assert plan.refusal is None
    assert simulator.calls == 1


# -- the bill ----------------------------------------------------------------------------------------------------------


def service(wire, model):
    """A service that bills pictures as its maker says: it looks at their sizes itself."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        tokens = 12 + len(json.dumps(body["messages"][0]["content"][-1])) // 4
        for picture in pictures_in(body):
            tokens += math.ceil(RULES[model](*struct.unpack(">II", picture[16:24])))
        if wire == "openai":
            message = {"role": "assistant", "content": "ok"}
            usage = {"prompt_tokens": tokens, "completion_tokens": 1}
            return httpx.Response(
                200, json={"model": model, "choices": [{"index": 0, "message": message}], "usage": usage}
            )
        content = [{"type": "text", "text": "ok"}]
        usage = {"input_tokens": tokens, "output_tokens": 1}
        document = {"type": "message", "model": model, "content": content, "usage": usage, "stop_reason": "end_turn"}
        return httpx.Response(200, json=document)

    return httpx.MockTransport(answer)


@pytest.mark.parametrize("model", RULES)
def test_no_cap_is_broken_by_the_bill_for_pictures(tmp_path, model) -> None:
    wire = "anthropic" if model.startswith("claude") else "openai"
    sizes = [
        (1, 1),
        (100, 100),
        (512, 512),
        (513, 769),
        (768, 2048),
        (1024, 1024),
        (8000, 40),
        (2049, 1000),
        (5000, 5000),
    ]
    answered = refused = 0
    with llmkit.Client(transport=service(wire, model), config=settings(tmp_path, wire, model)) as client:
        for size in sizes:
            given = [Picture.of(png(*size))] * 2
            for cap in ("0.0001", "0.0015", "0.006", "0.03", "0.2", "0.5"):
                try:
                    reply = client.complete("What is it?", images=given, max_cost=cap, max_tokens=1, cache="off")
                except llmkit.BudgetExceeded:
                    refused += 1
                else:
                    answered += 1
                    assert reply.cost_usd <= Decimal(cap), (size, cap)
    assert answered > 9
    assert refused > 9


@pytest.mark.parametrize("wire", WIRES)
def test_a_picture_on_the_web_is_held_at_its_largest(tmp_path, wire) -> None:
    model = "gpt-4o" if wire == "openai" else "claude-haiku-4-5"
    most = {"gpt-4o": 1_445, "claude-haiku-4-5": 5_000}[model]
    with llmkit.Client(transport=service(wire, model), config=settings(tmp_path, wire, model)) as client:
        with pytest.raises(llmkit.BudgetExceeded) as caught:
            client.complete("x", images=["https://x.test/a.png"], max_cost="0.0001", max_tokens=1)
        held = int(caught.value.message.split(" tokens in")[0].split()[-1])
        assert most <= held <= most + 200
