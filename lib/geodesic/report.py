"""Records as tables: mean ± standard deviation over seeds, grouped as asked, beside the paper's numbers if wished.

Used by `python -m geodesic report` and book/sweeps.md. The paper's numbers are in paper_tables.csv, from the tables of
arXiv:2102.09235v2.
"""

import csv
import difflib
import io
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geodesic import records
from geodesic.records import Summary

SCORES = ("train_accuracy", "test_accuracy", "lsr_mean", "lss_mean", "ots_share", "ots_cost_ratio")
FORMATS = ("table", "csv", "markdown")
_PAPER = Path(__file__).with_name("paper_tables.csv")
_METRICS = {"lsr": "lsr_mean", "lss": "lss_mean", "ots": "ots_share"}  # the paper's names that differ from ours
_PERCENT = ("train_accuracy", "test_accuracy")
_ODD = ("collapsed", "diverged")  # ends that a reader must know of
_ROUNDING = 1e-6  # a deviation below this share of the mean is that of the arithmetic
_MOST_DIGITS = 6  # after the point; what is smaller is written with an exponent

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of settings and summaries, and what a reader must know of it."""

    keys: tuple[str, ...]  # columns of settings
    values: tuple[str, ...]  # columns of numbers
    rows: tuple[Row, ...]  # of Summary or None under `values`
    notes: tuple[str, ...] = ()


def rows(folder: str | os.PathLike[str], part: str = "test") -> list[Row]:
    """A flat dict for every record, with single numbers only: the mean over stages, a column for each segment's share.

    Records of other notebooks give their settings, and the numbers that the notebook displayed. A file that is not a
    whole record is named in a warning and not counted.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for another part, or records that may not stand in one table (see `records.load`).
    """
    if part not in ("train", "test"):
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    return [_flat(record, part) for record in records.load(folder, strict=False)]


def table(
    found: Sequence[Row], by: Sequence[str] | None = None, scores: Sequence[str] | None = None, seeds: str = "seed"
) -> Table:
    """Mean ± sd of the scores over runs that agree in `by`.

    Args:
        found: from `rows`.
        by: columns to group by; None takes the settings that vary, seeds aside.
        scores: columns to summarise; None takes those of SCORES that the rows have, or else every number they have.
        seeds: the setting over which means are taken.

    Raises:
        ValueError: if there is nothing to show, or a column does not exist.
    """
    if not found:
        raise ValueError("no records there; `python -m geodesic sweep GRID` makes some")
    known = list(dict.fromkeys(key for row in found for key in row))
    by = tuple(_known(by, known)) if by is not None else tuple(varying(found, but=[seeds]))
    settings = _settings(found)
    numbers = [key for key in known if key not in settings and any(isinstance(row.get(key), float) for row in found)]
    scores = tuple(_known(scores, known)) if scores else tuple(s for s in SCORES if s in known) or tuple(numbers)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row.get(key) for key in by), []).append(row)
    body = []
    for key, members in sorted(groups.items(), key=lambda item: [_rank(value) for value in item[0]]):
        summaries = {score: summary(row.get(score) for row in members) for score in scores}
        body.append(dict(zip(by, key, strict=True)) | _counts(members) | summaries)
    sizes = sorted({row["ots_n"] for row in found if row.get("ots_n")})
    notes = [f"OTS on {', '.join(f'{size:g}' for size in sizes)} points"] if sizes and "ots_share" in scores else []
    if any((row.get("stages") or 1) > 1 for row in found):
        notes.append("scores are means over the stages")
    return Table((*by, *_counted(body)), scores, tuple(body), tuple(notes))


def compare(found: Sequence[Row], scores: Sequence[str] | None = None) -> Table:
    """The paper's tables beside the records of the same data set, stages and network.

    The paper's λ are not known beyond the first, which is 0. Where as many λ were run as its table has rows, they are
    set side by side in ascending order; else only λ = 0 is. An image folder is taken for a copy of the data set that
    it is named after; a note says so.

    Raises:
        ValueError: if the paper has no table for any of the records.
    """
    scores = _known(scores or [], list(dict.fromkeys(key for row in found for key in row)))
    paper = paper_values()
    trained = [row for row in found if row.get("epochs") and row.get("labels") == "true"]
    mine = [row for row in trained if _paper_key(row["dataset"], row["stages"], row["network"]) in paper]
    if not mine:
        have = sorted({f"{dataset} with stages={k}" for dataset, k, _ in paper})
        raise ValueError(f"the paper has no table for these records; it has: {', '.join(have)}")
    by = ["dataset", "stages", "network", *(k for k in varying(mine, but=["seed"]) if k not in _AXES)]
    groups: dict[tuple[Any, ...], dict[float, list[Row]]] = {}
    for row in mine:
        groups.setdefault(tuple(row[key] for key in by), {}).setdefault(row["weight_decay"], []).append(row)
    body = []
    for key, decays in sorted(groups.items(), key=lambda item: [_rank(value) for value in item[0]]):
        theirs = paper[_paper_key(*key[:3])]
        names = scores or [name for name in theirs if not name.startswith("segment")]
        size = 1 + max(index for values in theirs.values() for index in values)
        for index, (decay, members) in enumerate(sorted(decays.items())):
            aligned = len(decays) == size or decay == 0
            line = dict(zip(by, key, strict=True)) | {"weight_decay": decay} | _counts(members)
            for name in names:
                line[name] = summary(row.get(name) for row in members)
                line[f"paper {name}"] = theirs.get(name, {}).get(index) if aligned else None
            body.append(line)
    keys = (*by, "weight_decay", "runs", *_ODD)
    values = tuple(dict.fromkeys(key for line in body for key in line if key not in keys))
    notes = [
        "paper: Tables 2-7 of arXiv:2102.09235v2; its λ are not known beyond the first, 0: where both have as many, "
        "they are set side by side in ascending order, else at 0 only",
    ]
    for name in sorted({row["dataset"] for row in mine}):
        if name.startswith(_FOLDER):
            notes.append(f"{name} is taken for a copy of {name.removeprefix(_FOLDER)}: the images may differ")
    return Table((*by, "weight_decay", *_counted(body)), values, tuple(body), tuple(notes))


def paper_values() -> dict[tuple[str, int, str], dict[str, dict[int, Summary]]]:
    """(data set, stages, network) → our name of the score → row of the paper's table → value; accuracies in [0, 1]."""
    lines = [line for line in _PAPER.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found: dict[tuple[str, int, str], dict[str, dict[int, Summary]]] = {}
    for line in csv.DictReader(lines):
        name = _METRICS.get(line["metric"], line["metric"])
        scale = 0.01 if name in _PERCENT else 1.0
        value = Summary(scale * float(line["value"]), scale * float(line["std"] or 0), 2 if line["std"] else 1)
        key = (line["dataset"], int(line["K"]), line["network"])
        found.setdefault(key, {}).setdefault(name, {})[int(line["lambda_index"])] = value
    return found


def render(table: Table, style: str = "table") -> str:
    """The table as text: aligned columns, CSV with a column for every deviation and count, or Markdown."""
    if style == "csv":
        return _csv(table)
    header = [*table.keys, *table.values]
    body = [[_text(row.get(key)) for key in header] for row in table.rows]
    if style == "markdown":
        lines = [header, ["---"] * len(header), *body]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return text + "".join(f"\n\n{note}." for note in table.notes) + "\n"
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *body]]
    return "\n".join(line.rstrip() for line in [*lines, *table.notes]) + "\n"


