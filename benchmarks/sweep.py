"""What a sweep costs beside its training: against a plain papermill loop, and against stacking networks in one run.

    python benchmarks/sweep.py [--runs 32] [--epochs 10] [--workers 2]

A grid of digits runs, by `papermill.execute_notebook` in a loop and by `python -m geodesic sweep`, on the same cores.
The first half of the loop is before the sweep and the second after it, so that a machine that grows busier or quieter
favours neither. The overhead of a run is its wall time less what `experiment.run` took. Then a finished grid of 200,
and the time of a training step of several fully connected networks one after another against the same networks as one
batched product. Ratios are what to quote; they are written to results/benchmarks/sweep.json.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
learning_rate = 0.02 # at 0.05 a plain network without weight decay diverges, and a failed run ends the benchmark
eval_points = 360
[axes]
weight_decay = [0.0, 0.001, 0.01, 0.1]
network = ["resnet", "plain"]
seed = {seeds}
"""


def write_grid(folder: Path, runs: int, epochs: int, out: str) -> Path:
    """The grid of so many digits runs, its records to be in folder/out."""
    path = folder / f"{out}.toml"
    path.write_text(GRID.format(notebook=NOTEBOOK, out=out, epochs=epochs, seeds=list(range(max(1, runs // 8)))))
    return path


def command(path: Path, *options: str) -> tuple[float, float]:
    """Wall and processor seconds of a sweep; those of forked kernels are not counted."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "geodesic", "sweep", path, *options], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def loop(runs: Sequence[sweep.Run], out: Path) -> tuple[float, list[float]]:
    """Wall seconds of papermill, one run after another, and each run's overhead."""
    start, overheads = time.perf_counter(), []
    for run in runs:
        begin = time.perf_counter()
        parameters = run.settings | {"out": str(out)}
        papermill.execute_notebook(NOTEBOOK, out / f"{run.name}.ipynb", parameters, progress_bar=False)
        overheads.append(time.perf_counter() - begin - seconds(out / f"{run.name}.json"))
    return time.perf_counter() - start, overheads


def seconds(path: Path) -> float:
    """Wall seconds that a record's run took by itself."""
    return records.read(path)["provenance"]["seconds"]


def compare(folder: Path, runs: int, epochs: int, workers: int) -> dict[str, Any]:
    """The same grid both ways; equal settings give equal records."""
    grid = sweep.read(write_grid(folder, runs, epochs, "ours"))
    (folder / "theirs").mkdir()
    half = len(grid.runs) // 2
    before, first = loop(grid.runs[:half], folder / "theirs")
    fast, _ = command(grid.path, "--workers", str(workers), "--quiet")
    after, second = loop(grid.runs[half:], folder / "theirs")
    mine = []
    for run in grid.runs:
        record = records.read(grid.out / f"{run.name}.json")
        assert record["final"] == records.read(folder / "theirs" / f"{run.name}.json")["final"]
        duration = json.loads((grid.out / "notebooks" / f"{run.name}.ipynb").read_text())["metadata"]["papermill"]
        mine.append(duration["duration"] - record["provenance"]["seconds"])
    found = {
        "runs": len(grid.runs), "epochs": epochs, "workers": workers, "cores": os.cpu_count(),
        "loop_seconds": round(before + after, 1), "sweep_seconds": round(fast, 1),
        "times_as_fast": round((before + after) / fast, 2),
        "loop_overhead_seconds": round(statistics.median(first + second), 2),
        "sweep_overhead_seconds": round(statistics.median(mine), 2),
    }  # fmt: skip
    middle = found["sweep_overhead_seconds"]
    return found | {"overhead_share_of_60_seconds": round(middle / (middle + 60), 4)}


def finished(folder: Path) -> dict[str, float]:
    """Wall and processor seconds that it takes to see that a grid of 200 is finished."""
    grid = sweep.read(write_grid(folder, 200, 10, "finished"))
    provenance = records.provenance("cpu", 1.0)
    filler = {"status": "ok", "final": None, "epochs": [[0.0] * 4000], "provenance": provenance}
    for run in grid.runs:
        records.write({"settings": run.settings} | filler, grid.out)
    command(grid.path)  # checks the grid once
    wall, cpu = command(grid.path)
    return {"finished_runs": len(grid.runs), "finished_seconds": round(wall, 2), "finished_cpu_seconds": round(cpu, 2)}


def stack(width: int, batch: int, networks: int = 9, layers: int = 10, repeats: int = 20) -> dict[str, float]:
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
    return {"networks": networks, "width": width, "batch": batch, "times_as_fast": round(ratio, 2)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=32, help="of the grid, a multiple of 8")
    parser.add_argument("--epochs", type=int, default=10, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "benchmarks", help="folder of sweep.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the loop's kernels, as of the sweep's
    torch.set_num_threads(1)
    start = time.perf_counter()
    found: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        found |= finished(Path(folder))
        found |= compare(Path(folder), options.runs, options.epochs, options.workers)
    sizes = ((32, 64, 20), (100, 64, 20), (1000, 256, 3))
    found["stacked"] = [stack(width, batch, repeats=repeats) for width, batch, repeats in sizes]
    found["provenance"] = records.provenance("cpu", time.perf_counter() - start)
    text = json.dumps(found, indent=1)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sweep.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
