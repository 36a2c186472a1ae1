"""Exact assignment of two clouds: `geodesic.transport` against SciPy, lapx and POT, computation of the costs included.

    python benchmarks/assignment.py [--cloud plain-mnist] [--n 1000 2000 4000] [--solvers ours emd ...] [--threads 2]
    python benchmarks/assignment.py --cloud plain-cifar --cifar folder:cifar10     # some seven minutes on two cores
    python benchmarks/assignment.py --cloud plain-cifar --cifar folder:cifar10 --n 50000 --solvers ours --out FILE

A cloud is the states x_0 and x_L of a network (plain or resnet, MNIST or CIFAR-10 with K=1). It is trained briefly and
its clouds are stored in --folder when they are first asked for. A path is taken as a safetensors file with clouds x_0
and x_L (n, ...), of which the first n points are used. "synthetic", the default, is a hard pair without a network: x is
correlated noise, y what three random ReLU layers and ten class means make of it, so that hardly any point keeps its
partner and the slack is small beside the cost. The report is results/benchmarks/assignment-CLOUD.json.

Every measurement is a process of its own, so that peak memory is that of one solver (clouds not counted). Ratios are of
medians within one run, of wall time and of processor time ("busy", summed over threads: what to quote from a machine
with other users). Peers get the costs in the fastest way that suits their precision: one matrix product, float64 except
for lapjvs, which works in float32 and proves nothing. A measurement is repeated --repeats times and for one second, but
not once it has taken five. A peer whose next size would keep the processor busy for longer than --limit seconds by its
growth so far is left out. Every cost found is compared with that of the first solver.
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geodesic import data, networks, records, training, transport
from geodesic.transport import _assignment
from memory import peak_bytes, reset_peak
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CLOUDS = ("plain-mnist", "resnet-mnist", "plain-cifar", "resnet-cifar")
RECIPE = training.Recipe(weight_decay=5e-4, epochs=2, learning_rate=0.02)
TRAINED_ON = 8192  # points; a brief training is enough for clouds of the kind
LEAST, ENOUGH = 1.0, 5.0  # seconds of one measurement: it is repeated until the first, and never after the second
DEFAULT = ["ours", "scipy", "lapjv", "lapjvs", "emd"]  # emd_lazy takes minutes for 1000 points: ask for it by name
RELATIVE_ERROR = {"lapjvs": 1e-4}  # of the cost; float32
ERROR = 1e-9
STEPS = ("split_cost", "identity_start", "anneal", "near_arcs", "feed", "settle", "certify")  # of `_assignment.solve`


def hard_clouds(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Correlated x, spectrum k^-1/2 over a floor, and y its image under a random plain network of three layers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank, width = min(512, d), min(1024, d)
    spectrum = torch.arange(1, rank + 1).pow(-0.5)
    x = (normal(n, rank) * spectrum) @ normal(rank, d) / math.sqrt(rank) + 0.3 * normal(n, d)
    y = x
    for _ in range(3):
        y = torch.relu(y @ normal(d, width) / math.sqrt(d))
        y = 32 * y / y.norm(dim=1).mean() @ normal(width, d) / math.sqrt(width)
    return x, torch.relu(2 * y + 0.3 * normal(10, d)[torch.arange(n) % 10])


def network_clouds(name: str, n: int, options: argparse.Namespace) -> Path:
    """File with x_0 and x_L of the first n training points in a briefly trained network; made if it is not there."""
    path = options.folder / f"{name}-{n}.safetensors"
    if path.exists():
        return path
    kind, dataset_name = name.split("-")
    dataset = data.load(options.cifar if dataset_name == "cifar" else dataset_name, options.root)
    generator = torch.Generator().manual_seed(0)
    network = networks.build(
        kind, dataset.name, norm="batch", in_shape=dataset.in_shape, classes=len(dataset.classes), generator=generator
    )
    if training.train(network, dataset.take(min(TRAINED_ON, n)), RECIPE, generator=generator, show=True).diverged:
        raise RuntimeError(f"{name} diverged at learning rate {RECIPE.learning_rate}; a diverged network has no clouds")
    network.eval()
    with torch.inference_mode():
        ends = [network.tracks(x)[-1][[0, -1]].flatten(2) for x in dataset.take(n).x_train.split(500)]
    first, last = torch.cat(ends, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"x_0": first.contiguous(), "x_L": last.contiguous()}, partial)
    os.replace(partial, path)
    return path


def dense_costs(x: Tensor, y: Tensor, dtype: torch.dtype) -> np.ndarray:
    """All squared distances by one matrix product of the centred clouds."""
    centre = (x.mean(0) + y.mean(0)) / 2
    x, y = x.to(dtype) - centre, y.to(dtype) - centre
    costs = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return costs.add_(x.square().sum(1)[:, None]).numpy()


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds that our solver spends in each of its steps while this is open; a step within a step counts as that."""
    seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
    steps = {name: getattr(_assignment, name) for name in STEPS}
    running: list[str] = []

    def clock(name: str) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            if running:
                return steps[name](*given, **named)
            running.append(name)
            start = time.perf_counter()
            try:
                return steps[name](*given, **named)
            finally:
                seconds[running.pop()] += time.perf_counter() - start

        return step

    for name in STEPS:
        setattr(_assignment, name, clock(name))
    try:
        yield seconds
    finally:
        for name in STEPS:
            setattr(_assignment, name, steps[name])


