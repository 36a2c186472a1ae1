"""The book's own Sphinx extensions, without Sphinx, and the printing script. `paper_numbers` is seen in every page."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("address", "left"), [("", {}), ("https://example.org/book", {"binderhub_url": "x"})])
def test_launch_buttons_need_an_address(address, left):
    config = SimpleNamespace(html_theme_options={"repository_url": address, "launch_buttons": {"binderhub_url": "x"}})
    load("buttons").need_an_address(None, config)
    assert config.html_theme_options["launch_buttons"] == left


@pytest.mark.parametrize(
    ("page", "doctree", "offered"),
    [("book/chapter", True, True), ("book/notation", True, False), ("search", None, False), ("chapter", None, False)],
)
def test_a_chapter_offers_its_notebook_and_no_other_page_does(tmp_path, page, doctree, offered):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "chapter.ipynb").write_text("{}")
    context = {}
    app = SimpleNamespace(srcdir=tmp_path, outdir=tmp_path / "html")
    load("buttons").offer_notebook(app, page, "page.html", context, doctree)
    assert context == ({"ipynb_source": f"{page}.ipynb"} if offered else {})
    assert (tmp_path / "html" / "_sources" / f"{page}.ipynb").exists() == offered


def test_the_notebook_is_there_before_the_theme_draws_its_button():
    events = {}
    app = SimpleNamespace(connect=lambda event, _, priority=500: events.update({event: priority}))
    load("buttons").setup(app)
    assert events["html-page-context"] < 501


@pytest.mark.parametrize(("own", "expected"), [(None, {"a": 1, "b": 2}), ({"b": 3}, {"a": 1, "b": 3})])
def test_the_one_page_builder_renders_what_the_page_builder_renders(own, expected):
    handlers = {"html": {"a": 1, "b": 2}} | ({} if own is None else {"singlehtml": own})
    app = SimpleNamespace(registry=SimpleNamespace(translation_handlers=handlers))
    load("one_page").share_handlers(app)
    assert handlers["singlehtml"] == expected
    assert handlers["html"] == {"a": 1, "b": 2}


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The printing script over a book of one page with a chapter and two links."""
    module = load("paper")
    built = tmp_path / "singlehtml" / "book" / "intro.html"
    built.parent.mkdir(parents=True)
    built.write_text(
        '<p><a href="book/intro.html#there">a chapter</a> <a href="https://example.org/book/intro.html#x">else</a></p>'
        '<h1 id="there">There</h1>'
    )
    monkeypatch.setattr(module, "BUILD", tmp_path)
    return module


def test_links_stay_inside_the_printed_book(paper):
    page = paper.one_page()
    assert page == paper.BUILD / "singlehtml" / "book.html"
    text = page.read_text()
    assert '<a href="#there">' in text
    assert '<a href="https://example.org/book/intro.html#x">' in text


def test_without_chromium_printing_says_what_is_missing(paper, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "chromium" in paper.main()


@pytest.mark.browser
def test_the_book_is_printed_with_its_links(paper):
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    assert paper.main() is None
    printed = (paper.BUILD / "book.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert b"https://example.org/book/intro.html#x" in printed
    assert b"/there" in printed  # the place that the other link leads to
