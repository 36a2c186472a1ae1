"""Runs of a grid without notebooks and without a cluster: on a bare machine, within a time budget.

`execute` calls `experiment` in processes of this machine, and needs torch and nothing else: no papermill, no Dask, no
Jupyter. Records, locks and checkpoints are those of a sweep with notebooks, so that either continues the other.

On a CPU every process takes one run after another from a queue. On a CUDA device one process trains, several networks
side by side (see `training.train_many`), and leaves each run's last checkpoint to the others, which have nothing left
to train and score it. Used by `python -m geodesic sweep --in-process`.
"""

import contextlib
import multiprocessing
import os
import queue
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geodesic import records, store
from geodesic.sweep import worker
from geodesic.sweep.grid import Grid
from geodesic.sweep.progress import Display, outlook, pace, say
from geodesic.sweep.worker import Outcome, Run

_LOOK = 0.05  # seconds between looks at what the processes have ended


@dataclass(frozen=True)
class Options:
    """Where and how to run."""

    processes: int | None = None  # None: one a core on a CPU; for scoring beside a CUDA device half as many
    together: int = 8  # networks in training at a time on a CUDA device
    budget: float | None = None  # seconds after which no run is begun and those under way are kept for later
    device: str = "cpu"
    root: str | None = None
    download: bool = False
    show: bool = True


def ordered(runs: Sequence[Run], fields: Sequence[str]) -> list[Run]:
    """The runs in ascending order of these settings, the first counting most; others stay in the grid's order.

    Raises:
        ValueError: for a setting that the runs do not have.
    """
    for name in fields:
        if runs and name not in runs[0].settings:
            raise ValueError(f"--order {name}: no such setting; there are: {', '.join(sorted(runs[0].settings))}")
    return sorted(runs, key=lambda run: [_sortable(run.settings[name]) for name in fields])


