"""The client's side of a sweep: find or start workers, check them, hand out the runs, show how it goes.

What a worker does with a run is in `worker`.
"""

import contextlib
import importlib.util
import itertools
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geodesic.sweep import worker
from geodesic.sweep.grid import CONTROLS, Grid, Run
from geodesic.sweep.progress import Display, outlook, say
from geodesic.sweep.worker import Job, Outcome

_ANSWER = 15.0  # seconds in which a scheduler must answer
_LOOK_AGAIN = 2.0  # seconds between looks at a run that another sweep computes
# What the extra `sweep` installs; a kernel is started by name, so that nothing here imports the last.
_EXTRA = ("papermill", "dask", "distributed", "nbclient", "nbformat", "jupyter_client", "ipykernel")
# Of a cluster started here: a worker gets no run that it cannot begin; and Dask, which by default looks at itself a
# hundred times a second, in every process, leaves the cores to the runs (of two cores it took four hundredths).
_LOCAL = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
}


@dataclass(frozen=True)
class Options:
    """Where and how to run. Defaults fit the machine at hand."""

    scheduler: str | None = None  # address of a running Dask scheduler; None starts workers here
    workers: int | None = None  # of a local cluster; None: one a core, or one a GPU
    threads: int | None = None  # of each run; None: an even share of the cores, or what the cluster says
    timeout: float = 86400.0  # seconds a run may take
    retries: int = 0  # further attempts at a run that failed
    device: str = "cpu"
    root: str | None = None  # folder of the data
    download: bool = False
    show: bool = True  # progress on stderr


def execute(grid: Grid, runs: Sequence[Run], options: Options, expected: Mapping[str, float]) -> list[Outcome]:
    """Compute the runs that are not recorded; one outcome for each, in the order of their end.

    Args:
        grid: where they come from.
        runs: what is to be computed.
        options: where and how.
        expected: seconds that runs may take, by name, as far as known.

    Raises:
        ValueError: for settings that cannot run where the workers are.
        RuntimeError: if a library of the extra `sweep` is missing, the cluster is not fit, or its scheduler goes away.
    """
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise RuntimeError(
            f"a sweep needs {', '.join(missing)}: run pip install '.[sweep]' in the checkout of geodesic, "
            "or compute the runs with --in-process, which needs none of them"
        )
    with _connect(options) as (client, width):
        _inspect(client, grid, options.show)
        if grid.experiment:
            settings = [run.settings for run in runs]
            asked = (settings, _root(options), options.device, options.download, os.getcwd())
            wrong = client.submit(worker.check, *asked, pure=False).result()
            if wrong:
                raise ValueError(wrong)
        jobs = _jobs(grid, runs, options, width)
        labels = {run.name: run.label for run in runs}
        if options.show:
            say(outlook(grid, list(labels), expected, max(_width(client), 1)))
        with Display(labels, expected, _width(client), options.show) as display:
            return _hand_out(client, jobs, options.retries, display)


def _hand_out(client: Any, jobs: Sequence[Job], retries: int, display: Display) -> list[Outcome]:
    """Submit every job, again while others compute it or attempts are left, until each has ended."""
    from distributed import wait
    from distributed.client import FuturesCancelledError

    # Keys of one group, which is this sweep's alone: only then does Dask keep back what no worker can begin yet. Else a
    # worker would hold many runs, and with it those that it has not begun would count as lost, too.
    group, numbers = f"sweep-{secrets.token_hex(4)}", itertools.count()

    def submit(batch: Sequence[tuple[Job, int]]) -> dict[Any, tuple[Job, int]]:
        some = [job for job, _ in batch]
        futures = client.map(worker.execute, some, key=[(group, next(numbers)) for _ in some], pure=False)
        return dict(zip(futures, batch, strict=True))

    running = submit([(job, 0) for job in jobs])
    later: list[tuple[float, Job, int]] = []
    ended: list[Outcome] = []
    while running or later:
        now = time.monotonic()
        if due := [one for one in later if one[0] <= now]:
            later = [one for one in later if one[0] > now]
            running |= submit([(job, attempt) for _, job, attempt in due])
        with contextlib.suppress(TimeoutError, FuturesCancelledError):
            if running:
                wait(list(running), timeout=1, return_when="FIRST_COMPLETED")
            else:
                time.sleep(_LOOK_AGAIN / 4)
        if client.status != "running" or any(future.status in ("cancelled", "lost") for future in running):
            raise RuntimeError(
                f"the scheduler went away; {len(ended)} of {len(jobs)} runs are done and kept: start the same again"
            )
        for future in [future for future in running if future.done()]:
            job, attempt = running.pop(future)
            outcome = _outcome(future, job)
            if outcome.status == "busy":
                later.append((time.monotonic() + _LOOK_AGAIN, job, attempt))
            elif outcome.status == "failed" and outcome.why != "diverged" and attempt < retries:
                later.append((time.monotonic(), job, attempt + 1))
            else:
                ended.append(outcome)
                display.ended(outcome)
        display.refresh(_busy(client, group), _width(client), sum(when > now for when, _, _ in later))
    return ended


def _busy(client: Any, group: str) -> int:
    """Runs of a sweep under way: a worker's threads may have a run waiting beyond those that they execute."""
    try:
        threads = client.nthreads()
        held = {worker: sum(key[0] == group for key in keys) for worker, keys in client.processing().items()}
    except Exception:  # the scheduler is going; the next look at the client says so
        return 0
    return sum(min(count, threads.get(worker, 1)) for worker, count in held.items())


