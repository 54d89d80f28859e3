"""The middleware of `vila-triton serve`, around an app of its own, without vLLM."""

import asyncio
import base64
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vila_triton.vllm_plugin import middleware

MIB = middleware.MIB


@pytest.fixture(autouse=True)
def _little_is_discarded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "MIB_TO_DISCARD", 3)


class Server:
    """Runs requests through the middleware around an app that answers with the length of the body that it got."""

    def __init__(self, counts: Any = (), max_body_mib: int = 1):
        self.calls, self.read, self.counts = 0, 0, list(counts)
        config = {middleware.SECTION: {"max_body_mib": max_body_mib}}
        state = SimpleNamespace(args=SimpleNamespace(additional_config=config), engine_client=self)
        self.scope: dict[str, Any] = {"type": "http", "app": SimpleNamespace(state=state), "headers": []}

    async def collective_rpc(self, method: str) -> list[dict[str, int]]:
        assert method == "kernel_counts"
        return self.counts

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls, body, more = self.calls + 1, b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        after = await receive()
        await middleware.respond(send, 200, json.dumps([len(body), after["type"]]).encode())

    def request(self, method: str, path: str, chunks: Any = (b"",), headers: Any = ()) -> tuple[int, Any, bytes]:
        """Send a request whose body comes in chunks -> status, headers, body of the response."""
        incoming, sent = iter(chunks), []

        async def receive() -> dict[str, Any]:
            if (chunk := next(incoming, None)) is None:
                return {"type": "http.disconnect"}
            self.read += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": True} if chunk else {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {**self.scope, "method": method, "path": path, "headers": list(headers)}
        asyncio.run(middleware.Middleware(self.app)(scope, receive, send))
        start, *parts = sent
        assert not parts[-1].get("more_body")
        return start["status"], dict(start["headers"]), b"".join(part["body"] for part in parts)


def test_page_runs_its_own_script_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "\nlet x = 1; // ✓\n"
    monkeypatch.setattr(middleware, "PAGE", tmp_path / "chat.html")
    middleware.PAGE.write_text(f"<style>p {{}}</style><script>{script}</script>", encoding="utf-8")
    status, headers, body = Server().request("GET", "/")
    policy = headers[b"content-security-policy"].decode()
    assert status == 200 and body == middleware.PAGE.read_bytes()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy and "unsafe" not in policy


def test_policy_of_a_page_without_scripts_allows_none():
    assert "script-src 'none'; style-src 'none';" in middleware.content_security_policy("<p onclick='alert(1)'>")


def test_kernels_are_counted_over_all_workers():
    status, _, body = Server([{"linear=aten": 3}, {"rope=triton": 1, "linear=aten": 2}]).request("GET", "/kernels")
    assert status == 200 and json.loads(body) == {"counts": {"linear=aten": 5, "rope=triton": 1}}


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("POST", "/kernels"), ("GET", "/health"), ("GET", "//")])
def test_other_requests_reach_the_app(method: str, path: str):
    server = Server()
    assert server.request(method, path)[0] == 200 and server.calls == 1


def test_body_reaches_the_app_whole_and_what_follows_it_too():
    chunks = [b"x" * (MIB // 2), b"x" * (MIB // 2), b""]
    _, _, body = Server().request("POST", "/v1", chunks, [(b"content-length", str(MIB).encode())])
    assert json.loads(body) == [MIB, "http.disconnect"]


def test_body_that_is_declared_too_large_is_refused_before_it_is_read_whole():
    server = Server()
    chunks = (b"x" * 1000 for _ in range(10**6))
    status, headers, body = server.request("POST", "/v1", chunks, [(b"content-length", b"1000000000")])
    assert (status, server.calls) == (413, 0) and headers[b"connection"] == b"close"
    assert json.loads(body)["error"]["code"] == 413 and "larger than 1 MiB" in json.loads(body)["error"]["message"]
    assert server.read <= 3 * MIB + 1000


@pytest.mark.parametrize("length", [None, b"10", b"-1", b"many", b""])
def test_body_that_grows_too_large_is_refused_whatever_was_declared(length: bytes | None):
    server = Server()
    chunks = (b"x" * 1000 for _ in range(10**6))
    headers = [(b"content-length", length)] if length is not None else [(b"transfer-encoding", b"chunked")]
    assert server.request("POST", "/v1", chunks, headers)[0] == 413
    assert server.calls == 0 and server.read <= 4 * MIB + 2000


def test_client_that_stops_sending_a_body_that_is_refused_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "SECONDS_TO_DISCARD", 0.01)
    sent = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware.refuse_body(receive, send, MIB))
    assert sent[0]["status"] == 413 and not sent[-1].get("more_body")


def test_client_that_goes_away_in_mid_body_is_passed_on():
    server = Server()
    _, _, body = server.request("POST", "/v1", [b"abc"])
    assert json.loads(body) == [3, "http.disconnect"]


def test_address_is_printed_once_the_server_listens(capsys: pytest.CaptureFixture[str]):
    state = SimpleNamespace(
        args=SimpleNamespace(served_model_name=["tiny"]),
        server=SimpleNamespace(started=False, servers=[SimpleNamespace(sockets=[SimpleNamespace()])]),
    )
    state.server.servers[0].sockets[0].getsockname = lambda: ("127.0.0.1", 8123)
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await asyncio.sleep(0.03)
        seen.append(capsys.readouterr().out)
        state.server.started = True
        await asyncio.sleep(0.1)

    async def send(message: Any) -> None:
        seen.append(message["type"])

    scope = {"type": "lifespan", "app": SimpleNamespace(state=state)}
    asyncio.run(middleware.Middleware(app)(scope, None, send))  # pyright: ignore[reportArgumentType]
    assert seen == ["lifespan.startup.complete", ""]
    assert capsys.readouterr().out.startswith("http://127.0.0.1:8123 answers for tiny")
