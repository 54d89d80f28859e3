"""Load on a server: statistics by hand, and a stub of a server whose answers, delays and faults are known."""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stub_server import Reply, StubServer, answer, chunk, write_event, write_response

from bench import serve
from bench.serving.batches import BatchEngine
from bench.serving.client import Load, Outcome, Server, ask_all, messages
from bench.serving.latency import Run, differing, figures, percentile, ratios, wrong_answers
from bench.serving.other_load import busy_seconds, session_seconds
from bench.serving.servers import running
from bench.serving.trace import Request, Segment, build_trace, serve_config
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.questions import QA

MIX = serve_config()[0]
TRACE = build_trace(MIX, 200, seed=3, segment=1)
SAY_HELLO = Request((), (), QA("none", "say", "hello"), 1.0)


def test_percentiles_are_numpys() -> None:
    rng = random.Random(0)
    for n in (1, 2, 3, 20, 21):
        values = [rng.random() for _ in range(n)]
        for percent in (0, 5, 50, 95, 100):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([7.0], 95) == 7.0
    for values, percent in (([], 50), ([1.0], 101), ([1.0], -1)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, percent)


def outcome(start: float, first: float, end: float, tokens: int, text: str = "hello", error: str = "") -> Outcome:
    return Outcome(SAY_HELLO, start, first, end, tokens, text, error)


RUN = Run(
    [
        outcome(10, 11, 15, 9),  # TTFT 1, TPOT 0.5
        outcome(10, 13, 20, 8, "no"),  # 3, 1
        outcome(12, 14, 14, 7),  # 2, none: too short
        outcome(12, 0, 20, 0, "", "HTTP 400"),
    ],
    client_seconds=1.0,
    other_seconds=2.5,
)


def test_figures_of_answers_are_those_by_hand() -> None:
    assert figures([RUN]) == pytest.approx(
        {
            "ttft": 2, "ttft_p95": 2.9, "tpot": 0.75, "tpot_p95": 0.975, "latency": 5, "latency_p95": 9.5,
            "tokens_per_s": 24 / 10, "requests_per_s": 3 / 10, "requests": 4, "errors": 1, "right": 0.5,
            "client_cores": 0.1, "other_cores": 0.25,
        }
    )  # fmt: skip
    both = figures([RUN, Run([outcome(0, 1, 2, 2)])])
    assert both["requests"] == 5 and both["tokens_per_s"] == pytest.approx(26 / 12)


def test_requests_that_all_fail_have_no_times() -> None:
    found = figures([Run([outcome(0, 0, 5, 0, "", "refused")] * 2)])
    assert not {"ttft", "tpot", "latency", "ttft_p95", "tpot_p95"} & found.keys()
    assert (found["errors"], found["right"], found["tokens_per_s"]) == (2, 0, 0)


def test_ratios_are_medians_over_rounds() -> None:
    rounds = [Run([outcome(0, ttft, ttft + 1, 8)]) for ttft in (1.0, 2.0, 9.0)]
    baseline = [Run([outcome(0, ttft, ttft + 2, 8)]) for ttft in (1.0, 4.0, 3.0)]
    assert ratios(rounds, baseline)["ttft"] == 1.0  # of 1, 0.5 and 3
    assert ratios(rounds, baseline)["tpot"] == 0.5
    failed = [Run([outcome(0, 0, 5, 0, "", "refused")])] * 3
    assert "ttft" not in ratios(rounds, failed) and ratios(rounds, rounds)["tokens_per_s"] == 1.0


def test_wrong_answers_are_the_reason_for_no_time() -> None:
    assert wrong_answers([RUN], 0.5) is None
    wrong = Run([outcome(0, 1, 2, 2, "no")] * 3 + [outcome(0, 1, 2, 2, " hello ")])
    assert wrong_answers([wrong], 0.3) == "1 of 4 answers are right; 3 x 'say' was answered 'no', not 'hello'"
    failed = Run([outcome(0, 0, 5, 0, "", "HTTP 400")] * 2)
    assert wrong_answers([failed], 0.3) == "0 of 2 answers are right; 2 x HTTP 400"
    assert differing([RUN], [Run([outcome(0, 1, 2, 2)] * 4)]) == 1


