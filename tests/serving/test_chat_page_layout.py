"""The chat page for every reader: names of controls, light and dark, on a phone, the end of a long answer in view."""

import threading
from itertools import combinations

import pytest
from chat_page import ask, choose, settled
from chromium import Chromium
from scripted_server import Reply, ScriptedServer, answer

from vila_triton.tiny.examples import EXAMPLES_DIR

pytestmark = pytest.mark.browser
A, B = (EXAMPLES_DIR / f"{name}.png" for name in "ab")


def test_every_control_has_a_name(page: Chromium) -> None:
    names = {css: page.label(css) for css in ("#model", "#new", "#log", "#files", "#question", "#ask")}
    assert names == {
        "#model": "Model",
        "#new": "New conversation",
        "#log": "Conversation",
        "#files": "Add images",
        "#question": "Question",
        "#ask": "Ask",
    }
    assert page.count("button, input, select, textarea, [tabindex]") == len(names)


def test_the_end_of_an_answer_stays_in_view_unless_its_reader_scrolled_away(
    page: Chromium, server: ScriptedServer
) -> None:
    steps = [threading.Event(), threading.Event()]

    def reply(to: Reply) -> None:
        to.begin()
        to.chunk("line\n" * 60)
        for i, step in enumerate(steps):
            assert step.wait(10)
            to.chunk(f"part {i}\n" * 60)
        to.end()

    server.replies.append(reply)
    ask(page, "Long?")
    below = "const log = document.querySelector('#log'); return log.scrollHeight - log.scrollTop - log.clientHeight"
    page.until(lambda: "line" in page.text(".answer") and page.run(below) < 2)
    steps[0].set()
    page.until(lambda: "part 0" in page.text(".answer") and page.run(below) < 2)
    page.run("document.querySelector('#log').scrollTop = 30")
    steps[1].set()
    settled(page)
    assert page.run("return document.querySelector('#log').scrollTop") == 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_in_light_and_dark_on_a_phone(scheme: str, page: Chromium, server: ScriptedServer) -> None:
    page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    server.models = ["a-model-with-a-name-that-is-far-longer-than-a-phone-is-wide"]
    page.open(server.url)
    server.replies += [answer("wide" * 100), lambda to: to.say(400, {"error": {"message": "e" * 200}})]
    choose(page, A, B)
    ask(page, "W" * 100)
    settled(page)
    choose(page, B)
    ask(page, "Why?")
    page.until(lambda: page.text("#notice"))
    assert page.run("return document.documentElement.scrollWidth") == 360
    assert page.run("return document.querySelector('#log').scrollWidth") <= 360
    boxes = page.run(BOXES, ["h1", "label", "#new", "#log", "#notice", "#attached", ".button", "#question", "#ask"])
    assert all(0 <= left < right <= 360 and 0 <= top < bottom <= 640 for left, top, right, bottom in boxes)
    assert not [
        (a, b) for a, b in combinations(boxes, 2) if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]  # no two overlap
    contrasts = page.run(CONTRASTS, ["h1", "#new", "#ask", "#notice", ".question", ".answer", ".measured p", "small"])
    assert min(contrasts.values()) >= 4.5, contrasts  # WCAG 2.2, level AA
    dark = page.run("return matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")


BOXES = """
return arguments[0].map(css => document.querySelector(css).getBoundingClientRect())
    .map(box => [box.left, box.top, box.right, box.bottom]);
"""
CONTRASTS = """  // of the text of elements to what lies behind it, by WCAG's formula
const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const luminance = color => {
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
};
return Object.fromEntries(arguments[0].map(css => {
    const element = document.querySelector(css);
    const pair = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
    return [css, (pair[0] + 0.05) / (pair[1] + 0.05)];
}));
"""
