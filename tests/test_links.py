"""The checker of external links, against a server of this machine."""

import http.server
import importlib.util
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def links():
    spec = importlib.util.spec_from_file_location("links", ROOT / "book" / "_ext" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers /404 with 404, and so on."""

    def do_GET(self):
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def book(links, server, tmp_path, monkeypatch):
    """A book of one page, whose links the server answers with 200, 404 and 403, and a README with one."""
    page = tmp_path / "_build" / "html" / "book" / "page.html"
    page.parent.mkdir(parents=True)
    page.write_text("".join(f'<a class="x" href="{server}/{code}#part">x</a>' for code in (200, 404, 403)))
    (tmp_path / "README.md").write_text(f"[x]({server}/404) and [here](#there)")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    return tmp_path


def test_a_dead_link_is_named_with_its_pages(links, book, server, capsys):
    assert links.main() == 1
    assert capsys.readouterr().out == f"404: {server}/404 in page.html, README.md\n3 links, 1 dead\n"


def test_links_that_answer_are_no_news(links, book, server, capsys):
    for path in (book / "README.md", book / "_build" / "html" / "book" / "page.html"):
        path.write_text(path.read_text().replace("/404", "/200"))
    assert links.main() == 0
    assert capsys.readouterr().out == "2 links, 0 dead\n"


def test_without_a_network_one_line_says_so(links, book, server, capsys):
    for path in (book / "README.md", book / "_build" / "html" / "book" / "page.html"):
        path.write_text(path.read_text().replace(server, "http://name.invalid"))
    assert links.main() == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("none of 3 addresses answers")


def test_without_a_built_book_one_line_says_so(links, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert links.main() == 2
    assert "make book" in capsys.readouterr().err


def test_the_links_of_this_repository_are_found(links):
    assert "https://arxiv.org/abs/2102.09235" in links.addresses(ROOT)
