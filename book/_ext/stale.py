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


def file(module: str) -> Path | None:
    """The source of a module of `geodesic`, written from below it ("sweep.grid"); a package's is its `__init__`."""
    path = LIBRARY.joinpath(*module.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def imported(source: str, package: str = "geodesic") -> set[str]:
    """The modules of `geodesic` that a source in `package` needs: what it imports, with all packages around it."""
    paths: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            paths |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "geodesic":
            paths.add(f"geodesic.{node.attr}")  # a module that the package imports when it is asked for
    parts = [path.split(".")[1:] for path in paths if path.startswith("geodesic.")]
    return {name for names in parts for stop in range(len(names)) if file(name := ".".join(names[: stop + 1]))}


def cells(chapter: str) -> str:
    """The code of a chapter's cells, without magics and cell options."""
    code = "\n".join(re.findall(r"^```\{code-cell\}.*?\n(.*?)^```$", chapter, re.DOTALL | re.MULTILINE))
    return re.sub(r"^(---\n.*?^---$|:\w.*?$|[%!].*?$)", "", code, flags=re.DOTALL | re.MULTILINE)


def inputs(chapter: Path) -> Iterator[Path]:
    """The files that a chapter's outputs depend on, besides its own text."""
    yield ROOT / "requirements.txt"
    yield from sorted(LIBRARY.rglob("*.csv"))
    source = cells(chapter.read_text(encoding="utf-8"))
    sources, todo, files = [source], imported(source), {LIBRARY / "__init__.py"}
    while todo:
        module = todo.pop()
        files.add(path := file(module))
        sources.append(path.read_text(encoding="utf-8"))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        todo |= {name for name in imported(sources[-1], f"geodesic.{package}".rstrip(".")) if file(name) not in files}
    yield from sorted(files)
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
