"""Records of runs: one small JSON file each, whole or not there, named by a hash of its settings.

Every figure and table of a recorded result is drawn from here: `rows` and `frame` flatten a folder, `summarise` takes
means. `find` decides for the command line and the sweeps alike whether a record may stand for a run. Torch is imported
only where a record is made, so that a finished sweep is recognised at once.
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import geodesic
from geodesic import store

if TYPE_CHECKING:
    import pandas

ROOT = Path(__file__).resolve().parents[2]  # the checkout; an installed copy without one has no recorded results
RESULTS = ROOT / "results"

SCHEMA = 1  # of a record of `experiment.run`; it rises when a number changes its name or meaning. Without one: 1
EXPERIMENT = frozenset({"dataset", "network", "weight_decay", "epochs", "seed"})  # settings of such a record have these

# Settings that came after the first edition, with their defaults. While a setting has its default here it is left out
# of the name, so that the records made before it keep theirs; `read` fills it in. Each is a field of `Settings` too.
LATER: dict[str, Any] = {"decay": "weights"}


# -------------------------------------------------------------------------------------------------------------- schema
class Transport(TypedDict):
    """The optimal transport score of a stage on n points (`transport.Score`)."""

    n: int
    share: float  # of the points that the optimal assignment leaves with their own image
    share_lower: float
    share_upper: float
    cost_ratio: float
    monotone_share: float
    w2_squared: float
    identity_cost: float
    certified: NotRequired[bool]


class Stage(TypedDict, total=False):
    """Scores of a stage of L blocks on n points; mean, median and deviation are over points."""

    n: int
    still_share: float  # of the points that do not move, which have no score
    lsr_mean: float | None
    lsr_median: float | None
    lsr_sd: float | None
    lss_mean: float | None
    lss_median: float | None
    lss_sd: float | None
    segment_shares: list[float] | None  # (L,), sum 1
    action: float
    displacement_squared: float
    step_squared: list[float]  # (L,)
    state_squared: list[float]  # (L + 1,)
    ots: list[Transport]  # of nested subsets, the largest last; after training only, like all that follow
    theorem1: dict[str, Any]  # pairs of points against the paper's Theorem 1
    collapse: float | None
    pace: dict[str, float]
    one_step_error: float
    residual_alignment: dict[str, Any]


class Part(TypedDict, total=False):
    """What was measured on training or on test points."""

    loss: float | None  # mean cross-entropy, nats
    accuracy: float  # in [0, 1]
    early_exit: list[float]  # accuracy when the head reads each state of the last stage
    stages: list[Stage]
    one_step_accuracy: float
    robustness: dict[str, Any]  # of test points


class Epoch(TypedDict):
    """The network after an epoch, measured on the first points of each part; epoch 0 is untrained."""

    epoch: int
    seconds: float  # wall time since the start
    train: Part
    test: Part


class Provenance(TypedDict, total=False):
    """What a reader needs to judge a number."""

    geodesic: str
    code: str  # digest of a notebook that computes by itself, in place of the version
    commit: str | None
    python: str
    torch: str
    numpy: str
    scipy: str
    device: str
    threads: int
    seconds: float
    training_seconds: float
    data: str  # their source, for people
    data_fingerprint: str
    stacked: int  # networks that were trained together, if several
    command: str  # that makes the record again


class Record(TypedDict):
    """A record. Those of other notebooks and of the companions have their own `settings` and `final`."""

    schema: NotRequired[int]
    settings: dict[str, Any]
    status: str  # "ok", "collapsed", "diverged"; "complete" or "unfinished" of a companion
    epochs: NotRequired[list[Epoch]]
    final: Any  # {"train": Part, "test": Part}, all points, after the last epoch; None of a run that diverged
    weights: NotRequired[list[dict[str, Any]] | None]
    plane: NotRequired[dict[str, Any] | None]
    provenance: Provenance


# ---------------------------------------------------------------------------------------------------- names, the files
def name(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that names their record and checkpoint: 16 hexadecimal digits."""
    named = json.loads(json.dumps(settings))  # as it will be read: a tuple is a list, every key a string
    if named.keys() >= EXPERIMENT:
        named = {key: value for key, value in named.items() if key not in LATER or value != LATER[key]}
    return store.digest(json.dumps(named, sort_keys=True))