def test_traces_come_from_their_seed() -> None:
    assert build_trace(MIX, 200, 3, 1) == TRACE and build_trace(MIX, 20, 3, 1) == TRACE[:20]
    others = build_trace(MIX, 20, 3, 2), build_trace(MIX, 20, 4, 1)
    for other in others:
        assert not {image for r in other for image in r.images} & {image for r in TRACE for image in r.images}


def test_traces_hold_what_the_config_says() -> None:
    """Images come again, conversations go on where another request ended, answers are short and long."""
    seen: set[tuple[bytes, ...]] = set()
    again = 0
    conversations = set()
    for request in TRACE:
        again += request.images in seen
        seen.add(request.images)
        if request.earlier:
            assert (request.images, request.earlier) in conversations
        conversations.add((request.images, (*request.earlier, request.question)))
    assert abs(again / len(TRACE) - MIX.asked_before) < 0.1
    assert {len(r.images) for r in TRACE} == {1, 2, 3}
    assert {len(r.earlier) for r in TRACE} == set(range(MIX.turns))
    assert abs(sum(r.gap for r in TRACE) / len(TRACE) - 1) < 0.2
    lengths = [len(r.answer.split()) for r in TRACE]
    assert min(lengths) == 1 and max(lengths) > 15


@pytest.fixture
def stub() -> Iterator[Callable[..., StubServer]]:
    servers: list[StubServer] = []

    def start(trace: list[Request], reply: Reply | None = None) -> StubServer:
        servers.append(StubServer(trace, reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_client_notes_what_an_answer_took(stub: Callable[..., StubServer]) -> None:
    server = stub(TRACE[:12])
    outcomes = server.ask(TRACE[:12], Load(streams=3))
    assert [o.request for o in outcomes] == TRACE[:12] and all(o.is_right and not o.error for o in outcomes)
    assert server.most_active == 3
    for found in outcomes:
        words = len(found.request.answer.split())
        assert found.tokens == words + 1
        assert found.first - found.start >= 0.02 and found.end - found.first >= 0.009 * words
    assert all(found.first - found.start < 1 for found in outcomes)


def test_requests_come_at_the_times_of_the_trace(stub: Callable[..., StubServer]) -> None:
    """However many wait; and an answer's time counts from there."""
    requests = [replace(request, gap=0.5) for request in TRACE[:10]]

    async def late(writer: asyncio.StreamWriter, request: Request) -> None:
        await asyncio.sleep(0.2)
        await answer(writer, request)

    server = stub(requests, late)
    outcomes = server.ask(requests, Load(rate=25.0))  # 20 ms apart
    assert all(b.start - a.start == pytest.approx(0.02) for a, b in pairwise(outcomes))
    assert all(0 <= at - o.start < 0.15 for at, o in zip(server.arrivals, outcomes))
    assert server.most_active > 5 and all(o.first - o.start >= 0.2 for o in outcomes)


async def refuse(writer: asyncio.StreamWriter, request: Request) -> None:
    write_response(writer, json.dumps({"error": {"message": "too many images"}}), "400 Bad Request")


async def drop(writer: asyncio.StreamWriter, request: Request) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    write_event(writer, chunk("there"))
    await writer.drain()


async def drop_at_once(writer: asyncio.StreamWriter, request: Request) -> None:
    pass


async def end_early(writer: asyncio.StreamWriter, request: Request) -> None:
    await drop(writer, request)
    writer.write(b"0\r\n\r\n")


async def fail_midway(writer: asyncio.StreamWriter, request: Request) -> None:
    await drop(writer, request)
    write_event(writer, {"error": {"message": "out of pages"}})


async def send_odd_event(writer: asyncio.StreamWriter, request: Request) -> None:
    await drop(writer, request)
    write_event(writer, {"choices": [{"delta": None}]})


async def send_no_json(writer: asyncio.StreamWriter, request: Request) -> None:
    await drop(writer, request)
    write_event(writer, "{")


async def speak_otherwise(writer: asyncio.StreamWriter, request: Request) -> None:
    writer.write(b"220 ready\r\n\r\n")


async def stall(writer: asyncio.StreamWriter, request: Request) -> None:
    await asyncio.sleep(0.5)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (refuse, "HTTP 400: too many images"),
        (drop, "the answer ended early"),
        (drop_at_once, "the answer ended early"),
        (end_early, "the answer ended early"),
        (fail_midway, "out of pages"),
        (send_odd_event, "the answer is not in OpenAI's format: AttributeError"),
        (send_no_json, "an event is not JSON"),
        (speak_otherwise, "the server speaks no HTTP: '220 ready'"),
        (stall, "no answer within 0.25 s"),
    ],
)
def test_fault_is_the_outcome_of_its_request_alone(stub: Callable[..., StubServer], fault: Reply, error: str) -> None:
    requests = [r for r in TRACE if len(r.answer.split()) < 4][:6]

    async def reply(writer: asyncio.StreamWriter, request: Request) -> None:
        await (fault if request is requests[2] else answer)(writer, request)

    outcomes = stub(requests, reply).ask(requests, Load(streams=2), seconds=0.25)
    assert outcomes[2].error.startswith(error) and not outcomes[2].is_right
    assert all(o.is_right for o in outcomes if o is not outcomes[2])


