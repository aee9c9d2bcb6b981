"""Record what a real engine answers, byte for byte, for ``tests/providers/test_recorded.py``.

    python tests/engines/record.py URL MODEL FOLDER [--key KEY]

URL is the engine's, with ``/v1``. One file a case: the status line, the content type, a blank line, the body as it
came. Only the standard library is used, so that nothing of llmkit's own reading can colour what is written.
"""

from __future__ import annotations

import argparse
import json
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HELLO = [{"role": "user", "content": "Say hello in three words."}]
LONG = [{"role": "user", "content": "the cat sat on the mat " * 2500}]
LONGER_IN_TOKENS = [{"role": "user", "content": "xyz " * 1500}]  # one engine counts characters first
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT, MESSAGES = "/chat/completions", "/messages"
USAGE = {"stream_options": {"include_usage": True}}


def cases(model: str) -> dict[str, tuple[str, Any]]:
    """Name → path and body; a body that is text is sent as it is."""
    base = {"model": model, "messages": HELLO, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    streamed = {**base, "stream": True}
    claude = {"model": model, "messages": HELLO, "max_tokens": 12}
    return {
        "complete": (CHAT, base),
        "stream": (CHAT, {**streamed, **USAGE}),
        "stream_without_usage": (CHAT, streamed),
        "stop": (CHAT, {**base, "max_tokens": 64, "stop": ["e"]}),
        "unknown_model": (CHAT, {**base, "model": "no-such-model"}),
        "overflow": (CHAT, {**base, "messages": LONG}),
        "overflow_tokens": (CHAT, {**base, "messages": LONGER_IN_TOKENS}),
        "overflow_max_tokens": (CHAT, {**base, "max_tokens": 5000}),
        "bad_value": (CHAT, {**base, "temperature": -3}),
        "bad_type": (CHAT, {**base, "max_tokens": "many"}),
        "no_messages": (CHAT, {"model": model}),
        "empty_messages": (CHAT, {**base, "messages": []}),
        "image": (CHAT, {**base, "messages": [{"role": "user", "content": [PICTURE]}]}),
        "not_json": (CHAT, "{broken"),
        "no_such_path": ("/no/such/path", base),
        "messages_complete": (MESSAGES, claude),
        "messages_stream": (MESSAGES, {**claude, "stream": True}),
        "messages_unknown_model": (MESSAGES, {**claude, "model": "no-such-model"}),
        "messages_overflow": (MESSAGES, {**claude, "messages": LONG}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Record an engine's answers.")
    parser.add_argument("url", help="with /v1")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", help="sent as a bearer token")
    parser.add_argument("--only", nargs="*", metavar="CASE")
    parser.add_argument("--prefix", default="", help="put before the names of the files")
    parser.add_argument("--without", nargs="*", metavar="CASE", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, (path, body) in cases(options.model).items():
        if name in options.without or (options.only and name not in options.only):
            continue
        answer = asked(options.url, path, body, options.key)
        (options.folder / f"{options.prefix}{name}.http").write_bytes(answer)
        print(name, answer.split(b"\n", 1)[0].decode())


def asked(url: str, path: str, body: Any, key: str | None) -> bytes:
    """Send one request; the response as it is kept."""
    target = urlsplit(url)
    connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
    sent = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request("POST", target.path + path, sent, headers)
    response = connection.getresponse()
    kept = [f"HTTP/1.1 {response.status} {response.reason}"]
    kept += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() in KEPT]
    head = "\n".join(kept).encode() + b"\n\n"
    answer = head + response.read()
    connection.close()
    return answer


KEPT = frozenset({"content-type", "retry-after", "x-request-id", "x-should-retry"})

if __name__ == "__main__":
    main()