def checkpoint(settings: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Where a run keeps its state while it is unfinished."""
    return Path(folder) / f"{name(settings)}.safetensors"


def write(
    record: Mapping[str, Any], folder: str | os.PathLike[str], checkpoints: str | os.PathLike[str] | None = None
) -> Path:
    """Write a record to folder/<hash of its settings>.json; a reader sees the whole file or none.

    Args:
        record: see `Record`.
        folder: made if it is not there.
        checkpoints: folder of the run's checkpoint, which goes, now that its record is there.

    Raises:
        ValueError: for what is not a record, or one with a non-finite number in it.
        OSError: if it cannot be written; see `keep`.
    """
    _check(record, "the record")
    path = Path(folder) / f"{name(record['settings'])}.json"
    store.write(path, _text(record, path.name))
    if checkpoints is not None:
        checkpoint(record["settings"], checkpoints).unlink(missing_ok=True)
    return path


def keep(
    record: Mapping[str, Any], folder: str | os.PathLike[str], checkpoints: str | os.PathLike[str] | None = None
) -> Path:
    """Write a record, and where the disk refuses it lose nothing: its text goes elsewhere, at the last to stderr.

    Raises:
        OSError: if it could not be written to the folder; the message says where the text is.
    """
    try:
        return write(record, folder, checkpoints)
    except OSError as error:
        file = f"{name(record['settings'])}.json"
        text = _text(record, file)
        try:
            handle, fallback = tempfile.mkstemp(f"-{file}", "geodesic-")
            with os.fdopen(handle, "w") as other:
                other.write(text)
            where = f"it is in {fallback}: move it to {Path(folder) / file}"
        except OSError:
            sys.stderr.write(text)
            where = f"its text stands above: put it into {Path(folder) / file}"
        raise OSError(f"the record could not be written to {folder} ({error.strerror or error}); {where}") from error


def read(path: str | os.PathLike[str]) -> Record:
    """Read one record; settings that are younger than it have their defaults.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is cut short, is not a record, or lacks something.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no record {path}; run the settings it stands for again") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a whole record ({error}); delete it and run its settings again") from error
    _check(record, str(path))
    if record["settings"].keys() >= EXPERIMENT:
        record["settings"] |= {key: value for key, value in LATER.items() if key not in record["settings"]}
    return record


def find(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], *, code: str | None = None, data: str | None = None
) -> tuple[Record | None, str]:
    """The record that may stand for a run, or why the run is to be computed: "" if there is no file.

    Args:
        folder: of records.
        settings: complete, as JSON values.
        code: what would compute it, see `made_by`; None is this library.
        data: fingerprint of the data; None if their name alone says what they are.
    """
    path = Path(folder) / f"{name(settings)}.json"
    try:
        record = read(path)
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        return None, str(error).removesuffix("; delete it and run its settings again")
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror or error})"
    made, want = made_by(record["provenance"]), code or made_by({"geodesic": geodesic.__version__})
    used = record["provenance"].get("data_fingerprint")
    if record["settings"] != settings:
        return None, f"{path} holds other settings"
    if made != want:
        return None, f"{path} was made by {made}, not {want}"
    if data is not None and used != data:
        return None, f"{path} was made from other data: fingerprint {used}, not {data}"
    return record, ""


def made_by(provenance: Mapping[str, Any]) -> str:
    """The code that matters for a record: the package's version, as far as it decides numbers (`geodesic.computes`).

    A notebook that is not the book's experiment computes by itself; its records say so with a digest of its cells.
    """
    version = provenance.get("geodesic")
    return provenance.get("code") or f"geodesic {geodesic.computes(version) if version else version}"


