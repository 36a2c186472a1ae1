"""Forget the outputs of chapters whose library modules or records have changed.

The notebook cache knows the cells of a chapter only. This script, which `make book` runs before the build, adds what
the cells depend on: the modules of `geodesic` that they import, directly or not, the folders of `results/` that they or
those modules name, and the lock file. A chapter whose digest differs from that of the last build loses its cached
outputs and its parsed page, so that it is executed and read again; the others stay.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[2]
LIBRARY, RESULTS, BUILD = ROOT / "lib" / "geodesic", ROOT / "results", ROOT / "_build"
DIGESTS = BUILD / "inputs.json"


def imported(source: str) -> set[str]:
    """The modules of `geodesic` that a source names in its import statements."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "geodesic":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geodesic."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("geodesic.")}
    return {name for name in found if (LIBRARY / f"{name}.py").exists()}


def cells(chapter: str) -> str:
    """The code of a chapter's cells, without magics and cell options."""
    code = "\n".join(re.findall(r"^```\{code-cell\}.*?\n(.*?)^```$", chapter, re.DOTALL | re.MULTILINE))
    return re.sub(r"^(---\n.*?^---$|:\w.*?$|[%!].*?$)", "", code, flags=re.DOTALL | re.MULTILINE)


def inputs(chapter: Path) -> Iterator[Path]:
    """The files that a chapter's outputs depend on, besides its own text."""
    yield ROOT / "requirements.txt"
    yield from sorted(LIBRARY.glob("*.csv"))
    source = cells(chapter.read_text(encoding="utf-8"))
    sources, todo, seen = [source], imported(source), {"__init__"}
    while todo:
        name = todo.pop()
        seen.add(name)
        sources.append((LIBRARY / f"{name}.py").read_text(encoding="utf-8"))
        todo |= imported(sources[-1]) - seen
    yield from (LIBRARY / f"{name}.py" for name in sorted(seen))
    for folder in sorted(set(re.findall(r'RESULTS / "([\w-]+)"', "\n".join(sources)))):
        yield from sorted((RESULTS / folder).glob("*.json"))


def digest(chapter: Path) -> str:
    """Of everything that a chapter's outputs depend on, besides its own text."""
    total = hashlib.sha256()
    for path in inputs(chapter):
        total.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    """Compare the digests with those of the last build, forget what differs and keep the new ones."""
    now = {path.stem: digest(path) for path in sorted((ROOT / "book").glob("*.md"))}
    before = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    stale = {name for name, value in now.items() if before.get(name) != value}
    if stale:
        cache = get_cache(BUILD / ".jupyter_cache")
        for record in cache.list_cache_records():
            if Path(record.uri).stem in stale:
                cache.remove_cache(record.pk)
        for name in stale:
            (BUILD / ".doctrees" / "book" / f"{name}.doctree").unlink(missing_ok=True)
        BUILD.mkdir(exist_ok=True)
        DIGESTS.write_text(json.dumps(now, indent=1))


if __name__ == "__main__":
    main()
