"""A browser, a scripted server and its chat page."""

from collections.abc import Iterator

import pytest
from chromium import Chromium, chromium
from scripted_server import ScriptedServer, scripted_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def page(browser: Chromium, server: ScriptedServer) -> Iterator[Chromium]:
    """The page, loaded. Afterwards its console holds no error, and it has asked for nothing but what it may."""
    browser.open(server.url)
    browser.until(lambda: browser.run("return document.querySelector('#model').value"))
    yield browser
    assert browser.messages() == []
    assert {*server.paths} <= {"/", "/v1/models", "/v1/chat/completions", "/kernels"}
    loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(url.startswith((server.url, "data:")) for url in loaded)
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    browser.devtools("Emulation.setEmulatedMedia", features=[])
