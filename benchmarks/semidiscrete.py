"""Time to a held-out relative cell-mass error of 5 %: our solver, fixed-sample Adam, and POT's stochastic semi-dual.

    python benchmarks/semidiscrete.py --out results/benchmarks/semidiscrete.json     # some ten minutes of one core
    python benchmarks/semidiscrete.py --n 10000 --rates 1e-3 1e-2 --limit 20 --out results/benchmarks/semidiscrete.json
    python benchmarks/semidiscrete.py --n 60000 --d 64 --device cuda --limit 600

The rivals, both stopped by the same test on fresh points, which is not counted in their time:

(a) *Adam*, written from the description of the public AE-OT code: the same Sobol points in every step, gradient = cell
    frequencies − 1/n, Adam without bias correction, heights centred after each step, twice the points when the gradient
    has not improved for 30 steps. Its step size is tuned by hand: the best of a few, without counting the tuning.
(b) `ot.stochastic.averaged_sgd_entropic_transport` needs a discrete source: it gets 20 n Sobol points, and a small ε.
    Each of its steps costs one row of scores. Its matrix of costs does not fit in memory for many atoms.

Times are processor seconds of one thread, so that other work on the machine hardly matters; on a device they are wall
seconds. Nothing runs longer than the limit: ours is given up by a budget of samples, a rival when its time is over
(the limit, or `--patience` times our own), and the error it had by then is reported; the ratio is then a lower bound.
Each number is of one run: read the ratios.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from geodesic import records, semidiscrete

_SCORES = 3.6e10  # scores that our own solver may look at before it is given up: two minutes in dimension 64


def atoms(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Codes as an autoencoder leaves them: ten Gaussian groups of unequal spread."""
    centres = 3 * torch.randn(10, d, generator=generator)
    spread = 0.3 + torch.rand(10, 1, generator=generator)
    group = torch.randint(10, (n,), generator=generator)
    return centres[group] + spread[group] * torch.randn(n, d, generator=generator)


