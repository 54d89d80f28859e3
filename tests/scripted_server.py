"""A server of the chat page and of as much of the OpenAI protocol as it speaks, whose answers a test writes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vila_triton.vllm_plugin.middleware import PAGE, content_security_policy


class Reply(BaseHTTPRequestHandler):
    """One request. A test's reply calls `say`, or `begin`, `chunk` and `end`."""

    server: "ScriptedServer"

    def do_GET(self) -> None:
        """Serve the page, the models and the counts of kernels, and note the path."""
        self.server.paths.append(self.path)
        server = self.server
        if self.path == "/":
            page = PAGE.read_text(encoding="utf-8")
            policy = content_security_policy(page)
            self.respond(200, page.encode(), {"Content-Type": "text/html", "Content-Security-Policy": policy})
        elif self.path == "/v1/models" and server.models is None:
            self.say(503, {"error": {"message": "starting"}})
        elif self.path == "/v1/models":
            self.say(200, {"data": [{"id": name} for name in server.models or ()]})
        elif self.path == "/kernels" and server.counts is not None:
            self.say(200, {"counts": server.counts})
        else:
            self.say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """Note a request for an answer and give it the test's next reply."""
        self.server.paths.append(self.path)
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        try:
            self.server.replies.pop(0)(self)
        except ConnectionError:
            self.server.client_gone.set()

    def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def say(self, status: int, value: Any) -> None:
        """Send JSON."""
        self.respond(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def begin(self) -> None:
        """Open a stream of events with the chunk that names the role, as vLLM does."""
        self.respond(200, b"", {"Content-Type": "text/event-stream; charset=utf-8"})
        self.chunk("")

    def send(self, event: Any) -> None:
        """Send an event of the stream, in two packets if a character takes many bytes: the cut lies within the last."""
        data = f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n".encode()
        if cut := max((i for i, byte in enumerate(data) if byte >= 0x80), default=0):
            self.wfile.write(data[:cut])
            time.sleep(0.05)
        self.wfile.write(data[cut:])

    def chunk(self, text: str, finish_reason: str | None = None) -> None:
        """Send a piece of the answer."""
        self.send({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]})

    def end(self, tokens: int = 2, finish_reason: str = "stop") -> None:
        """Send what closes an answer of so many tokens."""
        self.chunk("", finish_reason)
        self.send({"choices": [], "usage": {"prompt_tokens": 27, "completion_tokens": tokens}})
        self.send("[DONE]")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


class ScriptedServer(ThreadingHTTPServer):
    """`replies` are called in turn with their `Reply`; `requests` are the bodies that came, `paths` all that was asked
    for. `client_gone` is set when a reply finds that nobody listens any more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), Reply)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.models: list[str] | None = ["tiny"]
        self.counts: dict[str, int] | None = {"linear=aten": 3, "rms_norm=reference": 4}
        self.paths: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.replies: list[Callable[[Reply], None]] = []
        self.client_gone = threading.Event()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server that runs until the context ends."""
    with ScriptedServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def endless(piece: str) -> Callable[[Reply], None]:
    """A reply of this piece again and again, until the client goes away."""

    def reply(to: Reply) -> None:
        to.begin()
        while True:
            to.chunk(piece)
            time.sleep(0.02)

    return reply


def answer(*pieces: str, tokens: int = 2) -> Callable[[Reply], None]:
    """A reply of these pieces."""

    def reply(to: Reply) -> None:
        to.begin()
        for piece in pieces:
            to.chunk(piece)
        to.end(tokens)

    return reply
