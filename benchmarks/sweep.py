"""What a sweep costs beside its training: against a plain papermill loop, and against stacking networks in one run.

    python benchmarks/sweep.py [--runs 32] [--epochs 10] [--workers 2] [--stack]

First a grid of digits runs, by `python -m geodesic sweep` and by `papermill.execute_notebook` in a loop, on the same
cores in one process after the other; the overhead of a run is its wall time less what `experiment.run` took. Then a
finished grid of 200. With --stack: the time of a training step of several fully connected networks one after another,
and of the same networks as one batched product. Ratios are what to quote.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import papermill
import torch
from geodesic import records, sweep

NOTEBOOK = records.ROOT / "notebooks" / "experiment.ipynb"
GRID = """
notebook = "{notebook}"
out = "{out}"
[settings]
epochs = {epochs}
batch_size = 64
eval_points = 360
[axes]
weight_decay = [0.0, 0.001, 0.01, 0.1]
network = ["resnet", "plain"]
seed = {seeds}
"""


def write_grid(folder: Path, runs: int, epochs: int, out: str) -> Path:
    path = folder / f"{out}.toml"
    path.write_text(GRID.format(notebook=NOTEBOOK, out=out, epochs=epochs, seeds=list(range(max(1, runs // 8)))))
    return path


def command(path: Path, *options: str) -> tuple[float, float]:
    """Wall and processor seconds of a sweep; those of forked kernels are not counted."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "geodesic", "sweep", path, *options], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def loop(path: Path, out: Path) -> tuple[float, list[float]]:
    """Wall seconds of papermill, one run after another, and each run's overhead."""
    start, overheads = time.perf_counter(), []
    for run in sweep.read(path).runs:
        begin = time.perf_counter()
        parameters = run.settings | {"out": str(out)}
        papermill.execute_notebook(NOTEBOOK, out / f"{run.name}.ipynb", parameters, progress_bar=False)
        overheads.append(time.perf_counter() - begin - seconds(out / f"{run.name}.json"))
    return time.perf_counter() - start, overheads


def seconds(path: Path) -> float:
    return records.read(path)["provenance"]["seconds"]


def compare(folder: Path, runs: int, epochs: int, workers: int) -> None:
    ours, theirs = write_grid(folder, runs, epochs, "ours"), write_grid(folder, runs, epochs, "theirs")
    (folder / "theirs").mkdir()
    fast, _ = command(ours, "--workers", str(workers), "--quiet")
    slow, overheads = loop(theirs, folder / "theirs")
    grid = sweep.read(ours)
    mine = []
    for run in grid.runs:
        cells = json.loads((grid.out / "notebooks" / f"{run.name}.ipynb").read_text())["metadata"]["papermill"]
        mine.append(cells["duration"] - seconds(grid.out / f"{run.name}.json"))
    print(f"{len(grid.runs)} digits runs of {epochs} epochs, {workers} workers, {os.cpu_count()} cores")
    print(f"  papermill in a loop {slow:8.1f} s\n  sweep               {fast:8.1f} s, {slow / fast:.2f} times as fast")
    for name, values in (("papermill", overheads), ("sweep", mine)):
        middle = statistics.median(values)
        print(f"  overhead of a run, {name:<10}{middle:5.2f} s (median), {middle / (middle + 60):.1%} of a 60 s run")


def finished(folder: Path) -> None:
    path = write_grid(folder, 200, 10, "finished")
    grid = sweep.read(path)
    filler = {"status": "ok", "final": None, "epochs": [[0.0] * 4000], "provenance": {"seconds": 1.0}}
    for run in grid.runs:
        records.write({"settings": run.settings} | filler, grid.out)
    command(path)  # checks the grid once
    wall, cpu = command(path)
    print(f"finished grid of {len(grid.runs)}: {wall:.2f} s, {cpu:.2f} s of processor time")


def stack(width: int, batch: int, networks: int = 9, layers: int = 10, repeats: int = 20) -> None:
    """A step (forward, backward, SGD) of plain ReLU networks without biases, apart and stacked: equal results."""
    torch.manual_seed(0)
    start = torch.randn(networks, layers, width, width) * (2 / width) ** 0.5
    x = torch.randn(networks, batch, width)

    def step(weights: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        weights = weights.detach().requires_grad_()
        for layer in range(layers):
            states = (states @ weights[..., layer, :, :]).relu()
        states.square().mean((-1, -2)).sum().backward()
        return weights.detach() - 0.01 * weights.grad

    apart, stacked = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        one_by_one = torch.stack([step(start[k], x[k]) for k in range(networks)])
        middle = time.perf_counter()
        together = step(start, x)
        apart.append(middle - begin)
        stacked.append(time.perf_counter() - middle)
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
    ratio = statistics.median(apart) / statistics.median(stacked)
    print(f"{networks} networks of width {width}, batch {batch}: stacked {ratio:.2f} times as fast as apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=32, help="of the grid, a multiple of 8")
    parser.add_argument("--epochs", type=int, default=10, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep")
    parser.add_argument("--stack", action="store_true", help="measure stacked networks only")
    options = parser.parse_args()
    if options.stack:
        torch.set_num_threads(1)
        for width, batch in ((32, 64), (100, 64), (1000, 256)):
            stack(width, batch, repeats=20 if width < 1000 else 3)
        return
    with tempfile.TemporaryDirectory() as folder:
        finished(Path(folder))
        compare(Path(folder), options.runs, options.epochs, options.workers)


if __name__ == "__main__":
    main()
