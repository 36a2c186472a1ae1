"""What an installed copy of the library holds."""

import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_and_every_table_of_the_library_is_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (where,) = told["packages"]["find"]["where"]
    packages = find_packages(where)
    for path in (ROOT / where / "geodesic").rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.parent.name == "__pycache__":
            continue
        package = ".".join(path.parent.relative_to(ROOT / where).parts)
        assert package in packages, path
        if path.suffix != ".py":
            assert any(path.match(pattern) for pattern in told["package-data"].get(package, [])), path
