"""A page in headless Chromium, driven through Debian's chromedriver (WebDriver: https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of a reference to an element, by the protocol
OPTIONS = ("--headless", "--no-sandbox", "--disable-background-networking", "--window-size=900,780")
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "release": "\ue000"}  # `release` lets go of Shift


class Chromium:
    """One tab. Elements are named by CSS selectors, of which the first match counts."""

    def __init__(self, driver: str) -> None:
        """Open a session with the driver at an address; raise AssertionError with what it says if it cannot."""
        self.session = driver  # from here on, the address of commands
        options = {"goog:chromeOptions": {"args": OPTIONS}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session += "/session/" + self.command("/session", capabilities={"alwaysMatch": options})["sessionId"]

    def command(self, path: str, method: str = "POST", **body: Any) -> Any:
        """The value that a command of the protocol returns."""
        url = self.session + path
        data = json.dumps(body).encode() if method == "POST" else None
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from None

    def open(self, url: str) -> None:
        """Go to an address and wait until the page is loaded."""
        self.command("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function body of JavaScript, which gets `arguments`; a promise is waited for."""
        return self.command("/execute/sync", script=script, args=arguments)

    def element(self, css: str) -> str:
        """The path of the element in the protocol."""
        return "/element/" + self.command("/element", using="css selector", value=css)[ELEMENT]

    def click(self, css: str) -> None:
        """Click on an element, which must be in view and under no other."""
        self.command(self.element(css) + "/click")

    def type(self, css: str, text: str) -> None:
        """Type into an element, or give a file input the paths of files, one a line."""
        self.command(self.element(css) + "/value", text=text)

    def label(self, css: str) -> str:
        """The name of an element that assistive technology reads."""
        return self.command(self.element(css) + "/computedlabel", "GET")

    def text(self, css: str) -> str:
        """The text of all matches as it is shown, each on a line of its own."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", css)

    def count(self, css: str) -> int:
        """The number of matches."""
        return self.run("return document.querySelectorAll(arguments[0]).length", css)

    def devtools(self, method: str, **params: Any) -> Any:
        """The result of a command of the Chrome DevTools protocol."""
        return self.command("/goog/cdp/execute", cmd=method, params=params)

    def screenshot(self) -> bytes:
        """The window as a PNG file."""
        return base64.b64decode(self.command("/screenshot", "GET"))

    def messages(self) -> list[str]:
        """Entries of the console since the last call, but for requests that were refused."""
        log = self.command("/se/log", type="browser")
        return [entry["message"] for entry in log if entry["source"] != "network"]

    def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        """The first true value of a condition; raise AssertionError with the page's text after so many seconds."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"not within {seconds} s; the page shows:\n{self.text('body')}"
            time.sleep(0.02)
        return value


@contextmanager
def chromium() -> Iterator[Chromium]:
    """A browser of its own, without cookies and cache; a test without Chromium fails."""
    program = shutil.which("chromedriver")
    if program is None or shutil.which("chromium") is None:
        pytest.fail("the chat page is tested in Chromium: apt-get install chromium chromium-driver", pytrace=False)
    process = subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = next(match[1] for line in process.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        browser = Chromium(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.command("", "DELETE")
    finally:
        process.terminate()
        process.wait()
