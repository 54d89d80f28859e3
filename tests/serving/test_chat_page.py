"""The chat page in Chromium, before a server whose answers each test writes: `pytest -m "browser and not vllm"`."""

import re
import threading
import time
from collections.abc import Callable

import pytest
from chat_page import ask, choose, hand_over, settled, user
from chromium import KEYS, Chromium
from scripted_server import Reply, ScriptedServer, answer, endless

from vila_triton.tiny.examples import EXAMPLES_DIR

pytestmark = pytest.mark.browser
A, B = (EXAMPLES_DIR / f"{name}.png" for name in "ab")
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"


def test_an_answer_is_shown_while_it_streams(page: Chromium, server: ScriptedServer) -> None:
    go_on = threading.Event()
    times = []

    def reply(to: Reply) -> None:
        to.begin()
        time.sleep(0.3)
        times.append(time.monotonic())
        to.chunk("Größe: ")
        assert go_on.wait(10)
        time.sleep(0.3)
        server.counts = {"linear=aten": 13, "rms_norm=reference": 5, "swiglu=aten": 1, "argmax=aten": 0}
        to.chunk("Fünf €")
        time.sleep(0.1)
        times.append(time.monotonic())
        to.end(tokens=3)

    server.replies.append(reply)
    choose(page, A)
    ask(page, "How large?")
    page.until(lambda: page.text(".answer") == "Größe: ")
    assert page.text("#ask") == "Stop" and page.count("article[aria-busy=true]") == 1
    assert page.count("#attached img") == 0 and page.count("article img") == 1
    go_on.set()
    settled(page)
    assert page.text(".answer") == "Größe: Fünf €" and page.text("#ask") == "Ask"
    measured = re.fullmatch(
        r"first token (0\.\d{3}) s · (\d+\.\d) tokens/s · answer 3 tokens · prompt 27 tokens", page.text(".measured p")
    )
    assert measured and 0.3 <= float(measured[1]) < 0.6
    assert abs(2 / float(measured[2]) - (times[1] - times[0])) < 0.2  # two tokens after the first
    assert page.text("summary") == "kernels: linear=aten, swiglu=aten; else reference"
    page.click("summary")
    calls = ["linear=aten: 10 calls", "rms_norm=reference: 1 call", "swiglu=aten: 1 call"]
    assert page.text("details li").splitlines() == calls
    (request,) = server.requests
    assert request["stream"] and request["stream_options"] == {"include_usage": True}
    assert request["model"] == "tiny" and request["messages"] == [user("How large?", A)]


def test_later_turns_repeat_the_earlier_with_images_where_they_were(page: Chromium, server: ScriptedServer) -> None:
    server.replies += [answer(" ", " t", "w ", "o"), answer("three"), answer("four")]
    choose(page, B, A)
    ask(page, "Which?")
    settled(page, 1)
    ask(page, "And now?")
    settled(page, 2)
    assert page.text(".answer") == "tw o\nthree"
    page.click("#new")
    assert page.count("article") == 0 and "Drop an image" in page.text("#log")
    ask(page, "Again?")
    settled(page, 1)
    assert [request["messages"] for request in server.requests] == [
        [user("Which?", B, A)],
        [user("Which?", B, A), {"role": "assistant", "content": "tw o"}, user("And now?")],
        [user("Again?")],
    ]


@pytest.mark.parametrize("stop", [lambda p: p.click("#ask"), lambda p: p.type("#question", KEYS["Escape"])])
def test_stop_closes_the_connection_and_keeps_what_was_said(
    stop: Callable[[Chromium], None], page: Chromium, server: ScriptedServer
) -> None:
    server.replies += [endless("la "), answer("fine")]
    ask(page, "Sing.")
    page.until(lambda: "la la" in page.text(".answer"))
    stop(page)
    assert server.client_gone.wait(5)
    settled(page)
    sung = page.run("return document.querySelector('.answer').textContent")
    assert page.text("#ask") == "Ask" and page.text(".measured p").startswith("stopped · first token")
    assert page.text("#notice") == ""
    ask(page, "Enough?")
    settled(page, 2)
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": sung}


