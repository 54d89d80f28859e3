"""A client of OpenAI-compatible servers that notes when each answer began and ended, on the standard library alone.

It streams chat completions, one connection a request, in one thread. What goes wrong with a request is its outcome, and
the others go on.
"""

import asyncio
import json
import ssl
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vila_triton.files.reading import LoadError, parse_json

from .trace import Request

MAX_LINE = 1 << 20  # bytes of a line of a response


@dataclass(frozen=True)
class Outcome:
    """The answer to a request, or what went wrong. Times are those of `time.perf_counter`: the request's own, which is
    when it was sent or was to be sent; of the first text; of the end. `tokens` counts those of the answer, with the one
    that ended it.
    """

    request: Request
    start: float
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def is_right(self) -> bool:
        return not self.error and self.text.strip() == self.request.answer


@dataclass(frozen=True)
class Load:
    """The way in which requests come: `streams` at any time, the next as soon as one has ended; or `rate` a second, at
    the times of the trace, however many wait.
    """

    streams: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.streams} stream{'s' * (self.streams != 1)}" if self.streams else f"{self.rate:g} requests/s"

    @property
    def labels(self) -> dict[str, Any]:
        return {"what": "streams", "streams": self.streams} if self.streams else {"what": "arrivals", "rate": self.rate}


class ServerError(RuntimeError):
    """A response that is no answer."""


@dataclass(frozen=True)
class Server:
    """An address and the name under which the model is served there."""

    url: str
    model: str
    answer_tokens: int = 64
    seconds: float = 120.0

    def body(self, request: Request) -> bytes:
        """Returns the JSON of a chat completion that is streamed and greedy."""
        options = {"temperature": 0, "max_tokens": self.answer_tokens, "stream": True}
        options["stream_options"] = {"include_usage": True}
        return json.dumps({"model": self.model, "messages": list(messages(request)), **options}).encode()


def messages(request: Request) -> Iterator[dict[str, Any]]:
    """Yields the messages of a conversation; the first holds the images."""
    turns = [*request.earlier, request.question]
    for i, turn in enumerate(turns):
        urls = [f"data:image/png;base64,{b64encode(image).decode()}" for image in request.images] if i == 0 else []
        parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        yield {"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]}
        if turn is not request.question:
            yield {"role": "assistant", "content": turn.answer}


async def exchange(url: str, method: str, path: str, body: bytes = b"") -> AsyncGenerator[bytes]:
    """Yields the lines of the body of a response.

    Errors: ServerError for a status other than 200, OSError, EOFError if the response ends early.
    """
    parts = urlsplit(url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls, limit=MAX_LINE)
    try:
        head = f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        status, headers = await read_head(reader)
        lines = split_lines(body_parts(reader, headers))
        if status != 200:
            text = b"\n".join([line async for line in lines]).decode(errors="replace")
            raise ServerError(f"HTTP {status}: {error_message(text)}")
        async for line in lines:
            yield line
    finally:
        writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Returns the status and the headers of a response, names in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = lines[0].split()
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise ServerError(f"the server speaks no HTTP: {lines[0][:80]!r}")
    headers = (line.partition(":") for line in lines[1:])
    return int(words[1]), {name.lower(): value.strip() for name, _, value in headers if name}


async def body_parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yields the body of a response as it comes: in chunks, of a length that is given, or up to the end."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while part := await reader.read(1 << 16):
            yield part


async def split_lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields lines without the blanks around them."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.strip()
    if rest:
        yield rest


def error_message(text: str) -> str:
    """Returns the message of an error in OpenAI's format, or the text itself, shortened."""
    try:
        found = parse_json(text, "the error")
        text = str(found["error"]["message"])
    except (LoadError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200]


async def read_answer(server: Server, body: bytes) -> tuple[str, int, float, float]:
    """Returns the text, the number of tokens, and the times of the first text and of the end of a streamed answer."""
    text, tokens, first, end, is_done = "", 0, 0.0, 0.0, False
    async with aclosing(exchange(server.url, "POST", "/v1/chat/completions", body)) as lines:
        async for line in lines:
            data, now = line.removeprefix(b"data:").strip(), time.perf_counter()
            is_done = is_done or data == b"[DONE]"
            if data == line or is_done:
                continue
            event = parse_json(data, "an event")
            if "error" in event:
                raise ServerError(error_message(data.decode()))
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    text, first = text + piece, first or now
                end = now if choice.get("finish_reason") else end
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
    if not (is_done and end and tokens):
        raise EOFError
    return text, tokens, first or end, end


async def ask(server: Server, request: Request, body: bytes, start: float | None = None) -> Outcome:
    """Asks a request; `start` is when it was to be sent, by default now."""
    start = time.perf_counter() if start is None else start
    try:
        async with asyncio.timeout(server.seconds):
            text, tokens, first, end = await read_answer(server, body)
        return Outcome(request, start, first, end, tokens, text)
    except TimeoutError:
        reason = f"no answer within {server.seconds:g} s"
    except EOFError:  # asyncio.IncompleteReadError among others
        reason = "the answer ended early"
    except (OSError, ServerError, LoadError) as error:
        reason = str(error) or type(error).__name__
    except (AttributeError, KeyError, TypeError, ValueError, asyncio.LimitOverrunError) as error:
        reason = f"the answer is not in OpenAI's format: {type(error).__name__} {error}"
    return Outcome(request, start, end=time.perf_counter(), error=reason)


async def ask_all(server: Server, requests: Sequence[Request], load: Load) -> list[Outcome]:
    """Asks requests under a load and returns their outcomes in this order."""
    bodies = [server.body(request) for request in requests]
    begin = time.perf_counter()
    if load.rate:
        starts = [begin + at for at in arrival_times(requests, load.rate)]
        return await asyncio.gather(*(ask_at(server, *item) for item in zip(requests, bodies, starts)))
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(requests)))

    async def stream() -> None:
        for i in waiting:
            outcomes[i] = await ask(server, requests[i], bodies[i])

    await asyncio.gather(*(stream() for _ in range(load.streams or 1)))
    return [outcomes[i] for i in range(len(requests))]


async def ask_at(server: Server, request: Request, body: bytes, start: float) -> Outcome:
    """Asks a request at a time."""
    await asyncio.sleep(max(0, start - time.perf_counter()))
    return await ask(server, request, body, start)


def arrival_times(requests: Sequence[Request], rate: float) -> list[float]:
    """Returns the seconds from the beginning at which requests come, `rate` a second on average."""
    times, now = [], 0.0
    for request in requests:
        now += request.gap / rate
        times.append(now)
    return times


def served_model(url: str) -> str:
    """Returns the name of the first model that a server offers. Errors: ServerError, OSError, EOFError, LoadError."""
    found = fetch_json(url, "/v1/models")
    try:
        return str(found["data"][0]["id"])
    except (KeyError, TypeError, IndexError):
        raise ServerError(f"{url}/v1/models lists no model") from None


def kernels_that_ran(url: str) -> list[str]:
    """Returns "OP=NAME" of all implementations that a server says ran since it started; none if it does not say so."""
    try:
        return sorted(fetch_json(url, "/kernels")["counts"])
    except (OSError, EOFError, ServerError, LoadError, KeyError, TypeError):
        return []


def fetch_json(url: str, path: str) -> Any:
    """Returns the JSON at a path of a server. Errors: ServerError, OSError, EOFError, LoadError."""

    async def fetch() -> bytes:
        return b"\n".join([line async for line in exchange(url, "GET", path)])

    return parse_json(asyncio.run(fetch()), f"{url}{path}")
