"""Time to a held-out relative cell-mass error of 5 %: our solver, fixed-sample Adam, and POT's stochastic semi-dual.

    python benchmarks/semidiscrete.py                    # n = 1000, d = 2, 16, 64
    python benchmarks/semidiscrete.py --n 10000          # an hour or more for the rivals
    python benchmarks/semidiscrete.py --n 60000 --d 64 --device cuda

The rivals, both stopped by the same test on fresh points, which is not counted in their time:

(a) *Adam*, written from the description of the public AE-OT code: the same Sobol points in every step, gradient = cell
    frequencies − 1/n, Adam without bias correction, heights centred after each step, twice the points when the gradient
    has not improved for 30 steps. Its step size is tuned by hand here, the best of a few, without counting the tuning.
(b) `ot.stochastic.averaged_sgd_entropic_transport` needs a discrete source: it gets 20 n Sobol points, and a small ε.
    Each of its steps costs one row of scores.

A rival that does not get there within `--patience` times our own time is reported with the error it had then, and the
ratio as a lower bound. All times are of one run on one machine: read the ratios.
"""

import argparse
import time

import numpy as np
import torch
from geodesic import semidiscrete


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


def adam(points: torch.Tensor, rate: float, tol: float, limit: float) -> tuple[float, float, np.ndarray]:
    """Rival (a): seconds used, held-out error reached, heights."""
    n, d = points.shape
    heights, m, v = (torch.zeros(n, device=points.device) for _ in range(3))
    batch, best, since, spent, step = 10 * n, float("inf"), 0, 0.0, 0
    x = semidiscrete.draw(batch, d, "normal", torch.Generator().manual_seed(1), points.device)
    error = float("inf")
    while spent < limit:
        start = time.perf_counter()
        potential = semidiscrete.Potential(points, heights, heights, "normal", 0.0, 0.0, 0, 0, 1.0)
        gradient = torch.bincount(potential.cell(x), minlength=n) / batch - 1 / n
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        heights = heights - rate * m / (v.sqrt() + 1e-8)
        heights = heights - heights.mean()
        norm, step = float(gradient.norm()), step + 1
        best, since = (norm, 0) if norm < best else (best, since + 1)
        if since > 30:
            batch, best, since = 2 * batch, float("inf"), 0
            x = semidiscrete.draw(batch, d, "normal", torch.Generator().manual_seed(1), points.device)
        spent += time.perf_counter() - start
        if step % 50 == 0:
            error = held_out_error(points, heights, max(40 * n, 100_000))
            if error < tol:
                break
    return spent, error, heights.cpu().numpy()


def pot(points: torch.Tensor, iterations: int, share: float) -> tuple[float, float]:
    """Rival (b): seconds used and held-out error after this many stochastic steps; nan when it left the numbers."""
    import ot

    n, d = points.shape
    source = semidiscrete.draw(20 * n, d, "normal", torch.Generator().manual_seed(1)).double().numpy()
    y = points.cpu().double().numpy()
    start = time.perf_counter()
    cost = -source @ y.T
    cost -= cost.min(1, keepdims=True)  # changes no plan, and keeps exp(−cost/ε) within the numbers
    weights = np.full(len(source), 1 / len(source)), np.full(n, 1 / n)
    dual = ot.stochastic.averaged_sgd_entropic_transport(*weights, cost, share * cost.mean(), iterations)
    spent = time.perf_counter() - start
    if not np.isfinite(dual).all():
        return spent, float("nan")  # its exponentials overflow when ε is small against the costs
    return spent, held_out_error(points, torch.as_tensor(dual, dtype=points.dtype), max(40 * n, 100_000))


def compare(n: int, d: int, options: argparse.Namespace) -> None:
    """One line of the table."""
    points = atoms(n, d, torch.Generator().manual_seed(d)).to(options.device)
    start = time.perf_counter()
    found = semidiscrete.solve(points, source="normal", tol=options.tol, generator=torch.Generator().manual_seed(0))
    ours = time.perf_counter() - start
    print(f"n={n} d={d} ours: {ours:.2f} s, error {found.marginal_error:.3f}, {found.samples / n:.0f} samples an atom")
    limit = options.patience * ours
    runs = [(adam(points, rate, options.tol, limit), rate) for rate in options.rates]
    (spent, error, _), rate = min(
        runs, key=lambda r: (r[0][1] >= options.tol, r[0][0] if r[0][1] < options.tol else r[0][1])
    )
    bound = "" if error < options.tol else ">= "
    print(f"  (a) Adam, best rate {rate:g}: {spent:.2f} s, error {error:.3f}, ratio {bound}{spent / ours:.1f}")
    if options.device == "cpu" and n <= 2000:
        for iterations in options.sgd:
            spent, error = pot(points, iterations, options.epsilon)
            print(f"  (b) POT, {iterations} steps: {spent:.2f} s, error {error:.3f}, ratio {spent / ours:.1f}")


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1000])
    parser.add_argument("--d", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--tol", type=float, default=0.05)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--sgd", type=int, nargs="+", default=[100_000])
    parser.add_argument("--epsilon", type=float, default=0.1, help="ε of POT, as a share of the mean cost")
    parser.add_argument("--patience", type=float, default=20.0, help="a rival's limit, in our own times")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"device {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for n in options.n:
        for d in options.d:
            compare(n, d, options)


if __name__ == "__main__":
    main()
