"""The book's own Sphinx extensions, without Sphinx, and the printing script. `paper_numbers` is seen in every page."""

import importlib.util
import re
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


def test_scripts_wait_for_the_page_but_for_the_search_page():
    own = SimpleNamespace(filename="_static/interactive.js", attributes={})
    options = SimpleNamespace(filename="_static/documentation_options.js", attributes={})
    within = SimpleNamespace(filename=None, attributes={"body": "let a = 1"})
    scripts = {"script_files": [own, options, within]}
    for page, deferred in (("book/setup", True), ("search", False), ("book/cifar", True)):
        load("first_paint").defer(None, page, "page.html", scripts, None)
        assert [bool(script.attributes.get("defer")) for script in scripts["script_files"]] == [deferred, False, False]


def test_only_the_search_page_loads_the_index_and_none_the_icon_script(tmp_path):
    names = ("scripts/fontawesome.js?digest=1", "searchtools.js", "language_data.js?v=2", "a11y.js")
    text = "<head>" + "".join(f'\n<script defer src="../_static/{name}"></script>' for name in names) + "\n</head>"
    text = text.replace("</head>", '<script src="../searchindex.js"></script></head>')
    for page in ("chapter.html", "search.html"):
        (tmp_path / page).write_text(text)
    first_paint = load("first_paint")
    first_paint.drop_unused(SimpleNamespace(outdir=tmp_path), ValueError())
    assert (tmp_path / "chapter.html").read_text() == text
    first_paint.drop_unused(SimpleNamespace(outdir=tmp_path), None)
    scripts = {p.stem: re.findall(r"(\w+)\.js", p.read_text()) for p in tmp_path.glob("*.html")}
    assert scripts == {"chapter": ["a11y"], "search": ["searchtools", "language_data", "a11y", "searchindex"]}


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
