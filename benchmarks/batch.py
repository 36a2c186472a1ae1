"""Many assignments of middling size, one a layer and epoch: one after another on all cores, or one a core at once.

    python benchmarks/batch.py [--cloud plain-mnist] [--n 1000 2000 4000]

A problem is n consecutive points of a cloud of benchmarks/assignment.py (trained and stored when first asked for), and
there are so many for each core. Both ways solve the same problems in processes that have solved one before; reading the
points counts in both. It writes results/benchmarks/batch.json.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from assignment import CLOUDS, network_clouds, write
from geodesic import records, transport
from safetensors import safe_open


def solve(path: str, first: int, n: int) -> float:
    """Cost of one problem."""
    with safe_open(path, "pt") as clouds:
        x, y = (clouds.get_slice(key)[first : first + n].reshape(n, -1) for key in ("x_0", "x_L"))
    return transport.assign(x, y).cost


def timed(path: str, n: int, problems: int, workers: int, threads: int, repeats: int) -> tuple[float, list[float]]:
    """Median wall seconds for all problems, and their costs."""
    seconds = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        starts = range(0, problems * n, n)
        for _ in range(repeats + 1):  # the first round imports and warms up
            begin = time.perf_counter()
            costs = list(pool.map(solve, [path] * problems, starts, [n] * problems))
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]), costs


def compare(path: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: both ways, and the gain."""
    problems = options.each * options.cores
    in_turn, costs = timed(path, n, problems, 1, options.cores, options.repeats)
    at_once, same = timed(path, n, problems, options.cores, 1, options.repeats)
    if any(abs(a - b) > 1e-9 * a for a, b in zip(costs, same, strict=True)):
        raise RuntimeError(f"the two ways disagree at n = {n}: {costs} and {same}")
    row = {"n": n, "problems": problems, "in_turn_s": in_turn, "at_once_s": at_once, "gain": in_turn / at_once}
    print(f"n={n}: {problems} problems in turn {in_turn:.2f} s, at once {at_once:.2f} s, gain {row['gain']:.2f}")
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cloud", choices=CLOUDS, default="plain-mnist")
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--each", type=int, default=2, help="problems for each core")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "clouds", help="where clouds are stored")
    parser.add_argument("--cifar", default="cifar10", help="name of the CIFAR-10 data, cifar10 or folder:PATH")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "benchmarks" / "batch.json")
    options = parser.parse_args()
    path = network_clouds(options.cloud, max(options.n) * options.each * options.cores, options)
    start = time.perf_counter()
    rows = [compare(str(path), n, options) for n in options.n]
    about = records.provenance("cpu", time.perf_counter() - start)
    write({"cloud": options.cloud, "rows": rows, "provenance": about}, options.out)
    print(f"{about['device']}, {options.cores} cores; written to {options.out}")


if __name__ == "__main__":
    main()
