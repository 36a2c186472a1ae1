"""What a sweep shows: progress while it runs, the list of a dry run, the failures and the count at the end.

Used by `dispatch` and `python -m geodesic sweep`.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from geodesic.sweep.grid import Grid
from geodesic.sweep.worker import Outcome

# Settings that do not change how long an epoch takes, and the number of epochs itself.
_FREE = ("weight_decay", "learning_rate", "momentum", "schedule", "seed", "labels", "epochs")


def say(line: str) -> None:
    """A line on stderr, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(grid: Grid) -> dict[str, float]:
    """Seconds that each run may take, by name, from records of like runs beside it; runs without any are left out.

    A run takes the median time outside training, plus its epochs times the median time of an epoch.
    """
    past: dict[str, list[tuple[float, float]]] = {}
    for path in grid.out.glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            settings, seconds = record["settings"], record["provenance"]["seconds"]
            training = record["provenance"].get("training_seconds", 0.0)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        epoch = training / settings["epochs"] if settings.get("epochs") else 0.0
        past.setdefault(pace(settings), []).append((seconds - training, epoch))
    medians = {key: [statistics.median(part) for part in zip(*times, strict=True)] for key, times in past.items()}
    return {
        run.name: fixed + run.settings.get("epochs", 0) * epoch
        for run in grid.runs
        for fixed, epoch in [medians.get(pace(run.settings), (None, None))]
        if fixed is not None
    }


def pace(settings: Mapping[str, Any]) -> str:
    """The settings that decide how long a run takes, as a key."""
    return json.dumps({key: value for key, value in settings.items() if key not in _FREE}, sort_keys=True)


def listing(grid: Grid, done: Mapping[str, Outcome], expected: Mapping[str, float], width: int) -> str:
    """The runs of a grid, one a line, and how long what is missing may take on so many workers."""

    def state(name: str) -> str:
        if name in done:
            return "recorded"
        return f"~{duration(expected[name])}" if name in expected else "to compute"

    lines = [f"{run.name}  {state(run.name):<12}{run.label}" for run in grid.runs]
    todo = [run.name for run in grid.runs if run.name not in done]
    return "\n".join([*lines, outlook(grid, todo, expected, width)])


def outlook(grid: Grid, todo: Sequence[str], expected: Mapping[str, float], width: int) -> str:
    """How many runs are recorded, and how long the others may take on so many workers."""
    line = f"{len(grid.runs)} runs: {len(grid.runs) - len(todo)} recorded, {len(todo)} to compute"
    if stale := sum((grid.out / f"{name}.json").exists() for name in todo):
        line += f" ({stale} again: their records are damaged, or of other code or data)"
    workers = f"{width} worker{'s' * (width > 1)}"
    if seconds := remaining(todo, {}, expected):
        return f"{line}, about {duration(seconds / width)} on {workers} like those of the records"
    return f"{line} on {workers}; no record of a like run to tell the time from" if todo else line


def conclusion(grid: Grid, done: Mapping[str, Outcome]) -> str:
    """The failures with their last line, where to read more, and the count."""
    lines = []
    for run in grid.runs:
        outcome = done.get(run.name)
        if outcome is not None and outcome.status == "failed":
            lines += [f"{outcome.why:<9}{run.name}  {run.label}", f"         {(outcome.lines or ('',))[-1]}"]
    if lines:
        lines.append(f"failed runs: last lines in {grid.out / 'failures'}, notebooks in {grid.out / 'notebooks'}")
    counts = {status: sum(one.status == status for one in done.values()) for status in ("reused", "computed", "failed")}
    if left := len(grid.runs) - len(done):
        counts["left for the same command"] = left
    return "\n".join([*lines, f"{len(grid.runs)} runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())])


class Display:
    """Progress on stderr: a bar on a terminal, a line for each run elsewhere."""

    def __init__(self, labels: Mapping[str, str], expected: Mapping[str, float], width: int, show: bool) -> None:
        self.labels, self.expected, self.width, self.show = labels, expected, width, show
        self.left = set(labels)
        self.took: dict[str, float] = {}  # seconds of the runs computed here
        self.failed = 0
        self.told = False
        self.since = time.monotonic()  # the last end of a run
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=len(labels), disable=not (show and terminal), leave=False, file=sys.stderr,
            bar_format="{n_fmt}/{total_fmt} runs |{bar}| {elapsed}{postfix}",
        )  # fmt: skip
        self.lines = show and not terminal

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def ended(self, outcome: Outcome) -> None:
        """Count a run that came to its end."""
        self.left.discard(outcome.name)
        self.failed += outcome.status == "failed"
        self.since = time.monotonic()
        if outcome.status == "computed":
            self.took[outcome.name] = outcome.seconds
        self.bar.update()
        if self.lines or (self.show and outcome.status == "failed"):
            head = f"{time.strftime('%H:%M:%S')} [{len(self.labels) - len(self.left)}/{len(self.labels)}]"
            took = f"{outcome.seconds:7.1f} s{self.eta()}" if self.lines else ""
            say(f"{head} {outcome.why or outcome.status:<9}{took}  {self.labels[outcome.name]}")

    def refresh(self, busy: int, width: int, elsewhere: int) -> None:
        """Say how many runs are under way on how wide a cluster, and how many somebody else computes."""
        self.width = width
        if elsewhere and self.lines and not self.told:
            say("some runs are being computed by another sweep; waiting for their records")
            self.told = True
        parts = [f"{busy} running"]
        parts += [f"{elsewhere} elsewhere"] if elsewhere else []
        parts += [f"{self.failed} failed"] if self.failed else []
        self.bar.set_postfix_str(", ".join(parts) + self.eta())

    def eta(self) -> str:
        """In words, how long what is left may take."""
        work = remaining(self.left, self.took, self.expected)
        if not work or not self.width:
            return ""
        left = work / min(self.width, len(self.left)) - (time.monotonic() - self.since)
        return f", ETA {duration(max(left, 0.0))}"


def remaining(left: Iterable[str], took: Mapping[str, float], expected: Mapping[str, float]) -> float | None:
    """Seconds of work that are left; None if nothing tells.

    A run takes what records of like runs let expect, times the pace of the runs that ended here against what was
    expected of them; without like runs it takes the mean of those that ended, or of those that are left.
    """
    both = [name for name in took if name in expected]
    hoped = sum(expected[name] for name in both)
    pace = sum(took[name] for name in both) / hoped if hoped else 1.0
    known = {name: pace * expected[name] for name in left if name in expected}
    typical = [*took.values()] or [*known.values()]
    return math.fsum(known.get(name, statistics.fmean(typical)) for name in left) if typical else None
