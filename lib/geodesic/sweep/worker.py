"""What happens on a worker of a sweep: one run in a kernel of its own, under a lock, with a deadline.

Nothing here imports torch, so that a worker stays small; the runs' kernels import what they need. Used by `dispatch`.

A run is done if and only if its record is there, whole, with its settings: nothing else is ever asked. The lock is one
that the system takes back when the last process holding it ends, and the run's kernel inherits it: whatever is killed,
the lock stands exactly as long as somebody computes.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geodesic

LAST_LINES = 12  # of a failed run's output, kept in its row
_NANNY_TRIM = "65536"  # bytes; distributed.nanny.pre-spawn-environ
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_DECIDE = ("torch", "numpy", "scipy", "papermill", "dask")  # packages whose versions must agree


@dataclass(frozen=True)
class Run:
    """One point of a grid, and what its record must say."""

    name: str  # of its record: the hash of its settings
    settings: dict[str, Any]
    label: str  # the settings in which the runs of the grid differ
    code: str  # that matters for it, see `made_by`
    data: str | None  # their fingerprint; None if their name alone says what they are


@dataclass(frozen=True)
class Job(Run):
    """A run, and all that a worker needs to execute it."""

    parameters: dict[str, Any]  # for the notebook's parameters cell
    notebook: str
    out: str
    cwd: str  # the client's current folder, where the kernel begins
    experiment: bool  # whether the notebook writes the record itself
    timeout: float  # seconds
    threads: int | None  # of the kernel; None leaves what the worker's environment says
    gpus: tuple[str, ...]  # visible devices to share out among the workers
    versions: dict[str, str]  # of the client


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "computed", "reused", "busy" (somebody else holds its lock) or "failed"."""

    name: str
    status: str
    why: str = ""  # of a failure: error, timeout, died, diverged, worker
    seconds: float = 0.0
    lines: tuple[str, ...] = ()  # the last ones of a failed run


def execute(job: Job) -> Outcome:
    """Compute a run unless it is done or being computed; never raises for what the run itself does."""
    folder = Path(job.out)
    if different := differences(job.versions, versions()):
        return Outcome(job.name, "failed", "worker", lines=(f"{socket.gethostname()}: {different}",))
    try:
        with lock(folder / "locks" / job.name) as held:
            if held is None:
                return Outcome(job.name, "busy")
            if (record := recorded(folder, job)) is not None:
                return judged(job.name, "reused", record)
            for place in (folder, folder / "checkpoints"):  # what a killed process was writing
                for partial in place.glob(f"{job.name}.*.partial"):
                    partial.unlink(missing_ok=True)
            outcome = _compute(job, folder, held)
            _note(folder, job, outcome)
            return outcome
    except OSError as error:
        return Outcome(job.name, "failed", "error", lines=(f"{type(error).__name__}: {error}",))


def recorded(folder: Path, run: Run) -> dict[str, Any] | None:
    """The record of a run, if it is there, whole, and of the run's settings, code and data."""
    try:
        record = json.loads((folder / f"{run.name}.json").read_bytes())
        provenance = record["provenance"]
        same = record["settings"] == run.settings and made_by(provenance) == run.code
        return record if same and run.data in (None, provenance.get("data_fingerprint")) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def made_by(provenance: Mapping[str, Any]) -> str:
    """The code that matters for a record: the package's version, as far as it decides numbers (`geodesic.computes`).

    A notebook that is not the book's experiment computes by itself; its records say so with a digest of its cells.
    """
    return provenance.get("code") or f"geodesic {geodesic.computes(provenance['geodesic'])}"


def judged(name: str, status: str, record: Mapping[str, Any], seconds: float = 0.0) -> Outcome:
    """The outcome of a run that left a record: a diverged network is a failure that is not worth repeating."""
    if record.get("status") != "diverged":
        return Outcome(name, status, seconds=seconds)
    losses = [entry["train"]["loss"] for entry in record.get("epochs", [])]
    line = f"training loss by epoch: {', '.join('not finite' if loss is None else f'{loss:.3g}' for loss in losses)}"
    return Outcome(name, "failed", "diverged", seconds, (line,))


@contextlib.contextmanager
def lock(path: Path) -> Iterator[int | None]:
    """Hold a lock and yield its file descriptor, or yield None if somebody else holds it.

    The file says who took it last; it may be deleted when nothing runs.

    Raises:
        OSError: on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        yield file.fileno()


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file; a reader sees the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What must be the same on the client and on every worker, found without importing any of it."""
    found = {"geodesic": geodesic.__version__, "python": platform.python_version()}
    for package in _DECIDE:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def differences(client: Mapping[str, str], worker: Mapping[str, str]) -> str:
    """In words, how the versions differ; empty if they agree."""
    odd = [package for package in client if client[package] != worker.get(package)]
    return ", ".join(f"{package} {worker.get(package)} (client: {client[package]})" for package in odd)


