"""What `make book` forgets when the library or the records change."""

import importlib.util
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parents[1] / "book"


@pytest.fixture
def stale():
    spec = importlib.util.spec_from_file_location("stale", BOOK / "_ext" / "stale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_chapter_depends_on_what_it_imports_and_on_its_records(stale):
    found = {str(path.relative_to(stale.ROOT)) for path in stale.inputs(BOOK / "mnist.md")}
    assert {"lib/geodesic/experiment.py", "lib/geodesic/_assignment.py"} <= found  # the second through transport
    assert any(name.startswith("results/mnist/") for name in found)
    assert not any(name.startswith("results/aeot/") or name == "lib/geodesic/fluid.py" for name in found)


def test_every_chapter_with_code_has_inputs(stale):
    for chapter in BOOK.glob("*.md"):
        text = chapter.read_text(encoding="utf-8")
        modules = {path.stem for path in stale.inputs(chapter) if path.parent == stale.LIBRARY}
        assert ("from geodesic" in text) == (len(modules - {"__init__", "paper_tables"}) > 0), chapter.name


@pytest.mark.parametrize(("changed", "expected"), [("b", True), ("c", False), ("record", True), ("text", False)])
def test_the_digest_follows_indirect_imports_and_records(stale, tmp_path, monkeypatch, changed, expected):
    for name, value in {"ROOT": tmp_path, "LIBRARY": tmp_path / "lib", "RESULTS": tmp_path / "results"}.items():
        monkeypatch.setattr(stale, name, value)
    paths = {name: tmp_path / "lib" / f"{name}.py" for name in ("__init__", "a", "b", "c")}
    paths |= {"record": tmp_path / "results" / "x-y" / "1.json", "text": tmp_path / "book.md"}
    paths["lock"] = tmp_path / "requirements.txt"
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    paths["a"].write_text('from geodesic.b import thing\nfolder = records.RESULTS / "x-y"\n')
    paths["text"].write_text("words\n\n```{code-cell} ipython3\n:tags: [hide-input]\n\nfrom geodesic import a\n```\n")
    before = stale.digest(paths["text"])
    paths[changed].write_text(paths[changed].read_text() + "\n# another line\n")
    assert (stale.digest(paths["text"]) != before) == expected
