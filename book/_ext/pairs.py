"""Keep the text and the notebook of each chapter the same: the side that was edited is written into the other.

A chapter is a pair, book/NAME.md and notebooks/NAME.ipynb. `make notebooks` runs this script. A side is edited if it
says neither what it said in the last commit nor what both said when they were last made the same; dates decide nothing,
since a checkout or a copy changes them. Where both sides were edited nothing is written, and a line says so. Notebooks
keep no outputs. With --check, as `make pairs` runs it, nothing is written at all.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import yaml
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
TEXT, NOTEBOOK = "md:myst", "ipynb"


def pairs(root: Path) -> Iterator[tuple[Path, Path]]:
    """The text and the notebook of every page in the table of contents whose text is one side of a pair."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    for text in (root / f"{entry}.md" for entry in [toc["root"], *chapters]):
        if text.read_text(encoding="utf-8").startswith("---\njupytext"):
            yield text, root / "notebooks" / f"{text.stem}.ipynb"


def says(notebook: NotebookNode) -> str:
    """A digest of the cells, without outputs: sides with the same digest say the same."""
    cells = [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:16]


def committed(root: Path, path: Path) -> str | None:
    """What the file says in the last commit; None if it is not there, or there is no git."""
    name = path.relative_to(root).as_posix()
    try:
        found = subprocess.run(["git", "-C", root, "show", f"HEAD:./{name}"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return says(jupytext.reads(found.decode(), NOTEBOOK if path.suffix == ".ipynb" else TEXT))


def edited(root: Path, text: Path, twin: Path, agreed: str | None) -> tuple[bool, bool]:
    """Which side of an unequal pair was edited. If neither was, both came from elsewhere: the older one must yield."""
    sides = [says(jupytext.read(path)) not in {agreed, committed(root, path)} for path in (text, twin)]
    if not any(sides):
        return (newer := text.stat().st_mtime >= twin.stat().st_mtime), not newer
    return sides[0], sides[1]


def write_notebook(text: Path, twin: Path) -> None:
    """The notebook anew from the text; cells that stay keep their identity."""
    notebook = jupytext.read(text)
    if twin.exists():
        notebook = combine_inputs_with_outputs(notebook, jupytext.read(twin), fmt=NOTEBOOK)
    jupytext.write(without_outputs(notebook), twin, fmt=NOTEBOOK)


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """The same notebook, as if never executed."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def write_text(text: Path, twin: Path) -> None:
    """The text anew from the notebook; options of cells that stay keep their order."""
    notebook, before = jupytext.read(twin), [cell.metadata for cell in jupytext.read(text).cells]
    for cell in notebook.cells:
        cell.metadata = next((options for options in before if options == cell.metadata), cell.metadata)
    jupytext.write(notebook, text, fmt=TEXT)


def synchronise(root: Path, prefer: str | None = None) -> list[str]:
    """Write what was edited into the other side.

    Args:
        root: the checkout.
        prefer: "text" or "notebook", the side to take where both were edited.

    Returns:
        a line for every chapter that was left alone because both sides were edited.
    """
    kept = root / "_build" / "pairs.json"
    agreed = json.loads(kept.read_text()) if kept.exists() else {}
    clashes = []
    for text, twin in pairs(root):
        if not twin.exists():
            write_notebook(text, twin)
        elif says(jupytext.read(text)) != says(jupytext.read(twin)):
            sides = edited(root, text, twin, agreed.get(text.stem))
            if all(sides) and prefer is None:
                clashes.append(
                    f"{text.relative_to(root)} and {twin.relative_to(root)} were both edited since they last agreed: "
                    "nothing written; say which to keep, make notebooks FROM=text or FROM=notebook"
                )
                continue
            if prefer == "text" if all(sides) else sides[0]:
                write_notebook(text, twin)
            else:
                write_text(text, twin)
        notebook = jupytext.read(twin)
        if any(cell.get("outputs") for cell in notebook.cells):
            jupytext.write(without_outputs(notebook), twin, fmt=NOTEBOOK)
        agreed[text.stem] = says(jupytext.read(text))
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(agreed, indent=1))
    return clashes


def faults(root: Path) -> Iterator[str]:
    """What is wrong with the pairs as they are."""
    names = set()
    for text, twin in pairs(root):
        names.add(text.stem)
        if not twin.exists():
            yield f"{twin.name} is missing"
            continue
        notebook = jupytext.read(twin)
        if says(notebook) != says(jupytext.read(text)):
            yield f"{twin.name} differs from {text.name}"
        if any(cell.get("outputs") for cell in notebook.cells):
            yield f"{twin.name} keeps outputs"
    yield from (f"{one.name} has no text" for one in (root / "notebooks").glob("*.ipynb") if one.stem not in names)


def main() -> int:
    """Write or check, say what is wrong a line each, and fail if there is any."""
    parser = argparse.ArgumentParser(description="Keep the text and the notebook of each chapter the same.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    parser.add_argument("--prefer", choices=("text", "notebook"), help="the side to take where both were edited")
    options = parser.parse_args()
    found = list(faults(ROOT)) if options.check else synchronise(ROOT, options.prefer)
    for line in found:
        sys.stderr.write(f"{line}\n")
    if options.check and found:
        sys.stderr.write("run `make notebooks`\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
