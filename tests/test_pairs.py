"""A chapter's text and notebook: whichever side is edited, the other follows, and no edit is lost."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

One sentence.

```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-one
    caption: One
tags: [hide-input]
---
x = 1
```

```{code-cell} ipython3
y = 2
```
"""


@pytest.fixture(scope="module")
def pairs():
    spec = importlib.util.spec_from_file_location("pairs", ROOT / "book" / "_ext" / "pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(pairs, tmp_path):
    """A committed book of one chapter, whose two sides agree."""
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_toc.yml").write_text("root: book/one\nparts: []\n")
    (tmp_path / "jupytext.toml").write_text((ROOT / "jupytext.toml").read_text())
    (tmp_path / ".gitignore").write_text("_build/\n")
    (tmp_path / "book" / "one.md").write_text(CHAPTER)
    assert pairs.synchronise(tmp_path) == []  # there is no notebook yet: it is written
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def text(checkout: Path) -> Path:
    return checkout / "book" / "one.md"


def twin(checkout: Path) -> Path:
    return checkout / "notebooks" / "one.ipynb"


def edit_text(checkout: Path, old: str, new: str) -> None:
    source = text(checkout).read_text()
    assert old in source
    text(checkout).write_text(source.replace(old, new))


def edit_notebook(checkout: Path, old: str, new: str) -> None:
    """As an editor does that knows of no pairs; its output is kept in the file."""
    notebook = nbformat.read(twin(checkout), as_version=4)
    (cell,) = [cell for cell in notebook.cells if old in cell.source]
    cell.source = cell.source.replace(old, new)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="1\n")], 1
    nbformat.write(notebook, twin(checkout))


def older(path: Path) -> None:
    os.utime(path, (0, 0))


def test_an_edit_of_the_text_reaches_the_notebook(pairs, checkout):
    identities = [cell.id for cell in jupytext.read(twin(checkout)).cells]
    edit_text(checkout, "x = 1", "x = 10")
    older(text(checkout))  # as a checkout of another date may leave it
    assert len(list(pairs.faults(checkout))) == 1
    assert pairs.synchronise(checkout) == []
    notebook = jupytext.read(twin(checkout))
    assert [cell.source for cell in notebook.cells] == ["# A chapter\n\nOne sentence.", "x = 10", "y = 2"]
    assert [cell.id for cell in notebook.cells][::2] == identities[::2]
    assert list(pairs.faults(checkout)) == []


def test_an_edit_of_the_notebook_reaches_the_text(pairs, checkout):
    edit_notebook(checkout, "y = 2", "y = 20")
    edit_notebook(checkout, "One sentence.", "Two sentences.")
    older(twin(checkout))
    assert len(list(pairs.faults(checkout))) == 2  # it differs, and keeps an output
    assert pairs.synchronise(checkout) == []
    body = text(checkout).read_text().partition("# A chapter")[2]
    expected = CHAPTER.replace("y = 2", "y = 20").replace("One sentence", "Two sentences").partition("# A chapter")[2]
    assert body == expected  # the order of the figure's options, too
    assert list(pairs.faults(checkout)) == []


def test_where_both_were_edited_nothing_is_written(pairs, checkout):
    edit_text(checkout, "x = 1", "x = 10")
    edit_notebook(checkout, "y = 2", "y = 20")
    before = text(checkout).read_bytes(), twin(checkout).read_bytes()
    for _ in range(2):
        (line,) = pairs.synchronise(checkout)
        assert "book/one.md and notebooks/one.ipynb were both edited" in line
        assert (text(checkout).read_bytes(), twin(checkout).read_bytes()) == before


@pytest.mark.parametrize(("prefer", "kept"), [("text", ["x = 10", "y = 2"]), ("notebook", ["x = 1", "y = 20"])])
def test_where_both_were_edited_the_side_to_keep_can_be_said(pairs, checkout, prefer, kept):
    edit_text(checkout, "x = 1", "x = 10")
    edit_notebook(checkout, "y = 2", "y = 20")
    assert pairs.synchronise(checkout, prefer) == []
    for side in (text, twin):
        assert [cell.source for cell in jupytext.read(side(checkout)).cells][1:] == kept


def test_edits_follow_each_other_without_a_commit(pairs, checkout):
    edit_text(checkout, "x = 1", "x = 10")
    pairs.synchronise(checkout)
    edit_notebook(checkout, "y = 2", "y = 20")  # both sides differ from the commit, but only this from the last time
    assert pairs.synchronise(checkout) == []
    edit_text(checkout, "y = 20", "y = 30")
    assert pairs.synchronise(checkout) == []
    for side in (text, twin):
        assert [cell.source for cell in jupytext.read(side(checkout)).cells][1:] == ["x = 10", "y = 30"]


def test_a_commit_from_elsewhere_is_no_edit(pairs, checkout):
    edit_text(checkout, "x = 1", "x = 10")
    pairs.write_notebook(text(checkout), twin(checkout))  # not noted under _build, as in another's checkout
    git(checkout, "commit", "-q", "-a", "-m", "two")
    edit_notebook(checkout, "y = 2", "y = 20")
    assert pairs.synchronise(checkout) == []
    assert "x = 10" in text(checkout).read_text()
    assert "y = 20" in text(checkout).read_text()


def test_a_side_taken_back_to_the_commit_takes_the_other_along(pairs, checkout):
    edit_notebook(checkout, "y = 2", "y = 20")
    pairs.synchronise(checkout)
    older(twin(checkout))
    git(checkout, "checkout", "--", "book/one.md")
    assert pairs.synchronise(checkout) == []
    assert "y = 20" not in twin(checkout).read_text()


def test_a_notebook_without_a_text_is_a_fault(pairs, checkout):
    (checkout / "notebooks" / "two.ipynb").write_bytes(twin(checkout).read_bytes())
    assert list(pairs.faults(checkout)) == ["two.ipynb has no text"]


@pytest.mark.slow
def test_what_is_saved_in_jupyterlab_is_in_the_text(pairs, checkout):
    """The recipe of `make lab`, without a browser: what the page does when one saves."""
    (recipe,) = re.findall(r"^lab:.*\n\t@\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    runtime = checkout / "runtime"
    environment = os.environ | {"JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(checkout / "config")}
    command = [Path(sys.executable).parent / "jupyter", *shlex.split(recipe)[1:], "--no-browser", "--allow-root"]
    with subprocess.Popen([*command, "--ServerApp.port_retries=50"], cwd=checkout, env=environment) as server:
        try:
            deadline = time.monotonic() + 120
            while not (found := list(runtime.glob("jpserver-*.json"))) and time.monotonic() < deadline:
                time.sleep(0.2)
            told = json.loads(found[0].read_text())
            address = f"{told['url']}api/contents/notebooks/one.ipynb"
            head = {"Authorization": f"token {told['token']}", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(address, headers=head), timeout=60) as answer:
                content = json.load(answer)["content"]
            content["cells"][-1]["source"] = "y = 20"
            body = json.dumps({"type": "notebook", "format": "json", "content": content}).encode()
            urllib.request.urlopen(urllib.request.Request(address, body, head, method="PUT"), timeout=60).close()
        finally:
            server.terminate()
    assert "y = 20" in text(checkout).read_text()
    assert list(pairs.faults(checkout)) == []