def inspect(token: str, cwd: str) -> dict[str, Any]:
    """What the client wants to know of a worker: versions, processor cores, and what is wrong with its file system."""
    problem = ""
    try:
        Path(token).read_bytes()
        os.listdir(cwd)
        with lock(Path(token).with_suffix(f".{os.getpid()}.lock")):
            pass
    except OSError as error:
        problem = f"cannot use the sweep's folders: {error}"
    return {"versions": versions(), "host": socket.gethostname(), "problem": problem}


def check(settings: list[dict[str, Any]], root: str, device: str, download: bool, cwd: str) -> str:
    """What `sweep.check` has to say about the settings on this machine; empty if nothing is wrong.

    It runs in a process of its own, so that the worker does not keep the data and the libraries in memory.
    """
    code = (
        "import json, sys\n"
        "from geodesic import sweep\n"
        "try:\n    sweep.check(*json.load(sys.stdin))\n"
        "except (ValueError, OSError, RuntimeError) as error:\n    sys.exit(f'{error}')\n"
    )
    command = [sys.executable, "-c", code]
    given = json.dumps([settings, root, device, download])
    run = subprocess.run(command, input=given, capture_output=True, text=True, cwd=cwd)
    return "" if run.returncode == 0 else (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]


def _compute(job: Job, folder: Path, held: int) -> Outcome:
    """Execute the notebook, and judge by the record that it left."""
    from geodesic.sweep import kernel  # papermill: half a second that a worker without work need not spend

    start = time.monotonic()
    notebooks = folder / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    running = notebooks / f"{job.name}.running.ipynb"
    ended = kernel.execute(
        job.notebook, running, job.parameters, timeout=job.timeout, environment=_environment(job), cwd=job.cwd,
        keep_open=(held,), warm=job.experiment,
    )  # fmt: skip
    seconds = round(time.monotonic() - start, 2)
    with contextlib.suppress(OSError):  # the notebook is for reading; the record is what counts
        os.replace(running, notebooks / f"{job.name}.ipynb")
    if not ended.why and not job.experiment:
        provenance = versions() | {"seconds": seconds, "device": platform.processor() or platform.machine()}
        provenance["code"] = job.code
        record = {"settings": job.settings, "status": "ok", "final": ended.displayed, "provenance": provenance}
        write_json(folder / f"{job.name}.json", record)
    if (record := recorded(folder, job)) is not None:
        return judged(job.name, "computed", record, seconds)
    if not ended.why:
        line = f"the notebook left no record {job.name}.json of these settings and data"
        return Outcome(job.name, "failed", "error", seconds, (line,))
    lines = [line for text in ended.lines for line in _ANSI.sub("", text).splitlines() if line.strip()]
    return Outcome(job.name, "failed", ended.why, seconds, tuple(lines[-LAST_LINES:]))


def _note(folder: Path, job: Job, outcome: Outcome) -> None:
    """Keep a failed run's row, and of a finished run nothing but its record and notebook."""
    row = folder / "failures" / f"{job.name}.json"
    if outcome.status == "failed":
        with contextlib.suppress(OSError):  # on a full disk the row is still shown at the end
            write_json(row, failure(job, outcome))
        return
    row.unlink(missing_ok=True)
    (folder / "checkpoints" / f"{job.name}.safetensors").unlink(missing_ok=True)


def failure(job: Job, outcome: Outcome) -> dict[str, Any]:
    """A failed run as it is kept."""
    return {
        "settings": job.settings,
        "status": outcome.why,
        "seconds": outcome.seconds,
        "host": socket.gethostname(),
        "notebook": f"notebooks/{job.name}.ipynb",
        "last_lines": list(outcome.lines),
    }


def _environment(job: Job) -> dict[str, str]:
    """The kernel's environment: as many threads as it may use, and its share of the GPUs."""
    environment = dict(os.environ)
    # Dask's nanny wants memory given back at once; a training run then spends a third of its time on page faults.
    if environment.get("MALLOC_TRIM_THRESHOLD_") == _NANNY_TRIM:
        del environment["MALLOC_TRIM_THRESHOLD_"]
    if job.threads:
        for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
            environment[f"{library}_NUM_THREADS"] = str(job.threads)
    if job.gpus:
        from distributed import get_worker

        environment["CUDA_VISIBLE_DEVICES"] = job.gpus[int(get_worker().name) % len(job.gpus)]
    return environment
