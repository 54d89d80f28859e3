"""Images of requests come from the request, and from elsewhere only where the operator allows it."""

import asyncio
import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vila_triton.images.processing import open_image
from vila_triton.tiny.examples import EXAMPLES_DIR
from vila_triton.vllm_plugin.server import VLLM_SETTINGS

pytestmark = pytest.mark.vllm
IMAGE = EXAMPLES_DIR / "a.png"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """load(url, **what the operator allows): an image as a server of ours loads it, in both ways of vLLM."""
    from vila_triton.vllm_plugin.media import ImageSource

    for name, value in VLLM_SETTINGS.items():
        monkeypatch.setenv(name, value)

    def load_image(url: str, **allowed: Any) -> Any:
        source = ImageSource(**allowed)
        images = [source.fetch_image(url), asyncio.run(source.fetch_image_async(url))]
        assert images[0].media.tobytes() == images[1].media.tobytes()
        return images[0].media

    return load_image


def refused(load: Any, url: str, message: str, **allowed: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        load(url, **allowed)


@pytest.fixture
def web() -> Iterator[str]:
    """The address of a server at 127.0.0.1 with /a.png, with /moved, which leads there, and with nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {"/a.png": 200, "/moved": 302}.get(self.path, 404)
            self.send_response(found)
            if found == 302:
                self.send_header("location", "/a.png")
            self.end_headers()
            self.wfile.write(IMAGE.read_bytes() if found == 200 else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_image_in_the_request_is_opened_as_its_file_is(load: Any):
    image = load("data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode())
    assert image.tobytes() == open_image(IMAGE).tobytes()


def test_addresses_in_the_web_are_fetched_from_allowed_domains_alone(load: Any, web: str):
    refused(load, f"{web}/a.png", "'http' are not allowed here")
    refused(load, f"{web}/a.png", "allowed domains", allowed_media_domains=["example.org"])
    refused(
        load, f"{web.replace('//', '//example.org@')}/a.png", "allowed domains", allowed_media_domains=["example.org"]
    )
    image = load(f"{web}/a.png", allowed_media_domains=["127.0.0.1"])
    assert image.tobytes() == open_image(IMAGE).tobytes()


def test_redirects_are_not_followed(load: Any, web: str):
    refused(load, f"{web}/moved", "no image", allowed_media_domains=["127.0.0.1"])
    refused(load, f"{web}/none", "404", allowed_media_domains=["127.0.0.1"])


def test_files_are_read_from_an_allowed_folder_alone(load: Any, tmp_path: Path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    inside.mkdir()
    for path in (inside / "a.png", outside):
        path.write_bytes(IMAGE.read_bytes())
    (inside / "link.png").symlink_to(outside)
    refused(load, f"file://{inside}/a.png", "'file' are not allowed here")
    refused(load, str(inside / "a.png"), "not allowed here")
    for path in (outside, f"{inside}/../outside.png", f"{inside}/%2e%2e/outside.png", f"{inside}/link.png"):
        refused(load, f"file://{path}", "must be a subpath", allowed_local_media_path=str(inside))
    image = load(f"file://{inside}/a.png", allowed_local_media_path=str(inside))
    assert image.tobytes() == open_image(IMAGE).tobytes()


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,", "data:image/png,text", "data:x", "ftp://host/a", "a", "data:;base64,é"]
)
def test_other_urls_are_refused(load: Any, url: str):
    refused(load, url, "The image cannot be read")
