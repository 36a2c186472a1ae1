"""A grid of runs: read from a TOML file, checked, expanded; what of it is recorded; how long the rest may take.

Used by `python -m geodesic sweep` and book/sweeps.md. Torch is imported only to check a grid that was not checked
before, so that a finished sweep is recognised at once. What runs where is the business of `dispatch` and `worker`.

| entry of the file | meaning |
|---|---|
| notebook | the notebook papermill executes, relative to the file; it has a cell tagged `parameters` |
| out | folder of the records, relative to the file |
| [settings] | parameters that every run shares |
| [axes] | lists of values; a run for each combination |
| [[runs]] | further tables with `settings` and `axes` of their own, which replace those above of the same name |
"""

import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geodesic
from geodesic.sweep import worker
from geodesic.sweep.worker import Run

CONTROLS = ("out", "checkpoints", "root", "device", "download")  # parameters that say where to run, not what
_SIGNATURE = {"dataset", "network", "weight_decay", "epochs", "seed"}  # a notebook with these is an experiment
_ENTRIES = ("notebook", "out", "settings", "axes", "runs")
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Grid:
    """A checked grid."""

    path: Path
    notebook: Path
    out: Path
    parameters: tuple[str, ...]  # names that the notebook's parameters cell sets
    runs: tuple[Run, ...]
    digest: str  # of the file, the notebook and the library

    @property
    def experiment(self) -> bool:
        """Whether the notebook is one of `experiment.Settings`; any other writes no record of its own."""
        return set(self.parameters) >= _SIGNATURE


def read(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, root: str | os.PathLike[str] | None = None
) -> Grid:
    """Read a grid, check every value in it, and expand it.

    Args:
        path: the TOML file.
        out: folder of the records; None takes the file's, else runs/<name of the file>.
        root: where the data are (see `data.load`); image folders that are not there cannot make a record void.

    Raises:
        FileNotFoundError: if the file or its notebook is not there.
        ValueError: for anything in it that could not run: the entry is named, with what to write instead.
    """
    path = Path(path)
    document = _load(path)
    if "notebook" not in document:
        raise ValueError(f'{path} names no notebook; write notebook = "../experiment.ipynb" (relative to the file)')
    notebook = Path(os.path.normpath(path.parent / document["notebook"]))
    declared = parameters(notebook)
    if out is None:
        out = path.parent / document["out"] if "out" in document else Path("runs") / path.stem
    out = Path(os.path.normpath(out))
    digest = _digest(path, notebook)
    every = _planned(out, path, digest) or _expand(path, document, notebook, declared)
    varying = [key for key in every[0]["settings"] if len({repr(one["settings"][key]) for one in every}) > 1]
    code = _code(notebook, declared)
    named = [one["settings"].get("dataset") if declared.keys() >= _SIGNATURE else None for one in every]
    data = _fingerprints(named, root)
    runs = tuple(
        Run(**one, label=_label(one, varying), code=code, data=data.get(name))
        for one, name in zip(every, named, strict=True)
    )
    return Grid(path, notebook, out, tuple(declared), runs, digest)


def keep_plan(grid: Grid) -> None:
    """Keep the expanded grid: until the grid, its notebook or the library changes, it need not be checked again."""
    runs = [{"name": run.name, "settings": run.settings} for run in grid.runs]
    if _planned(grid.out, grid.path, grid.digest) != runs:
        worker.write_json(_plan(grid.out, grid.path), {"digest": grid.digest, "runs": runs})


