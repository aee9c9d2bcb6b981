"""The default model where no setting names one: keys, then real servers on loopback, then the simulator."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmkit.providers import discovery
from llmkit.providers.catalog import CATALOG, ProviderEntry
from llmkit.providers.discovery import Default, find

# No more than this may pass however a server behaves; the limit itself, and what a busy machine adds.
PATIENCE_S = discovery.TOTAL_S + 0.65

NOTHING = Default("simulator", "no config, key or local server found")


def listing(*ids: object, owner: str = "vllm") -> bytes:
    return json.dumps(
        {"object": "list", "data": [{"id": i, "object": "model", "owned_by": owner} for i in ids]}
    ).encode()


def answer(body: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def serving(*pieces: bytes, close: bool = True):
    """A server on loopback that answers each connection with these pieces, whatever it is asked; yields its port."""
    asked: list[bytes] = []
    kept: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            try:
                asked.append(connection.recv(4096))
                for piece in pieces:
                    connection.sendall(piece)
            except OSError:
                pass
            if close:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in kept:
            connection.close()


def entry(name: str, port: int, **fields: object) -> ProviderEntry:
    return ProviderEntry(name=name, base_url=f"http://127.0.0.1:{port}/v1", local=True, **fields)


def look(*entries: ProviderEntry) -> Default:
    return find({e.name: e for e in entries}, {})


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"OPENAI_API_KEY": "x"}, "gpt-5-mini at openai (OPENAI_API_KEY is set)"),
        ({"ANTHROPIC_API_KEY": "x"}, "claude-haiku-4-5 at anthropic (ANTHROPIC_API_KEY is set)"),
        ({"ANTHROPIC_API_KEY": "x", "OPENAI_API_KEY": "y"}, "gpt-5-mini at openai (OPENAI_API_KEY is set)"),
        ({"OPENAI_API_KEY": " ", "GROQ_API_KEY": "x"}, "llama-3.3-70b-versatile at groq (GROQ_API_KEY is set)"),
        (
            {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": "https://gateway.example/v1"},
            "gpt-5-mini at openai (OPENAI_API_KEY is set)",
        ),
    ],
)
def test_a_key_decides_and_no_port_is_tried(environ, words, monkeypatch) -> None:
    monkeypatch.setattr(discovery, "_by_server", lambda _: pytest.fail("a port was tried"))
    assert str(find(CATALOG, environ)) == words


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HF_TOKEN": "x", "VLLM_API_KEY": "x", "LITELLM_API_KEY": "x"},  # no model is sure to be there
        {"OPENAI_API_KEY": "EMPTY", "OPENAI_BASE_URL": "http://localhost:8000/v1"},  # a local server, not OpenAI
        {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": "not a url"},  # said when OpenAI is asked for
    ],
)
def test_what_is_no_sure_sign_does_not_decide(environ, monkeypatch) -> None:
    monkeypatch.setattr(discovery, "_by_server", lambda _: None)
    assert find(CATALOG, environ) == NOTHING


def test_every_local_entry_is_tried_and_nothing_else(monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(discovery, "_first_found", lambda probes: tried.extend((p.host, p.port) for p in probes))
    assert find(CATALOG, {"OLLAMA_HOST": "10.0.0.7:11434"}) == NOTHING  # not on this machine, so not tried
    assert tried == [("127.0.0.1", port) for port in (8000, 1234, 8080, 30000)]


# -- servers -----------------------------------------------------------------------------------------------------------


def test_nothing_listens_and_nothing_is_lost() -> None:
    entries = [entry(f"p{n}", closed_port()) for n in range(6)]
    began = time.perf_counter()
    assert look(*entries) == NOTHING
    assert time.perf_counter() - began < discovery.CONNECT_S + 0.2


def test_a_server_is_found_by_its_first_model() -> None:
    with serving(answer(listing("Qwen/Qwen3-8B", "other"))) as (port, asked):
        found = look(entry("nobody", closed_port()), entry("vllm", port))
    assert found == Default("vllm:Qwen/Qwen3-8B", f"found at 127.0.0.1:{port}")
    assert str(found) == f"Qwen/Qwen3-8B at vllm (found at 127.0.0.1:{port})"
    assert asked[0].startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"authorization" not in asked[0].lower()


@pytest.mark.parametrize(
    "pieces",
    [
        [answer(listing("m"), length=False)],
        [
            answer(b"", "Transfer-Encoding: chunked", length=False),
            b"%x\r\n" % len(listing("m")),
            listing("m"),
            b"\r\n0\r\n\r\n",
        ],
        [bytes([byte]) for byte in answer(listing("m"))],
    ],
    ids=["to the end", "chunked", "byte by byte"],
)
def test_each_way_to_send_a_list_is_read(pieces) -> None:
    with serving(*pieces) as (port, _):
        assert look(entry("vllm", port)).model == "vllm:m"


def test_a_whole_answer_needs_no_end_of_the_connection() -> None:
    with serving(answer(listing("m")), close=False) as (port, _):
        began = time.perf_counter()
        assert look(entry("vllm", port)).model == "vllm:m"
        assert time.perf_counter() - began < discovery.TOTAL_S


@pytest.mark.parametrize(
    ("owner", "name"),
    [("vllm", "vllm"), ("some-org", "transformers"), ("llamacpp", "transformers"), ("", "transformers")],
)
def test_servers_on_one_port_are_told_apart(owner, name) -> None:
    with serving(answer(listing("m", owner=owner))) as (port, _):
        assert look(entry("vllm", port, owned_by="vllm"), entry("transformers", port)).model == f"{name}:m"


def test_the_earlier_entry_wins_whoever_answers_first() -> None:
    with serving(answer(listing("slow"))) as (one, _), serving(answer(listing("quick"))) as (two, _):
        assert look(entry("a", one), entry("b", two)).model == "a:slow"


def test_a_silent_server_does_not_hide_one_after_it() -> None:
    with serving(close=False) as (silent, _), serving(answer(listing("m"))) as (port, _):
        began = time.perf_counter()
        assert look(entry("first", port), entry("second", silent)).model == "first:m"
        assert time.perf_counter() - began < discovery.TOTAL_S  # nobody waits for what stands later
        assert look(entry("first", silent), entry("second", port)).model == "second:m"


HOSTILE = {
    "silence": [],
    "garbage": [b"\x00\xff" * 500],
    "a greeting": [b"SSH-2.0-OpenSSH_9.9\r\n"],
    "html": [answer(b"<!doctype html><title>Jupyter</title>")],
    "not found": [answer(listing("m"), status="404 Not Found")],
    "a redirect": [answer(b"", "Location: http://127.0.0.1:1/", status="302 Found")],
    "needs a key": [answer(listing("m"), status="401 Unauthorized")],
    "half a list": [answer(listing("m"))[:-9]],
    "too long": [b"HTTP/1.1 200 OK\r\n\r\n", b" " * (discovery.MAX_BYTES + 1), listing("m")],
    "a lie about its length": [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", b"{}"],
    "a chunk that never ends": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n", b"{"],
    "deep": [answer(b"[" * 100_000)],
    "a long number": [answer(b'{"data":[{"id":' + b"9" * 5000 + b"}]}")],
    "not utf-8": [answer(b'{"data":[{"id":"\xff\xfe"}]}')],
    "no list": [answer(b'{"data":{"id":"m"}}')],
    "a bare list": [answer(b'[{"id":"m"}]')],
    "an empty list": [answer(b'{"data":[]}')],
    "no text": [answer(listing(1, None, ["m"], {"id": "m"}))],
    "no names": [answer(b'{"data":["m", null, 3]}')],
    "escape codes": [answer(listing("\x1b[31mred", "a\nb", "<b>m</b>", "a,b", "sp ace", "a" * 201, "\u202egpt", ""))],
    "embeddings": [answer(listing("text-embedding-nomic-embed-text-v1.5", "bge-m3:latest"))],
}


@pytest.mark.parametrize("pieces", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("close", [True, False], ids=["closes", "stays"])
def test_what_is_no_model_server_is_passed_by(pieces, close) -> None:
    with serving(*pieces, close=close) as (port, _):
        began = time.perf_counter()
        assert look(entry("vllm", port)) == NOTHING
        assert time.perf_counter() - began < PATIENCE_S


def test_a_server_that_drips_for_ever_is_left() -> None:
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            try:
                while not stop.wait(0.01):
                    connection.sendall(b"X-Drip: 1\r\n")
            except OSError:
                pass

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        began = time.perf_counter()
        assert look(entry("vllm", listener.getsockname()[1])) == NOTHING
        assert time.perf_counter() - began < PATIENCE_S
    finally:
        stop.set()
        thread.join(5)
        listener.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux leaves a connection to a full queue pending")
def test_a_port_that_neither_accepts_nor_refuses_is_left_early() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for other in waiting:
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        began = time.perf_counter()
        found = look(entry("vllm", listener.getsockname()[1]))
        took = time.perf_counter() - began
        for other in waiting:
            other.close()
    assert found == NOTHING
    assert took < discovery.TOTAL_S - 0.05


def test_a_model_after_unusable_ones_is_taken() -> None:
    with serving(answer(listing("nomic-embed-text", "\x1b[2J", "qwen3:8b"))) as (port, _):
        assert look(entry("ollama", port)).model == "ollama:qwen3:8b"


def test_no_socket_is_left(recwarn) -> None:
    import gc

    with serving(answer(listing("m"))) as (port, _), serving(close=False) as (silent, _):
        look(entry("a", closed_port()), entry("b", silent), entry("c", port))
        look(entry("a", port), entry("b", silent))
    gc.collect()
    assert [w for w in recwarn if issubclass(w.category, ResourceWarning)] == []


def test_a_machine_without_the_family_is_no_error() -> None:
    unusable = ProviderEntry(name="six", base_url=f"http://[::1]:{closed_port()}/v1", local=True)
    assert look(unusable) == NOTHING


# -- cost --------------------------------------------------------------------------------------------------------------


def test_importing_it_loads_no_network_module() -> None:
    root = str(Path(discovery.__file__).parents[2])
    code = "import sys; sys.path.insert(0, sys.argv[1]); import llmkit.config; print({'socket', 'selectors', 'json', 'ssl', 'http.client', 'tomllib', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code, root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
