"""The rendered book, opened in the system's Chromium with the network cut off. `make book` must have run."""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

HTML = Path(__file__).resolve().parents[1] / "_build" / "html"
PAGES = sorted(path.stem for path in (HTML / "book").glob("*.html"))
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = pytest.mark.browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """The folder of the book, served on the loopback address."""
    if not PAGES:
        pytest.fail("no rendered book under _build/html; run `make book` first")
    handler = functools.partial(Quiet, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have Chromium: the book's pages are part of the product")
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """Open a page and record what it asks for and complains about; anything beyond the site is refused."""
    contexts = []

    def visit(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.outside, page.faults = [], []

        def route(call):
            if call.request.url.startswith(site):
                call.continue_()
            else:
                page.outside.append(call.request.url)
                call.abort()

        page.route("**/*", route)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda line: page.faults.append(line.text) if line.type == "error" else None)
        page.on(
            "response",
            lambda answer: page.faults.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None,
        )
        page.goto(f"{site}/book/{name}.html")
        page.wait_for_function(
            "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))", timeout=30_000
        )
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_needs_no_network_and_renders_its_formulas(visit, name):
    page = visit(name)
    assert page.outside == []
    assert page.faults == []
    assert page.locator("mjx-merror").count() == 0
    assert page.evaluate("document.body.innerText").count("\\(") == 0


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(visit, name):
    page = visit(name, width=375)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_words(visit, name):
    page = visit(name)
    silent = page.evaluate(
        """[...document.querySelectorAll('article svg[role=img], article img')]
           .filter(e => !((e.getAttribute('aria-label') || e.getAttribute('alt') || '').includes(' ')))
           .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert silent == []


@pytest.mark.parametrize("name", PAGES)
def test_sliders_follow_the_keyboard(visit, name):
    page = visit(name)
    for picture in page.locator("[data-interactive]").all():
        slider, words = picture.locator("input"), picture.locator("output")
        before, drawn = words.inner_text(), picture.locator("svg").inner_html()
        slider.focus()
        at_end = slider.input_value() == slider.get_attribute("max")
        page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        assert words.inner_text() != before
        assert picture.locator("svg").inner_html() != drawn
        assert slider.get_attribute("aria-valuetext") == words.inner_text()


def test_internal_links_lead_somewhere():
    """Every relative link of every page names a file of the book, and an anchor that the file has."""
    texts = {path: path.read_text(encoding="utf-8") for path in HTML.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    broken = []
    for path, text in texts.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            target, anchor = urldefrag(urljoin(path.as_uri(), link))
            file = Path(unquote(target.removeprefix("file://")))
            if not file.exists() or (anchor and file in anchors and unquote(anchor) not in anchors[file]):
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_no_page_loads_anything_from_elsewhere():
    """No src, and no href of a style sheet, leaves the book, also on pages that no test opens."""
    for path in HTML.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text) == []