def parameters(notebook: Path) -> dict[str, Any]:
    """The names that a notebook's parameters cell sets, with their defaults.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if it is no notebook, or has no cell tagged `parameters` with plain values.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no notebook {notebook}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a notebook ({error!r}); give the path of an .ipynb file") from error
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise ValueError(f"{notebook} has no cell tagged `parameters`; tag the cell whose values the grid replaces")
    try:
        lines = ast.parse("".join(tagged[0]["source"])).body
        return {name: ast.literal_eval(node.value) for node in lines for name in _targets(node)}
    except (SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the parameters cell of {notebook} holds more than plain `name = value` ({error})") from error


def check(settings: Iterable[Mapping[str, Any]], root: str | None, device: str, download: bool) -> None:
    """Load every data set once and build every network once, before anything is trained.

    Raises:
        ValueError: for settings that do not fit the data or each other, or a device that is not there.
        OSError: for data that are not there.
    """
    import torch

    from geodesic import data, experiment

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch {torch.__version__} sees no GPU here; use --device cpu")
    parsed = [experiment.Settings.from_dict(dict(values)) for values in settings]
    keys = ("dataset", "n_train", "n_test", "ots_points", "network", "norm", "stages", "depth", "width", "batch_size")
    distinct = {tuple(getattr(one, key) for key in keys): one for one in parsed}
    for name, group in itertools.groupby(sorted(distinct.values(), key=lambda s: s.dataset), lambda s: s.dataset):
        whole = data.load(name, root, download=download)
        for one in group:
            dataset = whole.take(one.n_train, one.n_test)
            experiment._check_sizes(one, dataset)
            experiment._network(one, dataset, torch.Generator())
            if one.epochs and one.batch_size > len(dataset.y_train):
                raise ValueError(f"batch_size={one.batch_size} is more than the {len(dataset.y_train)} training points")


def _load(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no grid {path}; notebooks/grids holds some to begin with") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    _refuse_unknown(str(path), document, _ENTRIES, "entry")
    for entry, kind, words in (("notebook", str, "a string"), ("out", str, "a string"), ("runs", list, "[[runs]]")):
        if entry in document and not isinstance(document[entry], kind):
            raise ValueError(f"{path}: {entry} must be {words}, not {document[entry]!r}")
    return document


def _targets(node: Any) -> list[str]:
    """The names that a line of a parameters cell sets; comments and docstrings set none."""
    if isinstance(node, ast.Expr):
        return []
    return [target.id for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def _code(notebook: Path, declared: Mapping[str, Any]) -> str:
    """The code that decides the numbers, see `worker.made_by`: the library's, or a notebook's own."""
    if declared.keys() >= _SIGNATURE:
        return worker.made_by({"geodesic": geodesic.__version__})
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def _fingerprints(names: Iterable[str | None], root: str | os.PathLike[str] | None) -> dict[str | None, str]:
    """Fingerprints of the image folders that are here; other data sets are bundled, or downloaded with a checksum."""
    folders = {name for name in names if name and name.startswith("folder:")}
    if not folders:
        return {}
    from geodesic import data

    found: dict[str | None, str] = {}
    for name in folders:
        with contextlib.suppress(OSError, ValueError):  # of which `check` complains, should a run need them
            found[name] = data.load(name, root).fingerprint
    return found


def _plan(out: Path, path: Path) -> Path:
    return out / "plans" / f"{path.stem}.json"


def _planned(out: Path, path: Path, digest: str) -> list[dict[str, Any]] | None:
    """The runs of a grid that was checked before, if nothing has changed since."""
    try:
        plan = json.loads(_plan(out, path).read_text(encoding="utf-8"))
        return plan["runs"] if plan["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path, notebook: Path) -> str:
    """Changes with the grid, the notebook and the library's source."""
    digest = hashlib.sha256()
    for file in (path, notebook, *sorted(Path(geodesic.__file__).parent.rglob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _expand(
    path: Path, document: Mapping[str, Any], notebook: Path, declared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Name and settings of every run, each once, in the order of the file."""
    from geodesic import records

    kinds, complete = _schema(notebook, declared)
    found: dict[str, dict[str, Any]] = {}
    tables = document.get("runs", [{}])
    for number, table in enumerate(tables, 1):
        where = f"{path}, table {number} of [[runs]]" if "runs" in document else str(path)
        fixed, axes = _overlay(where, document, table)
        _refuse_unknown(where, fixed | axes, kinds, "setting")
        for key, values in axes.items():
            if not isinstance(values, list):
                raise ValueError(f"{where}: axis {key} = {values!r} must be a list of values")
            if not values:
                raise ValueError(f"{where}: axis {key} is empty; give it a value or leave it out")
        for key, value in [*fixed.items(), *((key, value) for key, values in axes.items() for value in values)]:
            if not _fits(value, kinds[key]):
                hint = "; put it under axes to run each of its values" if isinstance(value, list) else ""
                raise ValueError(f"{where}: {key} = {value!r} must be {_in_words(kinds[key])}{hint}")
        fixed = {key: _typed(value, kinds[key]) for key, value in fixed.items()}
        axes = {key: [_typed(value, kinds[key]) for value in values] for key, values in axes.items()}
        for values in itertools.product(*axes.values()):
            try:
                settings = complete(fixed | dict(zip(axes, values, strict=True)))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            found[records.name(settings)] = settings
    if not found:
        raise ValueError(f"{path}: [[runs]] is empty; give it a table or leave it out")
    return [{"name": name, "settings": settings} for name, settings in found.items()]


def _schema(notebook: Path, declared: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Type of every setting, and the function that fills in the others' defaults."""
    if not declared.keys() >= _SIGNATURE:
        defaults = {key: value for key, value in declared.items() if key not in CONTROLS}
        kinds = {key: Any if value is None else type(value) for key, value in defaults.items()}
        return kinds, lambda values: {"notebook": notebook.stem, **defaults, **values}
    from geodesic.experiment import Settings

    hints = typing.get_type_hints(Settings)
    if missing := sorted(hints.keys() - declared.keys()):
        raise ValueError(f"the parameters cell of {notebook} lacks {', '.join(missing)}; add what Settings has")
    return hints, lambda values: Settings.from_dict(values).to_dict()


def _overlay(where: str, document: Mapping[str, Any], table: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A table's settings and axes, laid over those of the whole file."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must hold settings and axes, not {table!r}")
    _refuse_unknown(where, table, ("settings", "axes"), "entry")
    parts = [source.get(part, {}) for source in (document, table) for part in ("settings", "axes")]
    for part, name in zip(parts, ("settings", "axes") * 2, strict=True):
        if not isinstance(part, dict):
            raise ValueError(f"{where}: {name} must be a table, not {part!r}")
    all_fixed, all_axes, fixed, axes = parts
    fixed = {key: value for key, value in all_fixed.items() if key not in axes} | fixed
    axes = {key: value for key, value in all_axes.items() if key not in parts[2]} | axes
    if both := sorted(fixed.keys() & axes.keys()):
        raise ValueError(f"{where}: {', '.join(both)} is both a fixed setting and an axis; leave one of them out")
    return fixed, axes


def _refuse_unknown(where: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name in known:
            continue
        if name in CONTROLS:
            raise ValueError(f"{where}: {name} says where to run, not what; give it on the command line as --{name}")
        close = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
        raise ValueError(f"{where}: unknown {what} {name}; {hint}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value has the type of a setting; a whole number serves as a number, true and false do not."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(kind))
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _typed(value: Any, kind: Any) -> Any:
    """A whole number as the number it stands for: one run has one name, whether its λ was written 0 or 0.0."""
    return float(value) if type(value) is int and float in (kind, *typing.get_args(kind)) else value


def _in_words(kind: Any) -> str:
    if kind == tuple[int, ...]:
        return "a list of whole numbers"
    if isinstance(kind, types.UnionType):
        return " or ".join(_in_words(member) for member in typing.get_args(kind) if member is not types.NoneType)
    return _WORDS.get(kind, str(kind))


def _label(one: Mapping[str, Any], varying: Sequence[str]) -> str:
    values = [(key, one["settings"][key]) for key in varying]
    parts = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values]
    return " ".join(parts) or one["name"]
