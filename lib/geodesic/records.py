"""Records of runs: one small JSON file each, written atomically, named by a hash of its settings.

`write`, `read` and `rows` are all there is; figures and tables are drawn from `rows`. Used by every chapter that shows
recorded results.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import geodesic
from geodesic import devices

ROOT = Path(__file__).resolve().parents[2]  # the checkout; an installed copy without one has no recorded results
RESULTS = ROOT / "results"
_REQUIRED = ("settings", "status", "final", "provenance")

Record = dict[str, Any]


def name(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that names their record and checkpoint: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write(record: Record, folder: str | os.PathLike[str]) -> Path:
    """Write a record to folder/<hash of its settings>.json; a reader sees the whole file or none.

    Raises:
        ValueError: for a record without settings, status, final or provenance, or with a non-finite number in it.
    """
    _check(record, "the record")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name(record['settings'])}.json"
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path.name}: a record holds finite numbers only ({error}); store None instead") from error
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(_compact(text) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: str | os.PathLike[str]) -> Record:
    """Read one record.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is cut short or lacks a key.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no record {path}; run the settings it stands for again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a whole record ({error}); delete it and run its settings again") from error
    _check(record, str(path))
    return record


def load(folder: str | os.PathLike[str]) -> Iterator[Record]:
    """Every record of a folder, in the order of their names, if they may stand in one figure.

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
        record = read(path)
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
    return [_row(record, part) for record in load(folder)]


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


def _row(record: Record, part: str) -> dict[str, Any]:
    final = record["final"]
    row = {**record["settings"], "status": record["status"]}
    for where in ("train", "test"):
        row[f"{where}_accuracy"] = final[where]["accuracy"] if final else None
        row[f"{where}_loss"] = final[where]["loss"] if final else None
    row |= {"seconds": record["provenance"]["seconds"], "device": record["provenance"]["device"]}
    stages = final[part]["stages"] if final else []
    flat = [_scores(stage) for stage in stages]
    keys = _scores(None)
    row |= flat[0] if len(flat) == 1 else {key: [stage[key] for stage in flat] or None for key in keys}
    return row


def _scores(stage: Record | None) -> dict[str, Any]:
    """The scores of one stage; with None, only their names."""
    stage = stage or {}
    ots = (stage.get("ots") or [{}])[-1]
    plain = ("lsr_mean", "lsr_median", "lsr_sd", "lss_mean", "lss_median", "lss_sd", "still_share")
    return {key: stage.get(key) for key in (*plain, "segment_shares", "action", "displacement_squared")} | {
        f"ots_{key}": ots.get(key)
        for key in ("share", "share_lower", "share_upper", "cost_ratio", "monotone_share", "w2_squared", "n")
    }


def provenance(device: torch.device | str, seconds: float) -> dict[str, Any]:
    """What a reader needs to judge a number: versions, commit, device, threads, wall time in seconds."""
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {devices.processor()}"


def _commit() -> str | None:
    """The checkout's commit, with "+" where tracked files differ from it; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _check(record: Record, where: str) -> None:
    missing = [key for key in _REQUIRED if key not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; delete it and run its settings again")


def _check_code(record: Record, path: Path) -> None:
    """Records of notebooks other than the book's experiment carry a digest of their code instead."""
    provenance = record["provenance"]
    made = provenance.get("geodesic")
    if "code" not in provenance and (
        made is None or geodesic.computes(made) != geodesic.computes(geodesic.__version__)
    ):
        raise ValueError(
            f"{path} was made by geodesic {made}, and this is {geodesic.__version__}, which computes other numbers; "
            "delete it and run its settings again"
        )


def _compact(text: str) -> str:
    """Indented JSON with every list of plain values on one line: files stay small, and a diff shows what changed."""
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", text)
