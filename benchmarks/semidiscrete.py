"""Time to a held-out relative cell-mass error of 5 %: our solver, fixed-sample Adam, and POT's stochastic semi-dual.

    python benchmarks/semidiscrete.py --n 1000 --patience 20 --out results/benchmarks/semidiscrete.json  # ten minutes
    python benchmarks/semidiscrete.py --n 10000 --out results/benchmarks/semidiscrete.json  # half an hour
    python benchmarks/semidiscrete.py --n 60000 --d 64 --device cuda

The rivals, both stopped by the same test on fresh points, which is not counted in their time:

(a) *Adam*, written from the description of the public AE-OT code: the same Sobol points in every step, gradient = cell
    frequencies − 1/n, Adam without bias correction, heights centred after each step, twice the points when the gradient
    has not improved for 30 steps. Its step size is tuned by hand: of a few, the one with the least error after our own
    time goes on. The tuning is not counted.
(b) `ot.stochastic.averaged_sgd_entropic_transport` needs a discrete source: it gets 20 n Sobol points, and a small ε.
    Each of its steps costs one row of scores; of a few ε the best is reported. Its matrix of costs does not fit in
    memory for many atoms.

Times are processor seconds of one thread, so that other work on the machine hardly matters; on a device they are wall
seconds. Nothing runs for ever: ours is given up by a budget of scores, a rival after `--patience` times our own time,
and the error it had by then is reported; the ratio is then a lower bound.
Each number is of one run: read the ratios.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from geodesic import records, semidiscrete

_SCORES = 2e12  # scores that our own solver may look at before it is given up: half an hour and more


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


class Adam:
    """Rival (a) at one step size; it can be stopped, and goes on where it was."""

    def __init__(self, points: torch.Tensor, rate: float):
        self.points, self.rate = points, rate
        self.heights, self.m, self.v = (torch.zeros(len(points), device=points.device) for _ in range(3))
        self.best, self.since, self.spent, self.error = math.inf, 0, 0.0, math.inf
        self._draw(10 * len(points))

    def run(self, limit: float, tol: float) -> "Adam":
        """Step until so many seconds are spent in all or tol is reached, looking at the error some twenty times."""
        n, looked, pause = len(self.points), self.spent, (limit - self.spent) / 20
        while self.spent < limit and self.error >= tol:
            start = clock(self.points)
            self._step()
            self.spent += clock(self.points) - start
            if self.spent - looked > pause or self.spent >= limit:
                self.error, looked = held_out_error(self.points, self.heights, max(20 * n, 100_000)), self.spent
        return self

    def _step(self) -> None:
        n = len(self.points)
        potential = semidiscrete.Potential(self.points, self.heights, self.heights, "normal", 0.0, 0.0, 0, 0, 1.0)
        gradient = torch.bincount(potential.cell(self.x), minlength=n) / len(self.x) - 1 / n
        self.m, self.v = 0.9 * self.m + 0.1 * gradient, 0.999 * self.v + 0.001 * gradient**2
        heights = self.heights - self.rate * self.m / (self.v.sqrt() + 1e-8)
        self.heights = heights - heights.mean()
        norm = float(gradient.norm())
        self.best, self.since = (norm, 0) if norm < self.best else (self.best, self.since + 1)
        if self.since > 30:
            self.best, self.since = math.inf, 0
            self._draw(2 * len(self.x))

    def _draw(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = semidiscrete.draw(batch, self.points.shape[1], "normal", generator, self.points.device)


def tuned(points: torch.Tensor, rates: list[float], trial: float, limit: float, tol: float) -> dict:
    """Rival (a) at the step size that has the least error after a trial, for all of its time."""
    trials = [Adam(points, rate).run(min(trial, limit), tol) for rate in rates]
    tried = {f"{one.rate:g}": one.error for one in trials}
    best = min(trials, key=lambda one: (one.error >= tol, one.spent if one.error < tol else one.error))
    best.run(limit, tol)
    found = {"seconds": best.spent, "error": best.error, "reached": best.error < tol, "rate": best.rate}
    return found | {"points_at_the_end": len(best.x), "trials": tried}


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
    own = row["ours"]["seconds"]
    if options.rates:
        row["adam"] = tuned(points, options.rates, options.trial * own, options.patience * own, options.tol)
    if options.device == "cpu" and n <= 2000:
        runs = [pot(points, options.sgd, share, options.tol) for share in options.shares]
        tried = {f"{one['share']:g}": one["error"] for one in runs}
        row["pot"] = min(runs, key=lambda one: math.inf if one["error"] is None else one["error"]) | {"trials": tried}
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
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-2, 3e-2, 1e-1], help="of Adam; best wins")
    parser.add_argument("--sgd", type=int, default=800_000, help="steps of POT's solver")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.03, 0.01], help="of POT: ε over mean cost")
    parser.add_argument("--patience", type=float, default=5.0, help="a rival's limit, in our own times")
    parser.add_argument("--trial", type=float, default=1.0, help="when one of the rates is chosen, likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row; keeps its other rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, start = {}, time.perf_counter()
    if options.out and options.out.exists():
        rows = {(row["n"], row["d"]): row for row in json.loads(options.out.read_text(encoding="utf-8"))["rows"]}
    for n in options.n:
        for d in options.d:
            made = {"tol": options.tol, "trial": options.trial, "patience": options.patience}
            rows[n, d] = compare(n, d, options) | made
            if options.out:
                place = records.provenance(options.device, time.perf_counter() - start)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"rows": list(rows.values()), "provenance": place}, indent=1, allow_nan=False)
                options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
