"""The reader of server-sent events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.providers import sse
from llmkit.providers.sse import EventReader, EventTooLarge


def read(*pieces):
    reader = EventReader()
    payloads = [payload for piece in pieces for payload in reader.feed(piece)]
    return payloads + reader.end()


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\ndata\ndata: b\n\n", [b"a\n\nb"]),
        (b": comment\n\ndata: a\n\n", [b"a"]),
        (b"event: x\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a", [b"a"]),
        (b"data: a\n", [b"a"]),
        (b"datas: a\n\n", []),
        (b"\n\n\n", []),
        (b"\xef\xbb", []),
        (b"", []),
    ],
)
def test_what_a_stream_says(stream, payloads) -> None:
    assert read(stream) == payloads
    assert read(*[stream[i : i + 1] for i in range(len(stream))]) == payloads


@st.composite
def streams(draw):
    """A valid stream, and its payloads."""
    stream, payloads = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), []
    for text in draw(
        st.lists(st.text(min_size=1).map(lambda t: t.replace("\r", "").replace("\n", "") or "x"), max_size=8)
    ):
        end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
        lines = draw(st.sampled_from([[], [b": ping"], [b"event: delta"], [b"id: 1", b":"]]))
        space = draw(st.sampled_from([b"", b" "])) if not text.startswith(" ") else b" "
        stream += end.join([*lines, b"data:" + space + text.encode(), b"", b""])
        payloads.append(text.encode())
    return stream, payloads


@given(streams(), st.lists(st.integers(min_value=0, max_value=400), max_size=12))
def test_it_does_not_matter_where_a_stream_is_cut(stream_and_payloads, cuts) -> None:
    stream, payloads = stream_and_payloads
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    assert read(*pieces) == payloads


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_bytes_give_payloads_or_nothing(pieces) -> None:
    assert all(isinstance(payload, bytes) for payload in read(*pieces))


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 50, b"x" * 50, b"data: x\n", b"data:\n"])
def test_an_event_without_end_is_ended(monkeypatch, piece) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    reader = EventReader()
    with pytest.raises(EventTooLarge):
        for _ in range(1000):
            reader.feed(piece)


def test_one_event_that_is_too_large_is_refused_though_it_is_whole(monkeypatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    with pytest.raises(EventTooLarge):
        EventReader().feed(b"data: " + b"x" * 2000 + b"\n\n")


def test_many_events_are_not_one_large_event(monkeypatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    assert len(read(*[b"data: " + b"x" * 500 + b"\n\n"] * 50)) == 50
    assert len(read(*[b"data: " + b"x" * 500 + b"\n", b"\n"] * 50)) == 50
