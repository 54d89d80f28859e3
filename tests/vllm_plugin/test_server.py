"""`vila-triton serve` under requests as users send them, and as they should not: the real server, the bundled model."""

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.evaluate import EvalQuestion, build_questions
from vila_triton.tiny.examples import EXAMPLES_DIR

pytestmark = pytest.mark.vllm
MAX_TOKENS = 24
SECONDS_TO_START = 400
NUM_REQUESTS, NUM_BAD = 200, 20
MEMORY_BOUND = 32 << 20  # bytes by which all processes together may grow in a round of requests, after two others
MAX_BODY_MIB = 2
# 256 pages: requests wait for some, and all have been written once before memory is compared.
SMALL_CACHE = ("--block-size", "32", "--kv-cache-memory-bytes", "16M")
ANY_LENGTH = {"ignore_eos": True, "max_tokens": 2000, "min_tokens": 2000}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(text: str, *image_urls: str, **options: Any) -> dict[str, Any]:
    """The body of a request with images before a text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
    message = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    return {"model": "vila-tiny", "messages": [message], "temperature": 0, "max_tokens": MAX_TOKENS, **options}


@dataclass(frozen=True)
class Served:
    """A server in processes of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path  # of standard error

    def request(self, path: str, body: Any = None) -> tuple[int, str]:
        """GET, or POST of JSON or bytes -> status, text."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def gauge(self, name: str) -> float:
        """A number of vLLM's /metrics."""
        (value,) = re.findall(rf"^{name}{{.*}} (\S+)$", self.request("/metrics")[1], re.MULTILINE)
        return float(value)

    def processes(self) -> list[int]:
        """The ids of the server's processes: all of its session."""
        stats = {
            path.parent.name: path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")
        }
        return [int(pid) for pid, fields in stats.items() if int(fields[3]) == self.process.pid and fields[0] != "Z"]

    def resident_bytes(self) -> int:
        """The memory of all processes; what they share is counted for each."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.processes())
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server of the bundled model in float32, at a port of its own, once it has printed its address."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") and k != "TRITON_INTERPRET"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    command = [sys.executable, "-m", "vila_triton", "serve", "--port", "0", "--dtype", "float32"]
    command += ["--max-body-mib", str(MAX_BODY_MIB), "--", *SMALL_CACHE]
    with (tmp_path_factory.mktemp("server") / "log").open("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=env, text=True, start_new_session=True
        )
        timer = threading.Timer(SECONDS_TO_START, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("http://")), "")
            timer.cancel()
            assert line, f"the server did not start:\n{Path(log.name).read_text()}"
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or it would wait for a reader
            yield Served(process, line.split()[0], Path(log.name))
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def questions() -> list[EvalQuestion]:
    """Held-out questions of all kinds about one, two and three images."""
    return build_questions(2, seed=22)


@pytest.fixture(scope="module")
def expected(questions: list[EvalQuestion]) -> list[list[int]]:
    """The token ids of our engine's greedy answers."""
    chat_model = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    rows = []
    for question in questions:
        ids = torch.tensor([chat_model.prompt_ids(question.qa.question, len(question.images))])
        pixels = chat_model.preprocess_images(question.images)
        rows.append(chat_model.model.generate(ids, pixels, max_new_tokens=MAX_TOKENS, do_sample=False)[0].tolist())
    return rows


def test_question_with_an_image_is_answered(server: Served):
    body = chat("How many blue shapes are there?", data_url((EXAMPLES_DIR / "a.png").read_bytes()))
    status, text = server.request("/v1/chat/completions", body)
    answer = json.loads(text)
    assert status == 200 and answer["choices"][0]["message"]["content"].strip() == "2"
    assert answer["usage"]["prompt_tokens"] == 27


def test_openai_client_streams_an_answer(server: Served):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    body = chat("Describe the image.", data_url((EXAMPLES_DIR / "d.png").read_bytes()))
    whole = client.chat.completions.create(**body).choices[0].message.content
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**body, stream=True)]
    assert "".join(parts) == whole and len([part for part in parts if part]) > 3
    assert whole and "green circle" in whole and "red square" in whole


def test_page_and_the_kernels_that_ran(server: Served):
    status, page = server.request("/")
    assert status == 200 and "<script>" in page
    counts = json.loads(server.request("/kernels")[1])["counts"]
    assert counts["decode_attention=aten"] > 0 and counts["prefill_attention=aten"] > 0


def named_image(url: str | None) -> dict[str, Any]:
    """The body of a request with an image under a name of its own, by which vLLM would cache it."""
    image = {"type": "image_url", "image_url": url and {"url": url}, "uuid": "mine"}
    return {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]}