def test_a_question_stopped_before_its_answer_can_be_edited(page: Chromium, server: ScriptedServer) -> None:
    server.replies += [endless(""), answer("yes")]
    choose(page, A)
    ask(page, "Is this")
    page.until(lambda: server.requests)
    choose(page, B)
    page.type("#question", "blue?")
    page.click("#ask")
    assert server.client_gone.wait(5)
    page.until(lambda: page.count("article") == 0)
    page.type("#question", KEYS["Enter"])
    settled(page)
    assert server.requests[1]["messages"] == [user("Is this\nblue?", A, B)]


@pytest.mark.parametrize("piece", ["la ", ""])
def test_a_new_conversation_ends_the_answer_of_the_old_one(piece: str, page: Chromium, server: ScriptedServer) -> None:
    server.replies += [endless(piece), answer("new")]
    ask(page, "Sing.")
    page.until(lambda: server.requests and piece in page.text(".answer"))
    page.click("#new")
    assert server.client_gone.wait(5) and page.text("#ask") == "Ask"
    ask(page, "Hello?")
    settled(page)
    assert page.text(".answer") == "new" and server.requests[1]["messages"] == [user("Hello?")]


REFUSALS: dict[str, tuple[Callable[[Reply], None], str]] = {
    "bad image": (lambda to: to.say(400, {"error": {"message": "no image"}}), "400: no image"),
    "too large": (lambda to: to.say(413, {"error": {"message": "too large"}}), "413: too large"),
    "busy": (lambda to: to.say(429, {"error": {"message": "busy"}}), "429: busy"),
    "broken": (lambda to: to.say(500, {"error": {"message": "broken"}}), "500: broken"),
    "no key": (lambda to: to.say(401, {"error": "Unauthorized"}), "401: Unauthorized"),
    "detail": (lambda to: to.say(404, {"detail": "Not Found"}), "404: Not Found"),
    "no JSON": (lambda to: to.respond(502, b"Bad gateway", {}), "502: Bad gateway"),
    "nothing": (lambda to: to.respond(503, b"", {}), "503: Service Unavailable"),
    "no answer": (lambda to: to.connection.close(), "The server cannot be reached."),
    "broken stream": (lambda to: to.begin(), "The connection ended before the answer did."),
    "error in the stream": (lambda to: (to.begin(), to.send({"error": {"message": "engine died"}}))[0], "engine died"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_server_refuses_is_said_and_can_be_asked_again(
    name: str, page: Chromium, server: ScriptedServer
) -> None:
    reply, said = REFUSALS[name]
    server.replies += [answer("one"), reply, answer("two")]
    ask(page, "First?")
    settled(page)
    choose(page, A)
    ask(page, "Second?")
    page.until(lambda: page.text("#notice") == said)
    assert page.count("article") == 1 and page.count("#attached img") == 1  # the question stands below again
    page.type("#question", KEYS["Enter"])
    settled(page, 2)
    first = [user("First?"), {"role": "assistant", "content": "one"}]
    assert page.text("#notice") == "" and server.requests[2]["messages"] == [*first, user("Second?", A)]


def test_an_error_amid_an_answer_leaves_what_was_said(page: Chromium, server: ScriptedServer) -> None:
    def reply(to: Reply) -> None:
        to.begin()
        to.chunk("half an ")
        to.send({"error": {"message": "engine died"}})
        while True:  # the page closes the connection
            to.chunk("answer")
            time.sleep(0.02)

    server.replies.append(reply)
    ask(page, "What?")
    settled(page)
    assert page.text(".answer").strip() == "half an" and page.text(".measured p").startswith("broken off")
    assert page.text("#notice") == "engine died" and server.client_gone.wait(5)


def test_a_server_without_counts_of_kernels_is_enough(page: Chromium, server: ScriptedServer) -> None:
    server.counts = None
    server.replies.append(answer("", tokens=1))
    ask(page, "Nothing?")
    page.until(lambda: page.text(".measured p") == "answer 1 token · prompt 27 tokens")
    assert page.count("details:not([hidden])") == 0
    shown = page.run("return getComputedStyle(document.querySelector('.answer'), '::before').content")
    assert shown == '"(no text)"'


def test_words_of_others_are_text(browser: Chromium, server: ScriptedServer) -> None:
    server.models = [HTML]
    browser.open(server.url)
    browser.until(lambda: browser.run("return document.querySelector('#model').value") == HTML)

    def refuse(to: Reply) -> None:
        to.say(400, {"error": {"message": HTML}})

    def reply(to: Reply) -> None:
        server.counts = {f"linear={HTML}": 4}
        answer(HTML[:9], HTML[9:])(to)

    server.replies += [refuse, reply]
    hand_over(browser, "drop", (HTML, "text/plain", 3))
    browser.until(lambda: browser.text("#notice") == f"{HTML} is not an image.")
    hand_over(browser, "drop", (HTML, "image/png", 3))
    browser.until(lambda: browser.count("#attached li") == 1)
    ask(browser, HTML)
    browser.until(lambda: browser.text("#notice") == f"400: {HTML}")
    browser.type("#question", KEYS["Enter"])
    settled(browser)
    assert browser.text(".question") == HTML and browser.text(".answer") == HTML
    assert browser.text("summary") == f"kernels: linear={HTML}"
    assert browser.count("b, script") == 1 and browser.run("return document.title") == "vila-triton"
    assert browser.messages() == []  # nor did the policy have to prevent anything


def test_a_script_that_were_put_in_all_the_same_would_not_run(browser: Chromium, server: ScriptedServer) -> None:
    browser.open(server.url)
    browser.run("document.querySelector('#log').innerHTML = arguments[0]", HTML)
    browser.until(lambda: any("Content Security Policy" in message for message in browser.messages()))
    assert browser.run("return document.title") == "vila-triton"


def test_images_are_pasted_dropped_and_removed(page: Chromium, server: ScriptedServer) -> None:
    server.replies.append(answer("fine"))
    assert hand_over(page, "paste", ("pasted.png", "image/png", 1))
    page.until(lambda: page.count("#attached img") == 1)
    files = (("dropped.jpg", "image/jpeg", 2), ("other.webp", "image/webp", 3))
    assert hand_over(page, "dragover", *files) and page.count("body.dropping") == 1
    assert hand_over(page, "drop", *files) and page.count("body.dropping") == 0
    page.until(lambda: page.count("#attached img") == 3)
    assert not any(hand_over(page, event) for event in ("paste", "dragover", "drop"))  # text is the browser's
    assert page.label("#attached li:nth-child(2) button") == "Remove dropped.jpg"
    page.click("#attached li:nth-child(2) button")
    choose(page, A)
    ask(page, "Well?")
    settled(page)
    *images, _ = server.requests[0]["messages"][0]["content"]
    urls = [image["image_url"]["url"] for image in images]
    assert urls[:2] == ["data:image/png;base64,AA==", "data:image/webp;base64,AAAA"] and len(urls) == 3


def test_a_file_that_is_too_large_or_no_image_is_refused(page: Chromium, server: ScriptedServer) -> None:
    most = 16 * 2**20
    files = (("huge.png", "image/png", most + 2**19), ("notes.txt", "text/plain", 4), ("large.png", "image/png", most))
    hand_over(page, "drop", *files)
    page.until(lambda: page.count("#attached img") == 1)
    refused = "huge.png has 16.5 MiB; an image may have 16.0 MiB. notes.txt is not an image."
    page.until(lambda: page.text("#notice") == refused)
    assert page.label("#attached button") == "Remove large.png"
    assert "/v1/chat/completions" not in server.paths


def test_keys(page: Chromium, server: ScriptedServer) -> None:
    server.replies.append(answer("fine"))
    page.type("#question", KEYS["Enter"])  # nothing to ask
    page.type("#question", "half")
    page.run(  # Enter that takes a word of an input method
        "const enter = {key: 'Enter', isComposing: true, bubbles: true};"
        "document.querySelector('#question').dispatchEvent(new KeyboardEvent('keydown', enter))"
    )
    page.type("#question", "-")
    page.type("#question", f"one{KEYS['Shift']}{KEYS['Enter']}{KEYS['release']}two{KEYS['Enter']}")
    settled(page)
    assert server.requests == [{**server.requests[0], "messages": [user("half-one\ntwo")]}]
    assert page.run("return document.activeElement.id") == "question"


def test_a_server_that_lists_no_models_says_why_and_is_asked_again(browser: Chromium, server: ScriptedServer) -> None:
    models, server.models = server.models, None
    browser.open(server.url)
    browser.until(lambda: browser.text("#notice") == "503: starting")
    server.models = models
    server.replies.append(answer("fine"))
    ask(browser, "Ready?")
    settled(browser)
    assert server.requests[0]["model"] == "tiny"