def execute(grid: Grid, runs: Sequence[Run], options: Options, expected: Mapping[str, float]) -> list[Outcome]:
    """Compute runs that are not recorded, in their order, as many as the budget allows.

    No run is begun that is not expected to end in time. What is expected comes from the runs of its kind that ended
    here, else from their records; the first of a kind is tried. What is under way when the time is over ends its
    epoch and is kept as a checkpoint.

    Args:
        grid: where the runs come from; its notebook is not executed.
        runs: what is to be computed, the most telling first.
        options: where and how.
        expected: seconds that runs may take, by name, as far as records tell.

    Returns:
        One outcome for each run that came to its end here, in the order of their end.

    Raises:
        ValueError: for a grid whose notebook is not the book's experiment, or settings that cannot run here.
    """
    if not grid.experiment:
        raise ValueError(f"--in-process runs the book's experiment; {grid.notebook} is another notebook: leave it out")
    start = time.monotonic()
    settings = [run.settings for run in runs]
    wrong = worker.check(settings, options.root or "", options.device, options.download, os.getcwd())
    if wrong:
        raise ValueError(wrong)
    clock = _Clock(start, options.budget, dict(expected), grid.out / "checkpoints")
    apart = _trains_apart(options)
    cores = len(os.sched_getaffinity(0))
    processes = min(options.processes or max(1, cores // 2 if apart else cores), len(runs))
    labels = {run.name: run.label for run in runs}
    if options.show:
        say(outlook(grid, list(labels), expected, processes))
    with (
        Display(labels, expected, processes, options.show) as display,
        _Pool(grid.out, processes, options, clock.deadline) as pool,
    ):
        course = _trained_here(grid.out, runs, options, clock, pool) if apart else _trained_there(runs, clock, pool)
        ended = []
        for outcome in course:
            ended.append(outcome)
            clock.learn(outcome)
            if outcome.status != "left":
                display.ended(outcome)
            display.refresh(pool.busy, processes, 0)
    return [outcome for outcome in ended if outcome.status != "left"]


def _trains_apart(options: Options) -> bool:
    """Whether this process trains and the pool scores."""
    return options.device.startswith("cuda")


def _sortable(value: Any) -> tuple[str, Any]:
    """Numbers among themselves, strings among themselves; None and lists by what they look like."""
    if isinstance(value, int | float):
        return "", value
    return type(value).__name__, value if isinstance(value, str) else repr(value)


@dataclass
class _Clock:
    """What a budget leaves."""

    start: float
    budget: float | None
    expected: dict[str, float]  # seconds by name of run, from records
    checkpoints: Path  # of runs that were begun before
    took: dict[str, list[float]] = field(default_factory=dict)  # seconds by kind of run, of those that ended here
    kinds: dict[str, str] = field(default_factory=dict)  # by name of run

    @property
    def deadline(self) -> float | None:
        return None if self.budget is None else self.start + self.budget

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def enough_for(self, run: Run) -> bool:
        """Whether a run may be expected to end in time."""
        from geodesic import checkpoints  # imports torch, which a finished sweep does without

        epochs = run.settings.get("epochs", 0)
        kind = self.kinds.setdefault(run.name, f"{pace(run.settings)}|{epochs}")
        seen = self.took.get(kind)
        wanted = statistics.median(seen) if seen else self.expected.get(run.name, 0.0)
        done = checkpoints.epochs_done(records.checkpoint(run.settings, self.checkpoints))
        return self.left() > wanted * (1 - done / epochs if epochs else 1)

    def learn(self, outcome: Outcome) -> None:
        """Note how long a run took."""
        if outcome.status == "computed":
            self.took.setdefault(self.kinds.get(outcome.name, ""), []).append(outcome.seconds)


class _Pool:
    """Processes that compute one run after another, or what is left to do of it."""

    def __init__(self, out: Path, processes: int, options: Options, deadline: float | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.todo, self.done = context.Queue(), context.Queue()
        self.busy = 0
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        arguments = (self.todo, self.done, out, options, deadline, threads)
        self.processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]

    def __enter__(self) -> "_Pool":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for _ in self.processes:
            self.todo.put(None)
        for process in self.processes:
            process.join(None if kind is None else 1.0)
            if process.is_alive():
                process.terminate()

    def put(self, run: Run, held: bool) -> None:
        """Ask for a run; `held` says that its lock is held here."""
        self.todo.put((run, held))
        self.busy += 1

    def ended(self) -> Iterator[Outcome]:
        """What has come to its end since the last look.

        Raises:
            RuntimeError: if a process died.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                outcome = self.done.get_nowait()
                self.busy -= 1
                yield outcome
        if dead := [process for process in self.processes if process.exitcode not in (None, 0)]:
            raise RuntimeError(
                f"a process of the sweep died (exit code {dead[0].exitcode}; killed for memory?); what is finished is "
                "kept: the same command continues, with fewer --processes if memory was short"
            )


def _trained_there(runs: Sequence[Run], clock: _Clock, pool: _Pool) -> Iterator[Outcome]:
    """Let every process of the pool train and score; a run is handed out when a process is free for it."""
    waiting = list(runs)
    while waiting or pool.busy:
        while waiting and pool.busy < len(pool.processes):
            run = waiting.pop(0)
            if clock.enough_for(run):
                pool.put(run, held=False)
        yield from pool.ended()
        time.sleep(_LOOK)


def _trained_here(out: Path, runs: Sequence[Run], options: Options, clock: _Clock, pool: _Pool) -> Iterator[Outcome]:
    """Train on the CUDA device and let the pool score."""
    from geodesic import experiment  # imports torch

    under_way: dict[str, tuple[Run, float]] = {}
    with contextlib.ExitStack() as locks:

        def begun() -> Iterator[experiment.Settings]:
            for run in runs:
                if not clock.enough_for(run):
                    continue
                if locks.enter_context(store.lock(out / "locks" / run.name)) is None:
                    say(f"{run.label}: being computed by somebody else; passed over")
                    continue
                under_way[run.name] = run, time.monotonic()
                yield experiment.Settings.from_dict(run.settings)

        def scored() -> Iterator[Outcome]:
            for outcome in pool.ended():  # whose seconds are those of the scores alone
                yield replace(outcome, seconds=round(time.monotonic() - under_way[outcome.name][1], 2))

        course = experiment.train_many(
            begun(), root=options.root, device=options.device, download=options.download,
            checkpoints=out / "checkpoints", together=options.together, stop=lambda: clock.left() <= 0,
        )  # fmt: skip
        for member, progress in course:
            run, since = under_way[records.name(member.settings.to_dict())]
            if progress.diverged:
                record = member.record(progress)
                records.keep(record, out, out / "checkpoints")
                yield worker.judged(run.name, "computed", record, round(time.monotonic() - since, 2))
            elif progress.finished(member.settings):
                pool.put(run, held=True)
            yield from scored()
        while pool.busy:
            yield from scored()
            time.sleep(_LOOK)


def _work(todo: Any, done: Any, out: Path, options: Options, deadline: float | None, threads: int) -> None:
    """A process of the pool: take runs until there are no more."""
    import torch

    from geodesic import data, devices

    torch.set_num_threads(threads)
    loaded: dict[str, Any] = {}

    def dataset(name: str) -> Any:
        if name not in loaded:
            loaded.clear()  # one at a time: they are large
            loaded[name] = data.load(name, options.root, device=devices.find(options.device))
        return loaded[name]

    while (item := todo.get()) is not None:
        run, held = item
        # A run whose training is over is scored even when the time is: that takes seconds.
        late = None if held or deadline is None else lambda: time.monotonic() > deadline
        try:
            done.put(_compute(run, held, out, options, dataset, late))
        except KeyboardInterrupt:
            return


def _compute(
    run: Run, held: bool, out: Path, options: Options, dataset: Callable[[str], Any], stop: Callable[[], bool] | None
) -> Outcome:
    """One run, under its lock unless the lock is held for it already."""
    from geodesic import experiment  # imports torch

    start = time.monotonic()
    with contextlib.nullcontext(-1) if held else store.lock(out / "locks" / run.name) as lock:
        if lock is None:
            return Outcome(run.name, "left")
        if (record := worker.recorded(out, run)) is not None:
            return worker.judged(run.name, "reused", record)
        try:
            record = experiment.run(
                experiment.Settings.from_dict(run.settings), dataset=dataset(run.settings["dataset"]),
                device=options.device, checkpoints=out / "checkpoints", stop=stop,
            )  # fmt: skip
            records.keep(record, out, out / "checkpoints")
        except experiment.Stopped:
            return Outcome(run.name, "left")
        except Exception:  # of one run; the others go on
            lines = traceback.format_exc().strip().splitlines()
            return Outcome(run.name, "failed", "error", lines=tuple(lines[-worker.LAST_LINES :]))
        return worker.judged(run.name, "computed", record, round(time.monotonic() - start, 2))
