"""What `make book` forgets when the library or the records change."""

import importlib.util
import os
import subprocess
import sys
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
    assert {"lib/geodesic/experiment.py", "lib/geodesic/transport/_assignment.py"} <= found  # through `measure`
    assert any(name.startswith("results/mnist/") for name in found)
    assert not any(name.startswith("results/aeot/") or name.startswith("lib/geodesic/fluid/") for name in found)


def test_every_chapter_with_code_has_inputs(stale):
    for chapter in BOOK.glob("*.md"):
        text = chapter.read_text(encoding="utf-8")
        modules = {path for path in stale.inputs(chapter) if path.suffix == ".py"}
        assert ("from geodesic" in text) == (len(modules - {stale.LIBRARY / "__init__.py"}) > 0), chapter.name


@pytest.mark.parametrize("chapter", ["aeot", "meanfield", "sweeps", "verdict"])
def test_a_chapter_loads_no_module_that_it_does_not_depend_on(stale, chapter):
    source = stale.cells((BOOK / f"{chapter}.md").read_text(encoding="utf-8"))
    imports = "\n".join(line for line in source.splitlines() if line.startswith(("from geodesic", "import geodesic")))
    show = "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'geodesic'), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{imports}\n{show}"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(stale.LIBRARY.parent)},
    )  # fmt: skip
    loaded = {Path(line).relative_to(stale.ROOT) for line in run.stdout.split()}
    assert any(len(path.parts) > 3 for path in loaded)  # lib/geodesic/WING/module.py
    assert loaded <= {path.relative_to(stale.ROOT) for path in stale.inputs(BOOK / f"{chapter}.md")}


def test_imports_are_found_however_they_are_written(stale, tmp_path, monkeypatch):
    monkeypatch.setattr(stale, "LIBRARY", tmp_path)
    for name in ("__init__", "a", "wing/__init__", "wing/b", "wing/deep/__init__", "wing/deep/c"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for source, package, expected in [
        ("from geodesic import a, wing", "geodesic", {"a", "wing"}),
        ("from geodesic.wing import b, thing", "geodesic", {"wing", "wing.b"}),
        ("import geodesic.wing.deep.c as c", "geodesic", {"wing", "wing.deep", "wing.deep.c"}),
        ("from geodesic.wing.deep.c import thing", "geodesic", {"wing", "wing.deep", "wing.deep.c"}),
        ("import geodesic\ngeodesic.a.thing()", "geodesic", {"a"}),
        ("from . import b\nfrom .deep.c import thing", "geodesic.wing", {"wing", "wing.b", "wing.deep", "wing.deep.c"}),
        ("from ..a import thing", "geodesic.wing", {"a"}),
        ("from geodesics import a\nimport a", "geodesic", set()),
    ]:
        assert stale.imported(source, package) == expected, source


CHANGES = {"a": True, "wing": True, "b": True, "deep": True, "beside": False, "c": False, "record": True, "text": False}


@pytest.mark.parametrize(("changed", "expected"), CHANGES.items())
def test_the_digest_follows_indirect_imports_and_records(stale, tmp_path, monkeypatch, changed, expected):
    """The chapter imports `a`, this `wing.b`, this `wing.deep`; nobody imports `wing.beside` or `c`."""
    for name, value in {"ROOT": tmp_path, "LIBRARY": tmp_path / "lib", "RESULTS": tmp_path / "results"}.items():
        monkeypatch.setattr(stale, name, value)
    paths = {name: tmp_path / "lib" / f"{name}.py" for name in ("__init__", "a", "c")}
    paths |= {name: tmp_path / "lib" / "wing" / f"{name}.py" for name in ("b", "beside", "deep")}
    paths |= {"wing": tmp_path / "lib" / "wing" / "__init__.py"}
    paths |= {"record": tmp_path / "results" / "x-y" / "1.json", "text": tmp_path / "book.md"}
    paths["lock"] = tmp_path / "requirements.txt"
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    paths["a"].write_text('from geodesic.wing.b import thing\nfolder = records.RESULTS / "x-y"\n')
    paths["b"].write_text("def lazily():\n    from geodesic.wing import deep\n")
    paths["text"].write_text("words\n\n```{code-cell} ipython3\n:tags: [hide-input]\n\nfrom geodesic import a\n```\n")
    before = stale.digest(paths["text"])
    paths[changed].write_text(paths[changed].read_text() + "\n# another line\n")
    assert (stale.digest(paths["text"]) != before) == expected