def ours(x: Tensor, y: Tensor) -> Tensor:
    """This project's solver."""
    return transport.assign(x, y).permutation


def scipy(x: Tensor, y: Tensor) -> Tensor:
    """`scipy.optimize.linear_sum_assignment`, float64."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(dense_costs(x, y, torch.float64))[1])


def lapjv(x: Tensor, y: Tensor) -> Tensor:
    """`lap.lapjv`, float64."""
    import lap

    return torch.from_numpy(lap.lapjv(dense_costs(x, y, torch.float64))[1]).long()


def lapjvs(x: Tensor, y: Tensor) -> Tensor:
    """`lap.lapjvs`, float32."""
    import lap

    return torch.from_numpy(np.asarray(lap.lapjvs(dense_costs(x, y, torch.float32))[2])).long()


def emd(x: Tensor, y: Tensor) -> Tensor:
    """`ot.emd`, float64, with its limit of iterations lifted: by default it ends early with a warning."""
    import ot

    plan = ot.emd([], [], dense_costs(x, y, torch.float64), numItermax=10**9, numThreads=torch.get_num_threads())
    return torch.from_numpy(plan.argmax(1))


def emd_lazy(x: Tensor, y: Tensor) -> Tensor:
    """`ot.emd2_lazy`, float64: distances when they are asked for, no matrix."""
    import ot

    _, log = ot.emd2_lazy(x.double().numpy(), y.double().numpy(), numItermax=10**9, log=True, return_matrix=True)
    plan = log["G"].tocoo()
    return torch.from_numpy(plan.col[np.argsort(plan.row)]).long()


SOLVERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    solver.__name__: solver for solver in (ours, scipy, lapjv, lapjvs, emd, emd_lazy)
}


def _child(connection: Any, name: str, path: str, n: int, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with safe_open(path, "pt") as clouds:
        x, y = (clouds.get_slice(key)[:n].reshape(n, -1).clone() for key in ("x_0", "x_L"))  # read now
    SOLVERS[name](x[:300, :300], y[:300, :300])  # imports and first calls
    before = reset_peak()
    seconds, processor, steps = [], [], []
    while len(seconds) < repeats or sum(seconds) < LEAST:
        start, busy = time.perf_counter(), time.process_time()
        with clocked() as step:
            sigma = SOLVERS[name](x, y)
        steps.append(step)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
        if sum(seconds) > ENOUGH:
            break
    peak = peak_bytes() - before
    cost = statistics.fmean((x[i].double() - y[j]).square().sum().item() for i, j in enumerate(sigma.tolist()))
    if sorted(sigma.tolist()) != list(range(n)):
        raise RuntimeError(f"{name} did not return a permutation at n = {n}")
    times = {"seconds": seconds, "median": statistics.median(seconds), "busy": statistics.median(processor)}
    if name == "ours":
        times["steps"] = {key: round(statistics.median(step[key] for step in steps), 3) for key in STEPS}
    connection.send({**times, "peak_bytes": peak, "cost": cost})


def measure(name: str, path: str, n: int, repeats: int, threads: int) -> dict[str, Any]:
    """Wall seconds, peak bytes beyond the clouds and the cost of one solver at one size, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours_end, child_end = context.Pipe()
    process = context.Process(target=_child, args=(child_end, name, path, n, repeats, threads))
    process.start()
    child_end.close()
    try:
        found = ours_end.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed at n = {n}, see above; leave it out with --solvers") from None
    process.join()
    return found


def forecast(rows: list[dict[str, Any]], name: str, n: int) -> float:
    """Seconds at n by the growth of the last two sizes, at least quadratic."""
    past = [row for row in rows if row["solver"] == name][-2:]
    if not past:
        return 0.0
    exponent = max(2.0, growth(rows, name) or 3.0)
    return past[-1]["busy"] * (n / past[-1]["n"]) ** exponent


