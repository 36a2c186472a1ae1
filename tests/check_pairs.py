"""Fail if a chapter's notebook does not say what its text says, or keeps outputs. `make notebooks` repairs it."""

import sys
from pathlib import Path

import jupytext
import yaml

ROOT = Path(__file__).resolve().parents[1]


def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def main() -> int:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    pages = [ROOT / f"{entry}.md" for entry in [toc["root"], *chapters]]
    texts = [page for page in pages if page.read_text().startswith("---\njupytext")]
    faults = []
    for text in texts:
        twin = ROOT / "notebooks" / f"{text.stem}.ipynb"
        if not twin.exists():
            faults.append(f"{twin.name} is missing")
            continue
        notebook = jupytext.read(twin)
        if cells(notebook) != cells(jupytext.read(text)):
            faults.append(f"{twin.name} differs from {text.name}")
        if any(cell.get("outputs") for cell in notebook.cells):
            faults.append(f"{twin.name} keeps outputs")
    names = {text.stem for text in texts}
    faults += [f"{twin.name} has no text" for twin in (ROOT / "notebooks").glob("*.ipynb") if twin.stem not in names]
    if faults:
        sys.stderr.write("; ".join(faults) + "; run `make notebooks`\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