def varying(found: Sequence[Row], but: Iterable[str] = ()) -> list[str]:
    """The settings in which rows differ."""
    return [key for key in _settings(found) if key not in but and len({repr(row.get(key)) for row in found}) > 1]


def summary(values: Iterable[float | None]) -> Summary | None:
    """Mean and sample standard deviation of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(known))


_AXES = ("weight_decay", "dataset", "stages", "network")
_FOLDER = "folder:"


def _paper_key(dataset: str, stages: int, network: str) -> tuple[str, int, str]:
    return dataset.removeprefix(_FOLDER), stages, network


def _counts(members: Sequence[Row]) -> dict[str, int]:
    """Of the runs of a line: all, and those whose end a reader must know of."""
    return {"runs": len(members)} | {odd: sum(row["status"] == odd for row in members) for odd in _ODD}


def _counted(body: Sequence[Row]) -> tuple[str, ...]:
    """The columns of counts that a table needs."""
    return ("runs", *(odd for odd in _ODD if any(row[odd] for row in body)))


def _flat(record: records.Record, part: str) -> Row:
    """The lines of a record on one part as one row: the mean over the stages, where several were scored."""
    lines = [line for line in records.lines(record) if line.get("part", part) == part]
    settings = {key: lines[0][key] for key in record["settings"]}
    row = {key: _mean([line.get(key) for line in lines]) for line in lines for key in line if key not in _PLACE}
    row |= {"status": record["status"]} | settings
    if "part" in lines[0]:
        for where in ("train", "test"):
            measured = record["final"][where] if record["final"] else {}
            row |= {f"{where}_{key}": measured.get(key) for key in ("accuracy", "loss")}
        if len(lines) > 1:  # the stages' blocks are not each other's
            row = {key: value for key, value in row.items() if not key.startswith("segment_share_")}
    return row | {"_settings": tuple(settings)}


_PLACE = ("run", "part", "stage", "accuracy", "loss", "device")


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, float | int)]
    return statistics.fmean(known) if known else None


def _settings(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row["_settings"]))


def _known(names: Sequence[str], known: Sequence[str]) -> list[str]:
    names = [name.replace("-", "_") for name in names]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(k for k in known if k[0] != '_')}"
            raise ValueError(f"unknown column {name}; {hint}")
    return names


def _rank(value: Any) -> tuple[int, Any]:
    """An order for values of mixed types: None, numbers, then the rest."""
    if value is None:
        return 0, 0
    return (1, value) if isinstance(value, int | float) else (2, str(value))


def _text(value: Any) -> str:
    if isinstance(value, Summary):
        return _number(value)
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Summary) -> str:
    """Mean ± sd, both rounded where the deviation's first digit stands: 97.2 ± 0.1."""
    if value.n == 1 or value.sd <= _ROUNDING * abs(value.mean):
        return f"{value.mean:.4g}" + (" ± 0" if value.n > 1 else "")
    digits = -math.floor(math.log10(value.sd))
    digits = -math.floor(math.log10(round(value.sd, digits)))  # 0.97 is rounded to 1
    if digits > _MOST_DIGITS:
        return f"{value.mean:.4g} ± {value.sd:.1g}"
    return f"{value.mean:.{max(digits, 0)}f} ± {value.sd:.{max(digits, 0)}f}"


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.keys, *(column for key in table.values for column in (key, f"{key} sd", f"{key} n"))])
    for row in table.rows:
        numbers = [row.get(key) or Summary(math.nan, 0.0, 0) for key in table.values]
        cells = [cell for n in numbers for cell in (n.mean if n.n else None, n.sd if n.n > 1 else None, n.n)]
        writer.writerow([*(row[key] for key in table.keys), *cells])
    return text.getvalue()
