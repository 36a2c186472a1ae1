"""Print the book that `make pdf` has built as one page: every formula set, every link inside the file working."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BUILD = Path(__file__).resolve().parents[2] / "_build"
SET = "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))"
FOOTER = '<div style="width: 100%; text-align: center; font-size: 8px"><span class="pageNumber"></span></div>'


def one_page() -> Path:
    """The book as a page that stands where its style sheets and its links expect it to."""
    (built,) = (BUILD / "singlehtml" / "book").glob("*.html")
    page = built.parents[1] / "book.html"
    text = built.read_text(encoding="utf-8")
    page.write_text(text.replace(f'href="book/{built.name}#', 'href="#'), encoding="utf-8")
    return page


def main() -> str | None:
    """Write _build/book.pdf; returns what is missing, if anything is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        return f"printing needs one of {', '.join(names)} (Debian: apt install chromium)"
    paper = BUILD / "book.pdf"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(color_scheme="light", offline=True)
        page.goto(one_page().as_uri())
        page.wait_for_function(SET, timeout=120_000)
        margin = {"top": "18mm", "bottom": "18mm", "left": "17mm", "right": "17mm"}
        page.pdf(
            path=paper, format="A4", margin=margin, outline=True, tagged=True,
            display_header_footer=True, header_template="<span></span>", footer_template=FOOTER,
        )  # fmt: skip
        browser.close()
    sys.stdout.write(f"The book is at {paper}\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
