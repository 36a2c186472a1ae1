"""How heavy each page of the book is, and how soon a reader on a slow line sees its first words.

    python benchmarks/pages.py [--mbit 1.6] [--delay 150] [--repeats 3]

The pages are those of the last `make book`, served from this machine as hosts of static pages do, text compressed by
gzip, and opened in Chromium with an empty cache, one at a time, through a line that the browser itself slows down to so
many Mbit/s and so many milliseconds a request. First paint is the browser's first contentful paint, the median of the
repeats. A page's own weight is its text with its images, uncompressed; style sheets, scripts and fonts are shared by
all pages, and the visit counts them too, as far as they are fetched before the formulas stand. Needs Chromium; written
to results/benchmarks/pages.json.
"""

import argparse
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
TEXT = {".html", ".css", ".js", ".svg"}
SET = "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))"
PAINT = "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]"


@functools.cache
def compressed(path: Path) -> bytes:
    """A file as it travels."""
    return gzip.compress(path.read_bytes(), 6)


class Server(http.server.SimpleHTTPRequestHandler):
    """Keeps connections open and compresses text, as every server of pages does, and says nothing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file."""
        path = Path(self.translate_path(self.path))
        if path.suffix not in TEXT or not path.is_file():
            super().do_GET()
            return
        body = compressed(path)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No line for each request."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder while it is served on the loopback."""
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def own_bytes(page: Path) -> int:
    """Bytes of a page and of its images."""
    text = page.read_text(encoding="utf-8")
    images = {page.parent / unquote(link) for link in re.findall(r'src="([^":]*_images/[^"]+)"', text)}
    return len(text.encode()) + sum(image.stat().st_size for image in images)


def visit(browser: Browser, address: str, mbit: float, delay: float) -> tuple[float, int]:
    """Open a page with an empty cache through a slow line: milliseconds to its first paint, bytes that came."""
    context = browser.new_context(viewport={"width": 375, "height": 800})
    page = context.new_page()
    page.set_default_timeout(300_000)
    line = context.new_cdp_session(page)
    line.send("Network.enable")
    rate = mbit * 1e6 / 8
    line.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": delay, "downloadThroughput": rate, "uploadThroughput": rate},
    )
    received: list[int] = []
    line.on("Network.loadingFinished", lambda event: received.append(int(event["encodedDataLength"])))
    page.goto(address)
    page.wait_for_function(SET)
    paint = page.evaluate(PAINT)
    context.close()
    return paint, sum(received)


def main() -> int:
    """Measure every page, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=1.6, help="rate of the line, Mbit/s")
    parser.add_argument("--delay", type=float, default=150.0, help="of each request, ms")
    parser.add_argument("--repeats", type=int, default=3, help="visits of each page")
    options = parser.parse_args()
    pages = sorted((HTML / "book").glob("*.html"))
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not pages or not chromium:
        sys.stderr.write("needs the built pages (`make book`) and Chromium (Debian: apt install chromium)\n")
        return 2
    load, rows = os.getloadavg()[0], []
    print(f"{'page':<14}{'own kB':>8}{'visit kB':>10}{'first paint, s':>16}")
    with sync_playwright() as playwright, served(HTML) as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for page in pages:
            visits = [
                visit(browser, f"{address}/book/{page.name}", options.mbit, options.delay)
                for _ in range(options.repeats)
            ]
            rows.append(
                {
                    "page": page.stem,
                    "own_bytes": own_bytes(page),
                    "visit_bytes": max(received for _, received in visits),
                    "first_paint_ms": round(statistics.median(paint for paint, _ in visits)),
                }
            )
            row = rows[-1]
            print(
                f"{row['page']:<14}{row['own_bytes'] / 1e3:>8.0f}{row['visit_bytes'] / 1e3:>10.0f}"
                f"{row['first_paint_ms'] / 1e3:>16.1f}",
                flush=True,
            )
        record = {
            **vars(options),
            "viewport": [375, 800],
            "chromium": browser.version,
            "cores": os.cpu_count(),
            "load_before": round(load, 1),
            "pages": rows,
        }
        browser.close()
    target = ROOT / "results" / "benchmarks" / "pages.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
