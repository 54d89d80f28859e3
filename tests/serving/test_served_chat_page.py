"""The chat page of `vila-triton serve` in Chromium: `pytest -m "browser and vllm"`, which draws its screenshot anew."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_page import ask, choose, hand_over, settled
from chromium import KEYS, Chromium

from vila_triton.tiny.examples import EXAMPLES_DIR

pytestmark = [pytest.mark.browser, pytest.mark.vllm]
ROOT = Path(__file__).resolve().parents[2]
SCREENSHOT = ROOT / "vila_triton" / "vllm_plugin" / "chat.png"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the bundled model."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vila_triton", "serve", "--port", "0"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (address := re.search(r"(http://\S+) answers for vila-tiny", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address[1]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(browser: Chromium, url: str) -> Chromium:
    browser.open(url)
    browser.until(lambda: browser.run("return document.querySelector('#model').value") == "vila-tiny")
    return browser


def test_a_question_about_an_image_is_answered(page: Chromium) -> None:
    page.command("/window/rect", width=900, height=700)
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    choose(page, EXAMPLES_DIR / "a.png")
    ask(page, "How many blue shapes are there?")
    settled(page, seconds=60)
    assert page.text(".answer") == "2"
    measured = r"first token \d+\.\d{3} s · \d+\.\d tokens/s · answer 2 tokens · prompt 27 tokens"
    assert re.fullmatch(measured, page.text(".measured p"))
    kernels = page.text("summary")
    assert re.fullmatch(r"kernels: .*decode_attention=aten, .*linear=aten, .*; else reference", kernels)
    assert page.messages() == []
    screenshot = page.screenshot()
    assert len(screenshot) < 100 * 1024
    SCREENSHOT.write_bytes(screenshot)

    page.click("#new")
    choose(page, EXAMPLES_DIR / "b.png")
    ask(page, "How many stars are there?")
    settled(page, seconds=60)
    assert page.text(".answer") == "3"


def test_what_the_server_refuses_is_said(page: Chromium) -> None:
    hand_over(page, "drop", ("broken.png", "image/png", 100))
    ask(page, "What is this?")
    page.until(lambda: page.text("#notice").startswith("400: "), seconds=60)
    assert "image" in page.text("#notice")
    page.click("#attached button")
    hand_over(page, "drop", ("large.png", "image/png", 2**24), ("other.png", "image/png", 2**24))
    page.until(lambda: page.count("#attached img") == 2)
    page.type("#question", KEYS["Enter"])
    page.until(lambda: page.text("#notice").startswith("413: "), seconds=60)
    assert "32 MiB" in page.text("#notice")