def bad_requests() -> dict[str, tuple[Any, int]]:
    """By what is wrong: a body, and the status of the answer."""
    image = data_url((EXAMPLES_DIR / "a.png").read_bytes())
    broken = data_url((EXAMPLES_DIR / "a.png").read_bytes()[:200])
    bomb = data_url(png(Image.new("1", (10000, 9000))))
    return {
        "broken image": (chat("?", image, broken), 400),
        "no image": (chat("?", data_url(b"text")), 400),
        "no base64": (chat("?", "data:image/png;base64,!"), 400),
        "image that grows": (chat("?", bomb), 400),
        "too many images": (chat("?", *[image] * 17), 400),
        "more places than images": (chat("<image> <image>?", image), 400),
        "file": (chat("?", f"file://{EXAMPLES_DIR / 'a.png'}"), 400),
        "address in the web": (chat("?", "http://127.0.0.1:1/a.png"), 400),
        "path in the place of an image": (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_pil", "image_pil": str(EXAMPLES_DIR / "a.png")}]}
                ]
            },
            400,
        ),
        "too long a prompt": (chat("How many? " * 3000, image), 400),
        "far too long a prompt": (chat("How many? " * 100_000, image), 400),
        "too many tokens": (chat("?", image, max_tokens=5000), 400),
        "huge body": (b" " * (3 << 20), 413),
        "no JSON": (b'{"model": "vila-tiny", "messages": [', 400),
        "no object": (b"[]", 400),
        "no text": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        "unknown model": (chat("?", image, model="gpt"), 404),
        "too many answers": (chat("?", image, n=100_000, temperature=1), 400),
        "another role": ({"messages": [{"role": "assistant", "content": "2"}]}, 400),
        "name of an image": (named_image(image), 400),
        "name in the place of an image": (named_image(None), 400),
        "continuation of an answer": (chat("?", image, continue_final_message=True, add_generation_prompt=False), 400),
    }


@pytest.mark.parametrize("wrong", bad_requests())
def test_bad_request_is_refused_with_one_clear_answer(server: Served, wrong: str):
    body, expected_status = bad_requests()[wrong]
    status, text = server.request("/v1/chat/completions", body)
    assert status == expected_status, text
    error = json.loads(text)["error"]
    assert error["code"] == expected_status and error["message"] and "Traceback" not in text


def test_image_of_a_refused_request_can_be_asked_about(server: Served):
    body = chat("Is there a star?", data_url(png(Image.new("RGB", (64, 64), "teal"))))
    statuses = [server.request("/v1/chat/completions", {**body, **more})[0] for more in ({"bad_words": [""]}, {})]
    assert statuses == [400, 200]


def test_log_probabilities_of_a_prompt_with_an_image_do_not_end_the_engine(server: Served):
    image = data_url((EXAMPLES_DIR / "a.png").read_bytes())
    status, text = server.request("/v1/chat/completions", chat("?", image, prompt_logprobs=2))
    assert status == 200 and len(json.loads(text)["prompt_logprobs"]) > 16


async def send(client: Any, body: Any) -> tuple[int, Any]:
    """POST a body, whose length is not declared if it is large -> status, JSON of the answer."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = pieces() if isinstance(body, bytes) and len(body) > 1 << 20 else content
    response = await client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    return response.status_code, response.json()


async def go_away(client: Any) -> None:
    """Ask for a long answer and leave after its first tokens."""
    body = chat(
        "How many shapes are there?", data_url((EXAMPLES_DIR / "b.png").read_bytes()), **ANY_LENGTH, stream=True
    )
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        await anext(response.aiter_bytes())


def run_round(server: Served, questions: Sequence[EvalQuestion], expected: Sequence[list[int]], seed: int) -> None:
    """Send good and bad requests at once, in random order, and check every answer."""
    import httpx

    rng = random.Random(seed)
    bad = list(bad_requests().values())
    numbers = [*(rng.randrange(len(questions)) for _ in range(NUM_REQUESTS - NUM_BAD)), *range(-1, -NUM_BAD - 1, -1)]
    rng.shuffle(numbers)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        if number >= 0:
            question = questions[number]
            body = chat(question.qa.question, *map(data_url, map(png, question.images)), return_token_ids=True)
            status, answer = await send(client, body)
            assert status == 200, answer
            assert answer["choices"][0]["token_ids"] == expected[number], question.qa.question
        elif number % 4 == 0:
            await go_away(client)
        else:
            body, expected_status = bad[number]
            status, answer = await send(client, body)
            assert status == expected_status == answer["error"]["code"], answer

    async def all_at_once() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(one(client, number) for number in numbers))

    asyncio.run(all_at_once())


def wait_until_idle(server: Served) -> None:
    """Wait until vLLM counts no request; its numbers are those of its last step, so one request is sent first."""
    end = time.monotonic() + 60
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(values := [server.gauge(name) for name in names]):
        assert time.monotonic() < end, dict(zip(names, values))
        server.request("/v1/chat/completions", chat("?", max_tokens=1))
        time.sleep(0.2)


def test_200_requests_at_once_of_which_some_are_bad(server: Served, questions: Any, expected: Any):
    for seed in range(2):
        run_round(server, questions, expected, seed)
    wait_until_idle(server)
    before = server.resident_bytes()
    run_round(server, questions, expected, seed=2)
    wait_until_idle(server)
    grown = server.resident_bytes() - before
    print(f"memory: {before / 2**20:.0f} MiB, {grown / 2**20:+.1f} MiB after a round of {NUM_REQUESTS} requests")
    assert grown < MEMORY_BOUND
    test_question_with_an_image_is_answered(server)


def test_ctrl_c_ends_it(server: Served):
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal sends it to all
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()
    end = time.monotonic() + 10
    while server.processes():
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.1)
