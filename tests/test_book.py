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
from axe_playwright_python.sync_playwright import Axe

HTML = Path(__file__).resolve().parents[1] / "_build" / "html"
PAGES = sorted(path.stem for path in (HTML / "book").glob("*.html"))
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DESKTOP = {"width": 1280, "height": 900}

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


@pytest.fixture(scope="module")
def visit(browser, site):
    """Open a page once, and record what it asks for and complains about; anything beyond the site is refused."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light")

    @functools.cache
    def visit(name):
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
        page.goto(f"{site}/{name}")
        page.wait_for_function(
            "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))", timeout=60_000
        )
        return page

    yield visit
    context.close()


@pytest.fixture(params=PAGES)
def page(request, visit):
    """A chapter, as a reader with a wide window in a light room sees it first."""
    page = visit(f"book/{request.param}.html")
    yield page
    page.set_viewport_size(DESKTOP)
    page.emulate_media(color_scheme="light")


def test_page_needs_no_network_and_renders_its_formulas(page):
    assert page.outside == []
    assert page.faults == []
    assert page.locator("mjx-merror").count() == 0
    assert page.evaluate("document.body.innerText").count("\\(") == 0


def test_page_fits_a_phone(page):
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(page, scheme):
    page.add_style_tag(content="* { transition: none !important }")  # a colour half-way between themes is neither's
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
    # A formula is thousands of elements in the ink of the text around it; MathJax writes MathML for screen readers.
    context = {"exclude": [["mjx-container"]]}
    found = Axe().run(page, context, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [
        (violation["id"], [node["html"][:200] for node in violation["nodes"][:3]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_every_picture_has_words(page):
    silent = page.evaluate(
        """[...document.querySelectorAll('article svg[role=img], article img')]
           .filter(e => !((e.getAttribute('aria-label') || e.getAttribute('alt') || '').includes(' ')))
           .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert silent == []


def test_sliders_follow_the_keyboard_and_the_mouse(page):
    for picture in page.locator("[data-interactive]").all():
        words = picture.locator("output")
        for slider in picture.locator("input").all():
            before, drawn = words.inner_text(), picture.locator("svg").inner_html()
            slider.focus()
            at_end = slider.input_value() == slider.get_attribute("max")
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            assert words.inner_text() != before
            assert picture.locator("svg").inner_html() != drawn
            assert slider.get_attribute("aria-valuetext") == words.inner_text()
            for end, share in (("min", 0.01), ("max", 0.99)):
                box = slider.bounding_box()
                slider.click(position={"x": share * box["width"], "y": box["height"] / 2})
                assert slider.input_value() == slider.get_attribute(end)


def test_search_finds_a_term(visit):
    page = visit("search.html?q=polar+factorisation")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert any("weight_decay" in a.get_attribute("href") for a in page.locator("#search-results li a").all())


def test_no_page_is_heavy():
    """A page with all that belongs to it alone weighs at most 1 MB; style sheets, scripts and fonts are shared."""
    weights = {}
    for name in PAGES:
        text = (HTML / "book" / f"{name}.html").read_text(encoding="utf-8")
        images = {HTML / "book" / unquote(link) for link in re.findall(r'src="([^":]*_images/[^"]+)"', text)}
        weights[name] = len(text.encode()) + sum(image.stat().st_size for image in images)
    assert {name: size for name, size in weights.items() if size > 1e6} == {}


@pytest.mark.parametrize("name", PAGES)
def test_first_words_wait_for_style_sheets_alone(name):
    """No script stops the browser before the text, but for the few options that a line of the page adds to."""
    text = (HTML / "book" / f"{name}.html").read_text(encoding="utf-8")
    assert "fontawesome.js" not in text
    blocking = re.findall(r'<script(?![^>]*\bdefer\b)[^>]*\bsrc="([^"?]+)', text)
    assert [Path(script).name for script in blocking] == ["documentation_options.js"]


def test_icons_are_drawn(page):
    drawn = page.evaluate(
        """[...document.querySelectorAll('.fa-solid')].map(e => getComputedStyle(e, '::before').content)"""
    )
    assert drawn
    assert "none" not in drawn
    assert page.evaluate("document.fonts.check('900 16px \"Font Awesome 6 Free\"')")


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