def load(folder: str | os.PathLike[str], strict: bool = True) -> Iterator[Record]:
    """Every record of a folder, in the order of their names, if they may stand in one figure.

    Args:
        folder: of records.
        strict: refuse a file that is not a whole record; else it is named in a warning and left out.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file is not a whole record, was made by another version of this package (one that differs in
            the first two numbers), or from other data under the same name than the records before it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; runs write their records there with --out {folder}")
    seen: dict[str, tuple[str, Path]] = {}  # name of a data set → fingerprint, and who had it first
    for path in sorted(folder.glob("*.json")):
        try:
            record = read(path)
        except ValueError as error:
            if strict:
                raise
            warnings.warn(f"not counted: {error}", store.Note, stacklevel=2)
            continue
        _check_code(record, path)
        dataset, fingerprint = record["settings"].get("dataset"), record["provenance"].get("data_fingerprint")
        if dataset and fingerprint:
            known, first = seen.setdefault(dataset, (fingerprint, path))
            if fingerprint != known:
                raise ValueError(
                    f"{path} was made from other data than {first.name}: {dataset} with fingerprint {fingerprint}, not "
                    f"{known}; delete those of the data that you do not mean, and run their settings again"
                )
        yield record


# -------------------------------------------------------------------------------------------------------------- tables
def frame(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """A tidy table: one row a run × stage × part, of the records of a folder.

    Columns: `run` (the record's name), every setting, `status`, `part` ("train" or "test"), `stage` (1 … K), the part's
    `loss` and `accuracy`, the stage's scores under the names of `rows`, `segment_share_1` … in place of the list, and
    `seconds` and `device`. What was not measured is missing. A record of another notebook is one row with the numbers
    that it displayed.

    Raises:
        FileNotFoundError, ValueError: as `load`.
        ModuleNotFoundError: without pandas.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("records.frame needs pandas: pip install pandas") from error
    return pandas.DataFrame([line for record in load(folder) for line in lines(record)])


def lines(record: Record) -> Iterator[dict[str, Any]]:
    """The rows of `frame` that are of one record."""
    settings, final, about = record["settings"], record["final"], record["provenance"]
    run = {"run": name(settings)} | {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    run |= {"status": record["status"]}
    place = {"seconds": float(about["seconds"]), "device": about.get("device")}
    if not _is_run(record):
        shown = final if isinstance(final, Mapping) else {}
        yield run | {key: float(value) for key, value in shown.items() if type(value) in (int, float)} | place
        return
    for part in ("train", "test"):
        measured = final[part] if final else {}
        for k, stage in enumerate(measured.get("stages") or [None] * settings.get("stages", 1), 1):
            where = {"part": part, "stage": k, "loss": measured.get("loss"), "accuracy": measured.get("accuracy")}
            yield run | where | _tidy(stage) | place


def rows(folder: str | os.PathLike[str], part: str = "test") -> list[dict[str, Any]]:
    """A flat dict per record: its settings, status, accuracies and scores on one part, "train" or "test".

    The scores are lsr, lss (mean, median, sd over points), ots_share, ots_cost_ratio, ots_monotone_share at the
    largest n scored (ots_n), and the action gaps; None where a run was not scored; a list where stages > 1.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for another part, or a file that is not a whole record.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    return [row(record, part) for record in load(folder)]


class Summary(NamedTuple):
    """Mean and sample standard deviation of n runs; the deviation of a single run is not known and stands as 0."""

    mean: float
    sd: float
    n: int


def summarise(rows: Sequence[Mapping[str, Any]], by: Sequence[str], value: str) -> dict[tuple[Any, ...], Summary]:
    """Mean ± sd of a value over the rows that agree in `by`, in ascending order of these keys; None is left out."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row[value] is not None:
            groups.setdefault(tuple(row[key] for key in by), []).append(row[value])
    return {
        key: Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
        for key, values in sorted(groups.items())
    }


def row(record: Record, part: str) -> dict[str, Any]:
    """The row of `rows` that is of one record."""
    final = record["final"]
    row = {**record["settings"], "status": record["status"]}
    for where in ("train", "test"):
        row[f"{where}_accuracy"] = final[where]["accuracy"] if final else None
        row[f"{where}_loss"] = final[where]["loss"] if final else None
    row |= {"seconds": record["provenance"]["seconds"], "device": record["provenance"].get("device")}
    stages = final[part]["stages"] if final else []
    flat = [_scores(stage) for stage in stages]
    keys = _scores(None)
    row |= flat[0] if len(flat) == 1 else {key: [stage[key] for stage in flat] or None for key in keys}
    return row


def _scores(stage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The scores of one stage; with None, only their names."""
    stage = stage or {}
    ots = (stage.get("ots") or [{}])[-1]
    plain = ("lsr_mean", "lsr_median", "lsr_sd", "lss_mean", "lss_median", "lss_sd", "still_share")
    return {key: stage.get(key) for key in (*plain, "segment_shares", "action", "displacement_squared")} | {
        f"ots_{key}": ots.get(key)
        for key in ("share", "share_lower", "share_upper", "cost_ratio", "monotone_share", "w2_squared", "n")
    }


def _tidy(stage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The scores of one stage as single values: those of `_scores`, and whatever else was measured in one number."""
    flat = _scores(stage)
    shares = flat.pop("segment_shares") or []
    flat |= {f"segment_share_{k}": share for k, share in enumerate(shares, 1)}
    for key, value in (stage or {}).items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{inner}": item for inner, item in value.items() if not isinstance(item, list | dict)}
        elif not isinstance(value, list):
            flat[key] = value
    return flat


# ---------------------------------------------------------------------------------------------------------- provenance
def provenance(device: Any, seconds: float) -> Provenance:
    """What a reader needs to judge a number: versions, commit, device (a torch.device or its name), wall time in s."""
    import torch

    device = torch.device(device)
    return {
        "geodesic": geodesic.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "numpy", "scipy")},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
    }


def _device_name(device: Any) -> str:
    import torch

    from geodesic import devices

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {devices.processor()}"


def _commit(source: Path = Path(__file__)) -> str | None:
    """Commit of the checkout that holds the package's source, "+" where tracked files differ; None outside one.

    A package that lies inside another repository, in its environment say, is not tracked by it.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook sets GIT_DIR
    git = functools.partial(
        subprocess.run, cwd=source.parent, env=clean, capture_output=True, text=True, check=True, timeout=10
    )
    try:
        git(["git", "ls-files", "--error-unmatch", source.name])
        run = git(["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


# -------------------------------------------------------------------------------------------------------------- checks
def _check(record: Any, where: str) -> None:
    """Refuse what is not a record, in words that name what is wrong with it.

    Raises:
        ValueError: as it says.
    """
    if problem := _problem(record):
        raise ValueError(f"{where} {problem}; delete it and run its settings again")


def _problem(record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"holds {json.dumps(record)[:40]}, not a record"
    if missing := [key for key in ("settings", "status", "final", "provenance") if key not in record]:
        return f"lacks {', '.join(missing)}"
    for key, kind in (("settings", Mapping), ("status", str), ("provenance", Mapping)):
        if not isinstance(record[key], kind):
            return f"has {key} {json.dumps(record[key])[:40]}"
    seconds = record["provenance"].get("seconds")
    if type(seconds) not in (int, float) or not math.isfinite(seconds):
        return f"has seconds {json.dumps(seconds)[:40]} in its provenance"
    schema = record.get("schema", 1)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        return f"has schema {json.dumps(schema)[:40]}, and this geodesic reads {SCHEMA}"
    if record["settings"].keys() >= EXPERIMENT and record["final"] is not None:
        return _problem_of_parts(record["final"])
    return ""


def _problem_of_parts(final: Any) -> str:
    for part in ("train", "test"):
        measured = final.get(part) if isinstance(final, Mapping) else None
        keys = ("accuracy", "loss", "stages")
        if not isinstance(measured, Mapping) or any(key not in measured for key in keys):
            return f"lacks {', '.join(keys)} of the {part} points"
        if not isinstance(measured["stages"], list) or any(not isinstance(s, Mapping) for s in measured["stages"]):
            return f"has stages of the {part} points that are no list of scores"
    return ""


def _is_run(record: Record) -> bool:
    """Whether it is a run's of this library, and not another notebook's."""
    final = record["final"]
    return "dataset" in record["settings"] and (final is None or {"train", "test"} <= final.keys())


def _check_code(record: Record, path: Path) -> None:
    """Records of notebooks other than the book's experiment carry a digest of their code instead."""
    about = record["provenance"]
    if "code" not in about and made_by(about) != made_by({"geodesic": geodesic.__version__}):
        raise ValueError(
            f"{path} was made by geodesic {about.get('geodesic')}, and this is {geodesic.__version__}, which computes "
            "other numbers; delete it and run its settings again"
        )


def _text(record: Mapping[str, Any], file: str) -> str:
    """Indented JSON with every list of plain values on one line: files stay small, and a diff shows what changed."""
    try:
        whole = json.loads(json.dumps(record, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{file}: a record holds finite numbers only ({error}); store None instead") from error
    return _lay_out(whole, "\n") + "\n"


def _lay_out(value: Any, line: str) -> str:
    """One value, its further lines beginning with `line`; the text of a string is never looked at."""
    inner = line + " "
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(key)}: {_lay_out(item, inner)}" for key, item in value.items())
        return "{" + _joined(items, inner) + line + "}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[" + _joined((_lay_out(item, inner) for item in value), inner) + line + "]"
    return json.dumps(value)


def _joined(items: Iterable[str], line: str) -> str:
    return ",".join(line + item for item in items)