def _width(client: Any) -> int:
    """Runs that the cluster can execute at once; 0 if it does not say."""
    try:
        return sum(client.nthreads().values())
    except Exception:  # as above
        return 0


def _outcome(future: Any, job: Job) -> Outcome:
    """What the worker said; if it was lost with the run, again and again, that is the run's failure."""
    if future.status == "finished":
        return future.result()
    lines = tuple(str(future.exception()).splitlines()[: worker.LAST_LINES])
    outcome = Outcome(job.name, "failed", "worker", lines=lines)
    with contextlib.suppress(OSError):
        worker.write_json(Path(job.out) / "failures" / f"{job.name}.json", worker.failure(job, outcome))
    return outcome


def _jobs(grid: Grid, runs: Sequence[Run], options: Options, width: int | None) -> list[Job]:
    """What the workers are told; `width` is the number of workers started here, if any."""
    out = grid.out.absolute()
    controls = {
        "out": str(out),
        "checkpoints": str(out / "checkpoints"),
        "root": _root(options),
        "device": options.device,
        "download": False,  # the data were fetched once, by the check
    }
    controls = {key: controls[key] for key in CONTROLS if key in grid.parameters}
    common = {
        "notebook": str(grid.notebook.absolute()),
        "out": str(out),
        "cwd": os.getcwd(),
        "experiment": grid.experiment,
        "timeout": options.timeout,
        "threads": options.threads or (max(1, cores() // width) if width else None),
        "gpus": _gpus(options) if width else (),
        "versions": worker.versions(),
    }
    return [
        Job(
            **vars(run),
            parameters={key: value for key, value in run.settings.items() if key in grid.parameters} | controls,
            **common,
        )
        for run in runs
    ]


@contextlib.contextmanager
def _connect(options: Options) -> Iterator[tuple[Any, int | None]]:
    """A client, and the number of workers if they were started here."""
    import dask
    from distributed import Client, LocalCluster

    _quieten()
    if options.scheduler:
        try:
            client = Client(options.scheduler, timeout=_ANSWER)
        except (OSError, TimeoutError, ValueError) as error:
            raise RuntimeError(
                f"no Dask scheduler answers at {options.scheduler} within {_ANSWER:g} s "
                f"({type(error).__name__}); start one with `dask scheduler`, or leave --scheduler out"
            ) from error
        with client:
            yield client, None
        return
    width = options.workers or len(_gpus(options)) or (cores() if options.device == "cpu" else 1)
    with warnings.catch_warnings(), dask.config.set(_LOCAL):
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        cluster = LocalCluster(
            n_workers=width, threads_per_worker=1, processes=True, memory_limit=0,
            dashboard_address="127.0.0.1:8787", silence_logs=logging.CRITICAL,
        )  # fmt: skip
    with cluster, Client(cluster) as client:
        yield client, width


def _inspect(client: Any, grid: Grid, show: bool) -> None:
    """Refuse workers of other versions, and workers that do not see the folder of the records."""
    while not client.scheduler_info(n_workers=-1)["workers"]:
        say(f"the scheduler at {client.scheduler.address} has no worker yet; waiting (Ctrl-C to leave)")
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(1, timeout=60)
    if show and "dashboard" in client.scheduler_info()["services"]:
        page = "status" if importlib.util.find_spec("bokeh") else "info/main/workers.html"  # a table without bokeh
        say(f"Dask dashboard: {client.dashboard_link.removesuffix('status')}{page}")
    token = grid.out.absolute() / "locks" / f"{secrets.token_hex(8)}.token"
    worker.write_json(token, None)
    try:
        found = client.run(worker.inspect, str(token), os.getcwd(), on_error="return")
    finally:
        for file in token.parent.glob(f"{token.stem}.*"):
            file.unlink(missing_ok=True)
    for address, answer in found.items():
        if isinstance(answer, BaseException):
            raise RuntimeError(f"worker {address} cannot run geodesic ({answer}); install the same version there")
        if different := worker.differences(worker.versions(), answer["versions"]):
            raise RuntimeError(f"worker {address} on {answer['host']} differs: {different}; install the same there")
        if answer["problem"]:
            raise RuntimeError(f"worker {address} on {answer['host']} {answer['problem']}")


def _root(options: Options) -> str:
    """Where the data are, as the client means it: a worker has another environment and another current folder."""
    return str(Path(options.root or os.environ.get("GEODESIC_DATA") or "data").absolute())


def cores() -> int:
    """Processor cores that this process may use, as affinity and a container's limits say."""
    try:
        from dask.system import CPU_COUNT
    except ModuleNotFoundError:  # a dry run, which begins nothing
        return len(os.sched_getaffinity(0))
    return int(CPU_COUNT)


def _gpus(options: Options) -> tuple[str, ...]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none if the device is one in particular."""
    if options.device != "cuda":
        return ()
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(visible.split(","))
    import torch

    return tuple(str(index) for index in range(torch.cuda.device_count()))


def _quieten() -> None:
    """Dask's log repeats, at length, what the display says in a word."""
    for name in [*logging.root.manager.loggerDict, "tornado.application"]:
        if name.startswith(("distributed", "tornado")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
