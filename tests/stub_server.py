"""A stub of an OpenAI-compatible server, whose answers and delays are known."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.serving.client import Load, Outcome, Server, ask_all, messages, served_model
from bench.serving.trace import Request

Reply = Callable[[asyncio.StreamWriter, Request], Any]


@dataclass
class StubServer:
    """A server in a thread whose answers are right, 20 ms to the first word; `reply` answers in another way."""

    trace: list[Request]
    reply: Reply | None = None
    active: int = 0
    most_active: int = 0
    arrivals: list[float] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.known = {json.dumps(list(messages(request))): request for request in self.trace}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self.serve, "127.0.0.1", 0), self.loop).result()
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            write_response(writer, json.dumps({"data": [{"id": "stub"}]}))
        elif head.startswith("GET /kernels "):
            write_response(writer, json.dumps({"counts": {"swiglu=aten": 3, "rms_norm=mine": 1}}))
        else:
            body = await reader.readexactly(int(head.lower().partition("content-length:")[2].split()[0]))
            asked = json.loads(body)
            assert asked["stream"] and asked["stream_options"] == {"include_usage": True} and asked["model"] == "stub"
            self.arrivals.append(time.perf_counter())
            self.active += 1
            self.most_active = max(self.active, self.most_active)
            await (self.reply or answer)(writer, self.known[json.dumps(asked["messages"])])
            self.active -= 1
        writer.close()

    def ask(self, requests: list[Request], load: Load, **options: Any) -> list[Outcome]:
        server = Server(self.url, served_model(self.url), **options)
        return asyncio.run(ask_all(server, requests, load))


def write_response(writer: asyncio.StreamWriter, body: str, status: str = "200 OK") -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def write_event(writer: asyncio.StreamWriter, event: Any) -> None:
    data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
    half = len(data) // 2  # an event may come in pieces
    writer.write(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:half], data[half:])))


def chunk(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}], "usage": None}


async def answer(writer: asyncio.StreamWriter, request: Request, text: str | None = None) -> None:
    """Answer word by word, each a token, 10 ms apart."""
    words = (request.answer if text is None else text).split()
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    write_event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    await asyncio.sleep(0.02)
    for i, word in enumerate(words):
        write_event(writer, chunk(f" {word}" if i else word))
        await asyncio.sleep(0.01)
    write_event(writer, chunk("", "stop"))
    write_event(writer, {"choices": [], "usage": {"completion_tokens": len(words) + 1}})
    write_event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