def held_out_error(points: torch.Tensor, heights: torch.Tensor, batch: int) -> float:
    """Relative cell-mass error on fresh independent points, noise removed by the product of two halves."""
    n, d = points.shape
    potential = semidiscrete.Potential(points, points.new_full((n,), 1 / n), heights, "normal", 0.0, 0.0, 0, 0, 1.0)
    halves = []
    for _ in range(2):
        x = torch.randn(batch // 2, d, device=points.device)
        halves.append(n * torch.bincount(potential.cell(x), minlength=n) / (batch // 2) - 1)
    return max(float((halves[0] * halves[1]).mean()), 0.0) ** 0.5


def clock(points: torch.Tensor) -> float:
    """Processor seconds, or wall seconds on a device."""
    if points.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(points.device)
    return time.perf_counter()


def ours(points: torch.Tensor, tol: float) -> dict:
    """Our solver: seconds, error, samples an atom; or the error it had when its budget was spent."""
    n, start = len(points), clock(points)
    budget = int(_SCORES / n) if points.device.type == "cpu" else None
    generator = torch.Generator().manual_seed(0)
    try:
        found = semidiscrete.solve(points, source="normal", tol=tol, generator=generator, max_samples=budget)
    except RuntimeError as spent:
        error = float(re.search(r"relative error is ([\d.e-]+)", str(spent))[1].rstrip("."))
        return {"seconds": clock(points) - start, "error": error, "reached": False}
    return {
        "seconds": clock(points) - start,
        "error": found.marginal_error,
        "reached": True,
        "samples_an_atom": found.samples / n,
    }


def adam(points: torch.Tensor, rate: float, tol: float, limit: float) -> dict:
    """Rival (a); its error is looked at about twenty times in its time."""
    n, d = points.shape
    heights, m, v = (torch.zeros(n, device=points.device) for _ in range(3))
    batch, best, since, spent, error, looked = 10 * n, float("inf"), 0, 0.0, float("inf"), 0.0
    x = semidiscrete.draw(batch, d, "normal", torch.Generator().manual_seed(1), points.device)
    while spent < limit and error >= tol:
        start = clock(points)
        potential = semidiscrete.Potential(points, heights, heights, "normal", 0.0, 0.0, 0, 0, 1.0)
        gradient = torch.bincount(potential.cell(x), minlength=n) / batch - 1 / n
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        heights = heights - rate * m / (v.sqrt() + 1e-8)
        heights = heights - heights.mean()
        norm = float(gradient.norm())
        best, since = (norm, 0) if norm < best else (best, since + 1)
        if since > 30:
            batch, best, since = 2 * batch, float("inf"), 0
            x = semidiscrete.draw(batch, d, "normal", torch.Generator().manual_seed(1), points.device)
        spent += clock(points) - start
        if spent - looked > limit / 20 or spent >= limit:
            error, looked = held_out_error(points, heights, max(20 * n, 100_000)), spent
    return {"seconds": spent, "error": error, "reached": error < tol, "rate": rate}


def pot(points: torch.Tensor, iterations: int, share: float, tol: float) -> dict:
    """Rival (b): seconds used and held-out error after this many stochastic steps; no error when it overflows."""
    import ot

    n, d = points.shape
    source = semidiscrete.draw(20 * n, d, "normal", torch.Generator().manual_seed(1)).double().numpy()
    y = points.cpu().double().numpy()
    start = clock(points)
    cost = -source @ y.T
    cost -= cost.min(1, keepdims=True)  # changes no plan, and keeps exp(−cost/ε) within the numbers
    weights = np.full(len(source), 1 / len(source)), np.full(n, 1 / n)
    dual = ot.stochastic.averaged_sgd_entropic_transport(*weights, cost, share * cost.mean(), iterations)
    row = {"seconds": clock(points) - start, "error": None, "reached": False, "iterations": iterations, "share": share}
    if np.isfinite(dual).all():
        row["error"] = held_out_error(points, torch.as_tensor(dual, dtype=points.dtype), max(20 * n, 100_000))
        row["reached"] = row["error"] < tol
    return row


def compare(n: int, d: int, options: argparse.Namespace) -> dict:
    """One row of the table."""
    points = atoms(n, d, torch.Generator().manual_seed(d)).to(options.device)
    row = {"n": n, "d": d, "ours": ours(points, options.tol)}
    limit = min(options.limit, options.patience * row["ours"]["seconds"])
    runs = [adam(points, rate, options.tol, limit) for rate in options.rates]
    row["adam"] = min(runs, key=lambda r: (not r["reached"], r["seconds"] if r["reached"] else r["error"]))
    if options.device == "cpu" and n <= 2000:
        row["pot"] = pot(points, options.sgd, options.epsilon, options.tol)
    for name, one in row.items():
        if isinstance(one, dict):
            one["ratio"] = one["seconds"] / row["ours"]["seconds"]
            error = "overflow" if one["error"] is None else f"error {one['error']:.3f}"
            bound = "" if one["reached"] else ">= "
            print(f"n={n} d={d} {name}: {one['seconds']:.2f} s, {error}, ratio {bound}{one['ratio']:.1f}", flush=True)
    return row


def main() -> None:
    """Print the comparison, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--d", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--tol", type=float, default=0.05)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 1e-1, 3e-2], help="of Adam; best wins")
    parser.add_argument("--sgd", type=int, default=100_000, help="steps of POT's solver")
    parser.add_argument("--epsilon", type=float, default=0.1, help="ε of POT, as a share of the mean cost")
    parser.add_argument("--patience", type=float, default=20.0, help="a rival's limit, in our own times")
    parser.add_argument("--limit", type=float, default=30.0, help="a rival's limit in seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row; keeps its other rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, start = {}, time.perf_counter()
    if options.out and options.out.exists():
        rows = {(row["n"], row["d"]): row for row in json.loads(options.out.read_text(encoding="utf-8"))["rows"]}
    for n in options.n:
        for d in options.d:
            made = {"limit": options.limit, "patience": options.patience, "tol": options.tol}
            rows[n, d] = compare(n, d, options) | made
            if options.out:
                place = records.provenance(options.device, time.perf_counter() - start)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"rows": list(rows.values()), "provenance": place}, indent=1, allow_nan=False)
                options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
