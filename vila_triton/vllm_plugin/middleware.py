"""The ASGI middleware of `vila-triton serve`: the chat page, the kernels that ran, and a limit on bodies.

vLLM puts it around its server: `--middleware vila_triton.vllm_plugin.middleware.Middleware`.
"""

import asyncio
import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

PAGE = Path(__file__).with_name("chat.html")
MIB = 1 << 20
MAX_BODY_MIB = 32  # of a request, unless the section below says another number
SECTION = "vila_triton_server"  # of vLLM's additional_config
SECONDS_TO_DISCARD, MIB_TO_DISCARD = 5.0, 256  # of the rest of a body that is refused


class Middleware:
    """Answer `GET /` by the chat page and `GET /kernels` by counts of calls, refuse large bodies, pass on the rest.

    A body is kept until it is whole, and reaches vLLM only then. It prints the address once the server listens.
    """

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, announcing(scope["app"].state, send))
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD") and scope["path"] == "/":
            page = PAGE.read_text(encoding="utf-8")
            headers = {"content-security-policy": content_security_policy(page), "x-content-type-options": "nosniff"}
            await respond(send, 200, page.encode(), "text/html; charset=utf-8", headers)
        elif scope["method"] == "GET" and scope["path"] == "/kernels":
            counts = await kernel_counts(scope["app"].state.engine_client)
            await respond(send, 200, json.dumps({"counts": counts}).encode())
        else:
            await self.pass_on(scope, receive, send)

    async def pass_on(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on when its body is whole, or answer it by 413 as soon as it is too large."""
        limit = max_body_bytes(scope["app"].state)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        messages, size = [], 0
        if declared.isdigit() and int(declared) > limit:
            await refuse_body(receive, send, limit)
            return
        while True:
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > limit:
                messages.clear()
                await refuse_body(receive, send, limit)
                return
            if not messages[-1].get("more_body"):  # the end of the body, or of the connection
                break

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


async def refuse_body(receive: Receive, send: Send, limit: int) -> None:
    """Answer 413, then discard some of the body: a client that writes all of it before it reads gets the answer."""
    error = {
        "message": f"The body of the request is larger than {limit / MIB:g} MiB (--max-body-mib of vila-triton serve).",
        "type": "RequestEntityTooLargeError",
        "param": None,
        "code": 413,
    }
    await respond(send, 413, json.dumps({"error": error}).encode(), headers={"connection": "close"}, is_last=False)
    discarded, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS_TO_DISCARD):
            while more and discarded < MIB_TO_DISCARD * MIB:
                message = await receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})


async def respond(
    send: Send,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
    is_last: bool = True,
) -> None:
    """Send a response. With `is_last` False its end is not declared, and the body of the request can still be read."""
    headers = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def content_security_policy(page: str) -> str:
    """The policy under which a page runs its own scripts and styles, shows images that it made, and asks its server."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def kernel_counts(engine_client: Any) -> dict[str, int]:
    """Calls of each "op=implementation" since the start, over all workers."""
    total: Counter[str] = Counter()
    for counts in await engine_client.collective_rpc("kernel_counts"):
        total.update(counts)
    return dict(sorted(total.items()))


def max_body_bytes(state: Any) -> int:
    """The largest body of a request, as vLLM's `--additional-config` says."""
    settings = (state.args.additional_config or {}).get(SECTION, {})
    return settings.get("max_body_mib", MAX_BODY_MIB) * MIB


def announcing(state: Any, send: Send) -> Send:
    """Return a `send` for the messages of an app's lifespan that prints the address after the start is complete."""
    tasks = set()  # or they could be collected before they end

    async def send_and_announce(message: Message) -> None:
        await send(message)
        if message["type"] == "lifespan.startup.complete":
            tasks.add(asyncio.create_task(announce(state)))

    return send_and_announce


async def announce(state: Any) -> None:
    """Wait until the server listens, then print its address and the name of the model."""
    while not state.server.started:
        await asyncio.sleep(0.02)
    host, port = state.server.servers[0].sockets[0].getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(
        f"{address} answers for {state.args.served_model_name[0]}: a chat page, and the OpenAI API at {address}/v1",
        flush=True,
    )
