"""What the simulated services see of pictures."""

from __future__ import annotations

import asyncio
import base64

import pytest

from llmkit.testing import FakeClock, Simulator
from llmkit.testing.pictures import seen
from tests.pictures import gif, jpeg, png, png_url
from tests.testing.asking import BOTH, ask, connected, text_of

URL = "https://x.test/a.png"


def part(wire, data, media_type="image/png"):
    if wire == "openai":
        url = data if isinstance(data, str) else f"data:{media_type};base64,{base64.b64encode(data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    if isinstance(data, str):
        return {"type": "image", "source": {"type": "url", "url": data}}
    source = {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def answered(wire, *parts, simulator=None):
    async def main():
        async with connected(simulator or Simulator(clock=FakeClock())) as client:
            return await ask(client, wire, [*parts, {"type": "text", "text": "What is it?"}])

    return asyncio.run(main())


@pytest.mark.parametrize("wire", BOTH)
def test_it_says_what_it_saw(wire) -> None:
    response = answered(wire, part(wire, png(640, 480)), part(wire, gif(3, 4)), part(wire, jpeg(5, 6)), part(wire, URL))
    text = text_of(wire, response.json())
    told = [line.partition(": ")[2] for line in text.split("\n") if line.startswith("- picture ")]
    assert [each.split(",")[:2] for each in told[:3]] == [["PNG", " 640 × 480"], ["GIF", " 3 × 4"], ["JPEG", " 5 × 6"]]
    assert told[3] == "at https://x.test/a.png, not looked at"
    assert "> What is it?" in text


@pytest.mark.parametrize("wire", BOTH)
def test_the_same_picture_gets_the_same_answer_and_another_another(wire) -> None:
    first, again, other = (text_of(wire, answered(wire, part(wire, png(8, size))).json()) for size in (8, 8, 9))
    assert first == again != other
    numbers = {line for text in (first, other) for line in text.split("\n") if "only this request gets" in line}
    assert len(numbers) == 2


@pytest.mark.parametrize("wire", BOTH)
@pytest.mark.parametrize(
    "data", [b"", b"no picture", png()[:20], b"<svg/>", "ftp://x.test/a.png", "nowhere.png", "", "/etc/passwd"]
)
def test_what_is_no_picture_is_refused_as_a_service_does(wire, data) -> None:
    simulator = Simulator(clock=FakeClock())
    response = answered(wire, part(wire, data), simulator=simulator)
    assert response.status_code == 400
    assert "picture" in response.json()["error"]["message"] or "image" in response.json()["error"]["message"]
    assert simulator.billed.input_tokens == 0


@pytest.mark.parametrize(
    "broken",
    [{"type": "image_url"}, {"type": "image_url", "image_url": 7}, {"type": "image"}, {"type": "image", "source": {}}],
)
@pytest.mark.parametrize("wire", BOTH)
def test_a_part_without_a_picture_is_refused(wire, broken) -> None:
    assert answered(wire, broken).status_code == 400


def test_other_parts_are_left_alone() -> None:
    assert seen(["text", None, [{"type": "text", "text": "x"}, {"type": "input_audio"}, "odd"]]) == ()
    assert seen([[{"type": "image_url", "image_url": png_url(1, 2)}]])[0].startswith("PNG, 1 × 2, ")
