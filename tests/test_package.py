"""What an installed copy of the library holds, needs and does."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import geodesic
import pytest
import yaml
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
TOLD = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TOLD["project"]


def test_every_folder_and_every_table_of_the_library_is_installed():
    told = TOLD["tool"]["setuptools"]
    (where,) = told["packages"]["find"]["where"]
    packages = find_packages(where)
    for path in (ROOT / where / "geodesic").rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.parent.name == "__pycache__":
            continue
        package = ".".join(path.parent.relative_to(ROOT / where).parts)
        assert package in packages, path
        if path.suffix != ".py":
            assert any(path.match(pattern) for pattern in told["package-data"].get(package, [])), path


def test_the_version_stands_at_one_value():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert geodesic.__version__ == PROJECT["version"] == citation["version"]


def imports(path: Path) -> set[str]:
    """The outermost packages that a source imports, here or there."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_library_imports_is_declared():
    """The sweeps may import what their extra declares, all other modules only what the package itself does."""
    everywhere = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    extra = {canonical(Requirement(line).name) for line in PROJECT["optional-dependencies"]["sweep"]} | {"distributed"}
    homes = importlib.metadata.packages_distributions()
    used = set()
    for path in (ROOT / "lib").rglob("*.py"):
        allowed = everywhere | extra if path.parent.name == "sweep" else everywhere
        for name in imports(path) - set(sys.stdlib_module_names) - {"geodesic"}:
            found = {canonical(home) for home in homes.get(name, [name])}
            assert found & allowed, f"{path.name} imports {name}, which pyproject.toml does not declare for it"
            used |= found
    assert everywhere | extra <= used, "declared, but imported nowhere"


def python(*arguments: str, folder: Path, executable: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_modules_are_imported_when_they_are_asked_for(tmp_path):
    code = (
        "import sys, geodesic; assert 'torch' not in sys.modules; assert {'tracks', 'sweep'} <= set(dir(geodesic)); "
        "assert not hasattr(geodesic, 'geometry'); assert 'torch' not in sys.modules; "
        "print(geodesic.tracks.line_shape_score.__module__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    )
    assert run.stdout == "geodesic.tracks\n", run.stderr


def needed(lines: list[str], extra: str = "") -> Iterator[importlib.metadata.Distribution]:
    """The distributions that these requirements ask for, with all that those ask for in turn, as installed here."""
    todo, seen = [(Requirement(line), extra) for line in lines], set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for part in {"", *requirement.extras}:
            key = canonical(requirement.name), part
            if key in seen:
                continue
            distribution = importlib.metadata.distribution(requirement.name)
            assert distribution.version in requirement.specifier, f"{requirement}, but {distribution.version} is here"
            if not part:
                yield distribution
            seen.add(key)
            todo += [(Requirement(line), part) for line in distribution.requires or []]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The scripts of an environment with the package and what it declares, of this environment's versions.

    The package is built and installed as by `pip install .`; of every distribution that it needs there is a link to the
    copy here, and of no other: what is not declared is not there.
    """
    source, home = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("home") / "env"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lib" / "geodesic", source / "lib" / "geodesic")
    pip, offline = ["-m", "pip", "-q"], ["--no-deps", "--no-index"]
    for command in (
        ["-m", "venv", "--without-pip", str(home)],
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", "dist", "."],
        [*pip, "--python", str(home / "bin" / "python"), "install", *offline, "--find-links", "dist", "geodesic"],
    ):
        run = python(*command, folder=source)
        assert run.returncode == 0, run.stderr
    (packages,) = home.glob("lib/python3*/site-packages")
    (metadata,) = packages.glob("geodesic-*.dist-info")
    for distribution in needed(importlib.metadata.Distribution.at(metadata).requires):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return home / "bin"


@pytest.mark.slow
def test_an_installed_copy_runs_with_what_it_declares(installed, tmp_path):
    lazy = "import sys, geodesic; assert 'torch' not in sys.modules; print(geodesic.tracks.__file__)"
    assert f"{installed.parent}/" in python("-c", lazy, folder=tmp_path, executable=installed / "python").stdout
    every = (
        "import importlib, pkgutil, geodesic\n"
        "for m in pkgutil.walk_packages(geodesic.__path__, 'geodesic.'):\n"
        "    if not m.name.startswith(('geodesic.sweep.kernel', 'geodesic.__main__')): importlib.import_module(m.name)"
    )
    run = python("-c", every, folder=tmp_path, executable=installed / "python")
    assert run.returncode == 0, run.stderr
    run = python("--help", folder=tmp_path, executable=installed / "geodesic")
    assert run.returncode == 0
    assert "sweep" in run.stdout
    few = ["--epochs", "1", "--depth", "2", "--width", "16", "--ots-points", "90", "--quiet"]
    run = python("run", *few, folder=tmp_path, executable=installed / "geodesic")
    assert run.returncode == 0, run.stderr
    assert "record written" in run.stdout
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1


@pytest.mark.slow
def test_a_missing_extra_is_named_with_the_command_that_installs_it(installed, tmp_path):
    (tmp_path / "few.toml").write_text('notebook = "any.ipynb"\nout = "records"\n[settings]\nx = 1\n')
    cell = {"cell_type": "code", "execution_count": None, "metadata": {"tags": ["parameters"]}, "outputs": []}
    notebook = {"cells": [cell | {"source": "x = 0"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "any.ipynb").write_text(json.dumps(notebook))
    run = python("sweep", "few.toml", folder=tmp_path, executable=installed / "geodesic")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert "papermill" in run.stderr
    assert "pip install '.[sweep]'" in run.stderr