def test_server_that_is_gone_is_an_error_of_each_request() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    outcomes = asyncio.run(ask_all(Server(url, "stub"), TRACE[:3], Load(streams=2)))
    assert [bool(o.error) for o in outcomes] == [True] * 3 and all(o.end >= o.start for o in outcomes)


@pytest.fixture
def run(
    stub: Callable[..., StubServer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., tuple[int, str, list[dict[str, Any]]]]:
    """Run the command on a stub that answers with a function: (exit code, stdout, rows)."""
    monkeypatch.setattr(serve, "GATE_REQUESTS", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of our engine's process

    def run(reply: Reply | None, *args: str) -> tuple[int, str, list[dict[str, Any]]]:
        trace = [r for segment in range(5) for r in build_trace(MIX, 8, 0, segment)]
        file = tmp_path / "rows.jsonl"
        options = ["--requests", "4", "--rounds", "2", "--out", str(file), *args]
        code = serve.main(["--url", stub(trace, reply).url, *options])
        return code, capsys.readouterr().out, [json.loads(line) for line in file.read_text().splitlines()]

    return run


@contextmanager
def instant_engine(*args: Any) -> Iterator[Any]:
    """In place of our engine's process: right answers, each after a millisecond."""

    def ask(segment: Segment, load: Load) -> list[Outcome]:
        return [Outcome(r, 0, 0.001, 0.002, 2, r.answer) for r in segment.requests]

    yield SimpleNamespace(ask=ask, process=SimpleNamespace(pid=-1))


@pytest.mark.slow
def test_engine_in_its_process_has_a_row_beside_the_server(run: Any) -> None:
    code, out, rows = run(None, "--peers", "engine", "--streams", "2", "--right", "0.5")
    assert code == 0, out
    assert rows[0]["ratio_engine"]["ttft"] > 0 and rows[1]["choice"] == "engine"
    assert all(row["kind"] == "serve" and row["right"] > 0.5 for row in rows)


def test_every_load_has_a_row_for_every_server(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "running_engine", instant_engine)
    code, out, rows = run(None, "--peers", "engine", "--streams", "1,2", "--right", "0.5")
    assert code == 0, out
    assert [(row["streams"], row["choice"].startswith("http")) for row in rows] == [
        (n, k) for n in (1, 2) for k in (1, 0)
    ]
    for row in rows:
        assert row["kind"] == "serve" and row["what"] == "streams" and row["requests"] == 8 and row["errors"] == 0
        assert row["ttft"] > 0 and row["tokens_per_s"] > 0 and row["right"] >= 0.5 and row["other_cores"] >= 0
        assert row["ratio_engine"]["ttft"] > 0 and (row["ratio_engine"]["ttft"] == 1) == (row["choice"] == "engine")
        if row["choice"] != "engine":
            assert row["kernels"] == ["rms_norm=mine", "swiglu=aten"]
    assert "2 streams, 2 x 4 requests" in out


def test_server_whose_answers_are_wrong_gets_no_time(run: Any) -> None:
    async def confused(writer: asyncio.StreamWriter, request: Request) -> None:
        await answer(writer, request, "7")

    code, out, rows = run(confused, "--peers", "", "--streams", "1")
    assert code == 1 and [(row["kind"], row["what"]) for row in rows] == [("refused", "answers")]
    assert "0 of 8 answers are right; " in rows[0]["reason"] and "was answered '7', not " in out


def test_server_that_becomes_wrong_gets_no_time(run: Any) -> None:
    gate = [json.dumps(list(messages(r))) for r in build_trace(MIX, 8, 0, 0)]

    async def confused(writer: asyncio.StreamWriter, request: Request) -> None:
        await answer(writer, request, None if json.dumps(list(messages(request))) in gate else "7")

    code, _, rows = run(confused, "--peers", "", "--streams", "", "--rates", "50")
    assert code == 1 and [(row["kind"], row["what"], row["rate"]) for row in rows] == [("refused", "arrivals", 50.0)]


def test_unknown_peers_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--peers", "sglang"])
    assert "no peer 'sglang'; there are: vllm, engine" in capsys.readouterr().err


def test_engine_answers_as_generate_does_and_keeps_no_page() -> None:
    chat_model = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    engine = BatchEngine(chat_model, 64)
    requests = [*TRACE[:6], next(r for r in TRACE if len(r.earlier) == 2)]
    outcomes = engine.ask_all(requests, Load(streams=4))
    for request, found in zip(requests, outcomes):
        images = chat_model.preprocess_images([engine.open_image(file) for file in request.images])
        ids = torch.tensor([engine.prompt_ids(request)])
        expected = chat_model.model.generate(ids, images, max_new_tokens=64)[0]
        assert found.text == engine.decode(expected.tolist()) and found.tokens == len(expected)
        assert found.start < found.first <= found.end
    assert sum(o.is_right for o in outcomes) >= 6
    assert not engine.cache.allocator.sequences and not engine.cache.allocator.reserved_lens
    again = engine.ask_all(requests, Load(rate=1000.0))
    assert [o.text for o in again] == [o.text for o in outcomes]


ENDING = "raise SystemExit('RuntimeError: no port is free')"
SERVING = """
import http.server, json, os, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": str(child.pid)}]}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_processes_of_a_server_are_ended() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with running([sys.executable, "-c", SERVING, str(port)], {}, url, 30) as served:
        assert (Path("/proc") / served.model).exists() and session_seconds([served.session]) >= 0
    end = time.monotonic() + 5
    while (Path("/proc") / served.model).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not (Path("/proc") / served.model).exists()


def test_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match="ended with code 1: RuntimeError: no port is free"),
        running([sys.executable, "-c", ENDING], {}, "http://127.0.0.1:9", 30),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match=r"does not answer after 0\.1 s: it says nothing"),
        running([sys.executable, "-c", "import time; time.sleep(60)"], {}, "http://127.0.0.1:9", 0.1),
    ):
        pass


def test_work_of_others_is_that_of_other_sessions(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  300 50 100 9000 500 0 50 7 0 0\ncpu0 1 1 1 1\n")
    for pid, session in ((10, 10), (11, 10), (12, 99)):
        folder = tmp_path / str(pid)
        folder.mkdir()
        words = ["S", "1", "1", str(session), *["0"] * 7, str(pid * 10), "5", "0"]
        (folder / "stat").write_text(f"{pid} (a (b) c) {' '.join(words)}\n")
    ticks = 100
    assert busy_seconds(tmp_path) == pytest.approx(500 / ticks)
    assert session_seconds([10], tmp_path) == pytest.approx((105 + 115) / ticks)
    assert busy_seconds(tmp_path / "none") == 0
