"""How the tests of the simulator ask it, in process and over a socket, in both formats."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import httpx

PROMPT = "Explain SSE in one line, please."
PATHS = {"openai": "/chat/completions", "anthropic": "/messages"}
BOTH = list(PATHS)


def request(wire="openai", prompt=PROMPT, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]} | fields
    if wire == "anthropic":
        body.setdefault("max_tokens", 1000)
    elif fields.get("stream"):
        body.setdefault("stream_options", {"include_usage": True})
    return body


@asynccontextmanager
async def connected(simulator, *, socket=False):
    if not socket:
        async with httpx.AsyncClient(transport=simulator, base_url="http://simulator.invalid/v1") as client:
            yield client
        return
    async with simulator.serve() as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
        yield client


async def ask(client, wire="openai", prompt=PROMPT, *, headers=None, **fields):
    return await client.post(PATHS[wire], json=request(wire, prompt, **fields), headers=headers)


async def blocks(client, wire="openai", **fields):
    """A stream's blocks of bytes, and the error that ended it."""
    found = []
    try:
        async with client.stream("POST", PATHS[wire], json=request(wire, stream=True, **fields)) as response:
            async for block in response.aiter_raw():
                found.append(block)
    except httpx.TransportError as error:
        return found, error
    return found, None


def events(content):
    """The data of each event, parsed; ``[DONE]`` as it is."""
    text = (content if isinstance(content, bytes) else b"".join(content)).decode()
    found = []
    for event in text.replace("\r\n", "\n").split("\n\n"):
        data = [line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:")]
        if data:
            found.append(data[0] if data[0] == "[DONE]" else json.loads(data[0]))
    return found


def streamed(wire, found):
    """The text of a stream's events."""
    if wire == "anthropic":
        return "".join(event["delta"]["text"] for event in found if event.get("delta", {}).get("type") == "text_delta")
    choices = [event["choices"][0] for event in found if event != "[DONE]" and event.get("choices")]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def text_of(wire, document):
    if wire == "anthropic":
        return "".join(block.get("text", "") for block in document["content"])
    return document["choices"][0]["message"]["content"]
