"""Ask every address that the built book and the top-level pages link to, and print those that answer no more.

Run by `make links`, never by a test: what others take down is not this book's fault. A server that turns programs
away (401, 403, 405, 429) is there; one that answers 404 or 410, or not at all, is reported.
"""

import http.client
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In a page, in Markdown and in CITATION.cff.
ADDRESS = re.compile(
    r'<a\b[^>]*\bhref="(https?://[^"#]+)|\]\((https?://[^)#\s]+)|^\s*(?:url|repository-code): "?(https?://[^"#\s]+)',
    re.MULTILINE,
)
TURNED_AWAY = {401, 403, 405, 429}
AGENT = {"User-Agent": "Mozilla/5.0 (link checker of an open book)"}


def addresses(root: Path) -> dict[str, list[str]]:
    """Every external address, and the files that link to it."""
    built = sorted((root / "_build" / "html" / "book").glob("*.html"))
    found: dict[str, list[str]] = {}
    for path in [*built, *sorted(root.glob("*.md")), *sorted(root.glob("*.cff"))]:
        for match in ADDRESS.findall(path.read_text(encoding="utf-8")):
            files = found.setdefault(unescape("".join(match)), [])
            if path.name not in files:
                files.append(path.name)
    return found


def ask(address: str) -> str | None:
    """What is wrong with an address: "404", say, or the system's words for no answer; None if nothing is."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=AGENT), timeout=20):
            return None
    except urllib.error.HTTPError as answer:
        return None if answer.code in TURNED_AWAY else str(answer.code)
    except (OSError, http.client.HTTPException) as silence:
        return f"no answer ({getattr(silence, 'reason', silence)})"


def report(found: dict[str, list[str]], faults: Iterable[str | None]) -> tuple[list[str], int]:
    """The lines to print and the exit status: 1 if a link is dead, 2 if no link could be asked."""
    dead = {address: fault for address, fault in zip(found, faults, strict=True) if fault}
    if found and len(dead) == len(found) and all(fault.startswith("no answer") for fault in dead.values()):
        return [f"none of {len(found)} addresses answers, {next(iter(dead.values()))[11:-1]}: is there a network?"], 2
    lines = [f"{fault}: {address} in {', '.join(found[address])}" for address, fault in dead.items()]
    return [*lines, f"{len(found)} links, {len(dead)} dead"], int(bool(dead))


def main() -> int:
    """Print what is dead among the links of this book."""
    if not (ROOT / "_build" / "html" / "book").exists():
        sys.stderr.write("the links are those of the built pages; run `make book` first\n")
        return 2
    found = addresses(ROOT)
    with ThreadPoolExecutor(8) as pool:
        lines, status = report(found, list(pool.map(ask, found)))
    sys.stdout.write("\n".join(lines) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
