"""An OpenAI-compatible server on loopback, in a thread, that plays one scripted answer a request."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WAIT_S = 30


class Step:
    """A moment of an answer that the test controls: the server says when it is there, and waits until it may go on."""

    def __init__(self):
        self.reached = threading.Event()
        self.go = threading.Event()


class Gone:
    """The server stays silent here and notes when the client leaves."""

    def __init__(self):
        self.reached = threading.Event()
        self.left = threading.Event()
        self.at = None


CUT = object()


def said(*parts, usage=(7, 5), finish="stop"):
    """A streamed answer: texts, `Step`s, a `Gone`, `CUT`, and whatever is to be called with the handler."""

    def play(handler):
        handler.begin()
        for part in parts:
            if isinstance(part, Step):
                part.reached.set()
                assert part.go.wait(WAIT_S)
            elif isinstance(part, Gone):
                handler.watch(part)
                return
            elif callable(part):
                part(handler)
            elif part is CUT:
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
                return
            else:
                handler.event({"model": "tiny-1", "choices": [{"index": 0, "delta": {"content": part}}]})
        handler.event({"model": "tiny-1", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if usage:
            counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
            handler.event({"model": "tiny-1", "choices": [], "usage": counts})
        handler.end()

    return play


def refused(status, message="no", **headers):
    """An error in OpenAI's shape."""

    def play(handler):
        body = json.dumps({"error": {"message": message}}).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return play


def silent(gone):
    """No answer at all."""
    return lambda handler: handler.watch(gone)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        try:
            play = self.server.script.get_nowait()
        except queue.Empty:
            play = said("Hello ", "there.")
        try:
            play(self)
        except (ConnectionError, ValueError):
            self.close_connection = True

    def begin(self):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def event(self, data):
        frame = b"data: " + json.dumps(data).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame))
        self.wfile.flush()

    def end(self):
        frame = b"data: [DONE]\n\n"
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(frame), frame))

    def watch(self, gone):
        gone.reached.set()
        self.connection.settimeout(WAIT_S)
        try:
            left = self.connection.recv(1) == b""
        except ConnectionError:
            left = True
        gone.at = time.monotonic()
        if left:
            gone.left.set()
        self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """``script`` holds what the next requests get, in their order; after that a short greeting."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = queue.SimpleQueue()
        self.requests = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next(self, *plays):
        for play in plays:
            self.script.put(play)

    def handle_error(self, request, client_address):
        pass

    def settings(self, **more):
        """An ``llmkit.toml`` whose default model is this server's."""
        lines = ['model = "tiny"', *(f"{name} = {value}" for name, value in more.items())]
        lines += ["[models.tiny]", 'provider = "vllm"', 'model = "tiny"', f'base_url = "{self.base_url}"']
        lines += ["price = { input = 1.0, output = 2.0 }"]
        lines += ["[models.deaf]", 'provider = "vllm"', 'model = "deaf"', 'base_url = "http://127.0.0.1:9/v1"']
        lines += ["[models.deaf2]", 'provider = "vllm"', 'model = "deaf2"', 'base_url = "http://127.0.0.1:9/v2"']
        return "\n".join([*lines, "[retry]", "attempts = 2", "initial = 0.1"]) + "\n"