def growth(rows: list[dict[str, Any]], name: str) -> float | None:
    """Exponent of busy time between the last two sizes."""
    past = [row for row in rows if row["solver"] == name][-2:]
    if len(past) < 2:
        return None
    return math.log(past[1]["busy"] / past[0]["busy"]) / math.log(past[1]["n"] / past[0]["n"])


def run(arguments: argparse.Namespace, path: str, d: int) -> dict[str, list[dict[str, Any]]]:
    """Measure and print, size by size; what was measured, and what was left out with the busy seconds expected."""
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    print(" ".join(f"{title:>{width}}" for title, width in COLUMNS))
    for n in arguments.n:
        first = None
        for name in arguments.solvers:
            if name != arguments.solvers[0] and (expected := forecast(rows, name, n)) > arguments.limit:
                print(f"{n:>7} {name:>9} left out: {expected:.0f} s expected")
                left_out.append({"n": n, "solver": name, "expected": expected})
                continue
            row = {"n": n, "d": d, "solver": name, **measure(name, path, n, arguments.repeats, arguments.threads)}
            first = first or row
            row["relative_error"] = row["cost"] / first["cost"] - 1
            if abs(row["relative_error"]) > RELATIVE_ERROR.get(name, ERROR):
                raise RuntimeError(
                    f"{name} is off {first['solver']} by {row['relative_error']:.2e} of the cost at n = {n}"
                )
            row |= {"ratio": row["median"] / first["median"], "busy_ratio": row["busy"] / first["busy"]}
            rows.append(row)
            row["growth"] = growth(rows, name)
            print_row(row)
    return {"rows": rows, "left_out": left_out}


COLUMNS = [("n", 7), ("solver", 9), ("wall, s", 9), ("spread, s", 9), ("ratio", 7), ("busy, s", 9), ("ratio", 7)]
COLUMNS += [("peak, GiB", 9), ("growth", 7)]


def print_row(row: dict[str, Any]) -> None:
    """One line of the table; growth is the exponent of busy time from the size before."""
    spread = max(row["seconds"]) - min(row["seconds"])
    cells = [str(row["n"]), row["solver"], f"{row['median']:.2f}", f"{spread:.2f}", f"{row['ratio']:.1f}x"]
    cells += [f"{row['busy']:.2f}", f"{row['busy_ratio']:.1f}x", f"{row['peak_bytes'] / 2**30:.2f}"]
    cells += ["" if row["growth"] is None else f"{row['growth']:.2f}"]
    print(" ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)), flush=True)


def write(report: dict[str, Any], path: Path) -> None:
    """Write JSON so that a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--n", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000], help="numbers of points, ascending"
    )
    parser.add_argument("--cloud", default="synthetic", help=f"{', '.join(CLOUDS)}, synthetic, or a safetensors file")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "clouds", help="where clouds are stored")
    parser.add_argument("--cifar", default="cifar10", help="name of the CIFAR-10 data, cifar10 or folder:PATH")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--dimension", type=int, default=8192, help="of the synthetic clouds")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=DEFAULT, help="the first is 1x")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=75.0, help="busy seconds that a peer may be expected to take")
    parser.add_argument("--out", type=Path, help="the report; None takes results/benchmarks/assignment-CLOUD.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, load = time.perf_counter(), round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.cloud)
        if arguments.cloud in CLOUDS:
            path = network_clouds(arguments.cloud, max(arguments.n), arguments)
        elif arguments.cloud == "synthetic":
            path = Path(folder) / "clouds.safetensors"
            x, y = hard_clouds(max(arguments.n), arguments.dimension)
            save_file({"x_0": x, "x_L": y}, path)
        with safe_open(path, "pt") as clouds:
            shape = clouds.get_slice("x_0").get_shape()
        if shape[0] < max(arguments.n):
            parser.error(f"{path} holds {shape[0]} points, --n asks for {max(arguments.n)}")
        found = run(arguments, str(path), math.prod(shape[1:]))
    cloud = arguments.cloud if arguments.cloud in (*CLOUDS, "synthetic") else path.stem
    report = {
        "cloud": cloud,
        "d": math.prod(shape[1:]),
        "options": {key: getattr(arguments, key) for key in ("n", "solvers", "repeats", "threads", "limit")},
        "cores": os.cpu_count(),
        "load_before": load,
        "provenance": records.provenance("cpu", time.perf_counter() - start)
        | {package: importlib.metadata.version(package) for package in ("lapx", "POT")},
        **found,
    }
    out = arguments.out or records.RESULTS / "benchmarks" / f"assignment-{cloud}.json"
    write(report, out)
    print(f"{report['provenance']['device']}, {arguments.threads} threads; written to {out}")


if __name__ == "__main__":
    main()
