"""The steps of the exact assignment solver behind `geodesic.transport`; book/assignment.md tells the same story.

Problem: minimise Σ_i c_{i,σ(i)} over permutations σ, c_ij = |x_i − y_j|². Dual: maximise Σ u_i + Σ v_j subject to
u_i + v_j ≤ c_ij. The *slack* of arc (i, j) is s_ij = c_ij − u_i − v_j; an assignment on arcs of zero slack under
feasible potentials is optimal. The road, one function a step:

    split_cost     c_ij = |x_i|² + |y_j|² + m_ij, m = −2⟨x_i, y_j⟩ by one matrix product, with a rigorous error bound
    anneal         annealed, over-relaxed Sinkhorn: potentials under which optimal arcs have small slack
    near_arcs      the arcs of small slack, some 25 a row, out of n²
    match          exact assignment restricted to those arcs
    potentials     its dual, by Bellman–Ford on the residual graph
    settle         price all n² arcs, add the violated ones, repeat until there is none
    certify        float64 distances of the near-tight arcs, solve again, and a dual that is feasible for all arcs

| symbol | identifier    | shape  | meaning                                                                        |
|--------|---------------|--------|--------------------------------------------------------------------------------|
| m      | cross         | (n, n) | −2⟨x_i, y_j⟩ of the centred and scaled clouds, working precision               |
| u, v   | u, v          | (n,)   | potentials less the squares: the dual of m. Here u_i + \\|x_i\\|² is that of c |
| ε      | epsilon       | scalar | temperature of the annealing, in units of cost                                 |
| h      | unit_roundoff | scalar | 2⁻²⁴ or 2⁻⁵³                                                                   |
|        | arcs          | (k,)   | sorted keys i·n + j (int64)                                                    |
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TILE_ELEMENTS = 2**22  # of a row tile: 16 MiB in float32, small enough for a last-level cache
TARGET_ARCS = 24  # a row; annealing stops once so few lie within 4 ε
CROWD = 64  # arcs a row; more near-tight arcs than this mean ties, or a precision too low to tell
SWEEPS = 8  # Sinkhorn sweeps a temperature
RELAXATION = 1.5  # 1 is plain Sinkhorn, 1.8 was seen to diverge
ROUNDS = 40  # of pricing; data need one or two
DENSE_FALLBACK = 5000  # largest n solved without lapx
LAPMOD_LARGEST = 1e3  # lapmod refuses costs of a million and more


def tiles(n: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` that cover range(n)."""
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def tile_rows(n: int) -> int:
    """Rows of a tile of an n × n matrix."""
    return max(1, min(n, TILE_ELEMENTS // n))


# ---------------------------------------------------------------------------------------------------- the cost matrix
@dataclass(frozen=True)
class SplitCost:
    """c_ij ≈ x_squares_i + y_squares_j + cross_ij of the clouds after centring and multiplication by `scale`."""

    cross: Float[Tensor, "n n"]
    x_squares: Float64[Tensor, " n"]
    y_squares: Float64[Tensor, " n"]
    dimension: int
    scale: float  # a power of two: scaling is exact

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.cross)

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number of the working precision."""
        return torch.finfo(self.cross.dtype).eps / 2

    @property
    def spread(self) -> float:
        """Mean of |x_i|² + |y_j|²: the size against which float64 rounding is measured."""
        return (self.x_squares.mean() + self.y_squares.mean()).item()

    def slack(self, u: Float[Tensor, " n"], v: Float[Tensor, " n"], rows: slice) -> Float[Tensor, "rows n"]:
        """m_ij − u_i − v_j on a tile of rows."""
        return torch.sub(self.cross[rows], v).sub_(u[rows, None])

    def arc_slack(
        self, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
    ) -> Float64[np.ndarray, " k"]:
        """m_ij − u_i − v_j on single arcs, rounded as `slack` rounds."""
        row, column = (torch.from_numpy(z).to(u.device) for z in np.divmod(arcs, self.n))
        return (self.cross[row, column] - v[column] - u[row]).double().cpu().numpy()

    def error_factors(
        self, u: Float[Tensor, " n"], v: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Vectors p, q, r, t with |slack_ij as computed − its true value| ≤ p_i q_j + r_i + t_j.

        A product of length d in any order of summation errs by at most d h |x_i||y_j| (to first order); the roundings
        of the centred coordinates, of the squares and of the two subtractions are what the other constants cover.
        """
        h, dtype = self.unit_roundoff, self.cross.dtype
        product = math.sqrt(2 * (self.dimension + 8) * h)
        p, q = product * self.x_squares.sqrt(), product * self.y_squares.sqrt()
        r, t = 6 * h * (self.x_squares + u.abs()), 6 * h * (self.y_squares + v.abs())
        return p.to(dtype), q.to(dtype), r.to(dtype), t.to(dtype)


@contextmanager
def _matmul_precision(level: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _centre_and_scale(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], float]:
    """One shift for both clouds (distances stay, cancellation goes) and the power of two that brings them to size 1."""
    centre = ((x.mean(0, dtype=torch.float64) + y.mean(0, dtype=torch.float64)) / 2).to(x.dtype)
    reach = max((z.amax(0) - centre).maximum(centre - z.amin(0)).amax().item() for z in (x, y))
    return centre, 2.0 ** -math.frexp(reach)[1] if reach > 0 else 1.0


def _product(left: Float[Tensor, "rows d"], right: Float[Tensor, "n d"], out: Float[Tensor, "rows n"], level: str) -> None:
    with _matmul_precision(level):
        torch.mm(left, right.T, out=out)


def _is_float32_product(
    left: Float[Tensor, "rows d"], right: Float[Tensor, "n d"], out: Float[Tensor, "rows n"]
) -> bool:
    """Compare a 64 × 64 block with float64: bfloat16 and TF32 products miss this tolerance by a factor of ten."""
    i = torch.linspace(0, len(left) - 1, min(64, len(left))).long()
    j = torch.linspace(0, len(right) - 1, min(64, len(right))).long()
    a, b = left[i].double(), right[j].double()
    allowed = 2.0**-20 * a.norm(dim=1)[:, None] * b.norm(dim=1)
    return bool(((a @ b.T - out[i][:, j]).abs() <= allowed).all())


def split_cost(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], dtype: torch.dtype) -> SplitCost:
    """Centre, scale and multiply the clouds. Invariant: `SplitCost.error_factors` bounds the error of every entry.

    On a CPU the precision flag "medium" lets oneDNN multiply, twice as fast on some processors and in true float32 on
    most; where it means bfloat16 the first tile shows it and "highest" is used. O(n² d) operations.
    """
    n, d = x.shape
    centre, scale = _centre_and_scale(x, y)
    wide = torch.promote_types(x.dtype, dtype)
    rows = max(1, min(n, 2**24 // d))

    def prepared(z: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        return z.to(wide).sub(centre).mul_(scale).to(dtype)

    cross = torch.empty(n, n, dtype=dtype, device=x.device)
    right = torch.empty(n, d, dtype=dtype, device=x.device)
    x_squares = torch.empty(n, dtype=torch.float64, device=x.device)
    y_squares = torch.empty_like(x_squares)
    for tile in tiles(n, rows):
        right[tile] = prepared(y[tile])
        y_squares[tile] = torch.linalg.vector_norm(right[tile], dim=1, dtype=torch.float64).square_()
    level = "medium" if dtype == torch.float32 and x.device.type == "cpu" else "highest"
    for tile in tiles(n, rows):
        left = prepared(x[tile])
        x_squares[tile] = torch.linalg.vector_norm(left, dim=1, dtype=torch.float64).square_()
        left.mul_(-2)
        _product(left, right, cross[tile], level)
        if tile.start == 0 and level == "medium" and not _is_float32_product(left, right, cross[tile]):
            level = "highest"
            _product(left, right, cross[tile], level)
    return SplitCost(cross, x_squares, y_squares, d, scale)


def exact_costs(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], arcs: Int64[np.ndarray, " k"], scale: float
) -> Float64[np.ndarray, " k"]:
    """scale² |x_i − y_j|² in float64, differences first: correct to about 2⁻⁵³ of itself whatever the offset. O(k d)."""
    row, column = (torch.from_numpy(z).to(x.device) for z in np.divmod(arcs, len(x)))
    out = torch.empty(len(arcs), dtype=torch.float64, device=x.device)
    for tile in tiles(len(arcs), max(1, (2**19 if x.device.type == "cpu" else 2**27) // x.shape[1])):
        difference = x[row[tile]].double().sub_(y[column[tile]])
        out[tile] = torch.linalg.vecdot(difference, difference)
    return (out * scale**2).cpu().numpy()


# ------------------------------------------------------------------------------------------------- first potentials
def row_transform(cost: SplitCost, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """u_i = min_j (m_ij − v_j): the largest u for which (u, v) is feasible."""
    return torch.cat([torch.sub(cost.cross[rows], v).amin(1) for rows in tiles(cost.n, tile_rows(cost.n))])


def column_transform(cost: SplitCost, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """v_j = min_i (m_ij − u_i): the largest v for which (u, v) is feasible."""
    v = torch.full_like(u, math.inf)
    for rows in tiles(cost.n, tile_rows(cost.n)):
        v = v.minimum(torch.sub(cost.cross[rows], u[rows, None]).amin(0))
    return v


def sinkhorn_stage(
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    epsilon: float,
    relaxation: float,
    kernel: Float[Tensor, "n n"] | None,
) -> tuple[Float[Tensor, " n"], float]:
    """New v after `SWEEPS` scalings of K_ij = exp(−slack_ij / ε), and how far the columns were from balance at first.

    a ← a (a·K b)^−ω, b ← b (b·Kᵀa)^−ω, both in one pass over the rows; v ← v − ε log Kᵀa at the end. Requires u, v
    feasible, so that K ≤ 1. `kernel` keeps K between the sweeps; None recomputes it tile by tile, in half the memory.
    """
    a, b = torch.ones_like(u), torch.ones_like(v)
    imbalance = math.nan
    for sweep in range(SWEEPS + 1):
        omega = 1.0 if sweep < 2 else relaxation
        mass = torch.zeros_like(v)
        for rows in tiles(cost.n, tile_rows(cost.n)):
            if kernel is None or sweep == 0:
                out = None if kernel is None else kernel[rows]
                tile = torch.add(v / epsilon, cost.cross[rows], alpha=-1 / epsilon, out=out)
                tile.add_(u[rows, None] / epsilon).exp_()
            else:
                tile = kernel[rows]
            a[rows] *= (a[rows] * (tile @ b)).clamp_min_(1e-12).pow_(-omega)
            mass += a[rows] @ tile
        if sweep == 0:
            imbalance = (mass - 1).abs().mean().item()
        if sweep < SWEEPS:
            b *= (b * mass).clamp_min_(1e-12).pow_(-omega)
    return v - epsilon * mass.clamp_min_(1e-30).log_(), imbalance


def _sample_slack(cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Float[Tensor, "rows n"]:
    return cost.slack(u, v, slice(None, None, max(1, cost.n // 500)))


def anneal(
    cost: SplitCost, v: Float[Tensor, " n"] | None, kernel: Float[Tensor, "n n"] | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float]:
    """Potentials and a slack limit within which nearly all optimal arcs lie: lower ε threefold until few arcs do.

    With potentials v from a neighbouring problem the annealing starts at the lowest temperature at which they balance
    the kernel's columns, which for good ones is the last.

    Returns: u, v (feasible to rounding) and the limit 4 ε.
    """
    warm = v is not None
    if v is None:
        v = column_transform(cost, row_transform(cost, -cost.y_squares.to(cost.cross.dtype)))
    u = row_transform(cost, v)
    sample = _sample_slack(cost, u, v)
    highest = sample.mean().item() / 15
    lowest = max(1e-4 * highest, 16 * cost.unit_roundoff * cost.spread)
    epsilon = highest
    if warm:
        epsilon = max(lowest, sample.kthvalue(min(TARGET_ARCS, cost.n), dim=1).values.median().item() / 4)
    relaxation = RELAXATION
    while epsilon > lowest:
        candidate, imbalance = sinkhorn_stage(cost, u, v, epsilon, relaxation, kernel)
        if warm and imbalance > 0.5 and epsilon < highest:
            epsilon *= 3
            continue
        warm = False
        if not candidate.isfinite().all():
            epsilon, relaxation = 3 * epsilon, 1.0
            continue
        v = candidate
        u = row_transform(cost, v)
        sample = _sample_slack(cost, u, v)
        if (sample <= 4 * epsilon).sum().item() <= TARGET_ARCS * len(sample):
            break
        epsilon /= 3
    return u, v, 4 * max(epsilon, lowest)


# ------------------------------------------------------------------------------------------------- arcs and matchings
def _thin(near: Bool[Tensor, "rows n"], excess: Float[Tensor, "rows n"], cap: int, dice: torch.Generator) -> None:
    """Keep about `cap` arcs, the best and a random choice, of rows that have more: ties are alike, a sample connects."""
    crowd = near.sum(1, keepdim=True)
    if (crowd > cap).any():
        near &= torch.rand(near.shape, generator=dice, device=near.device) * crowd < cap
        near.scatter_(1, excess.argmin(1, keepdim=True), True)


def near_arcs(
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    limit: float,
    *,
    rigorous: bool = False,
    cap: int | None = None,
) -> Int64[np.ndarray, " k"]:
    """Keys of all arcs of slack ≤ limit, sorted. `rigorous` adds the error bound: every other arc truly exceeds it."""
    if rigorous:
        p, q, r, t = cost.error_factors(u, v)
        u, v = u + r, v + t
    dice = torch.Generator(u.device).manual_seed(cost.n)
    found = []
    for rows in tiles(cost.n, tile_rows(cost.n)):
        excess = cost.slack(u, v, rows).sub_(limit)
        if rigorous:
            excess.addr_(p[rows], q, alpha=-1.001)
        near = excess <= 0
        if cap is not None:
            _thin(near, excess, cap, dice)
        row, column = near.nonzero(as_tuple=True)
        found.append((row + rows.start) * cost.n + column)
    return torch.cat(found).cpu().numpy()


def match(n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"]) -> Int64[np.ndarray, " n"]:
    """The cheapest permutation on the given arcs (which contain one): σ with x_i → y_σ(i).

    Complete graphs and machines without lapx take SciPy's dense solver. SciPy's sparse one is never used: it does not
    return on near-ties.
    """
    try:
        from lap import lapmod
    except ImportError:
        lapmod = None
    if len(arcs) == n * n or (lapmod is None and n <= DENSE_FALLBACK):
        dense = np.full(n * n, np.inf)
        dense[arcs] = weights
        return linear_sum_assignment(dense.reshape(n, n))[1].astype(np.int64)
    if lapmod is None:
        raise ModuleNotFoundError(f"n = {n} points need the sparse solver of lapx (`pip install lapx`); "
                                  f"without it up to {DENSE_FALLBACK} can be assigned")
    positive = weights - weights.min()
    if positive.any():
        positive *= LAPMOD_LARGEST / positive.max()
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n + 1))
    return lapmod(n, positive, starts.astype(np.int32), column.astype(np.int32), return_cost=False)[0].astype(np.int64)


def potentials(
    n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"], sigma: Int64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """a, b with a_i + b_j ≤ w_ij on every arc and equality on the optimal σ; b ≤ 0. Vectorised Bellman–Ford.

    b_j is the shortest way to column j in the residual graph, where arc (i, j) leads from σ(i) to j at w_ij − w_{i,σ(i)}.

    Raises: RuntimeError if the graph has a negative cycle, i.e. σ is not optimal.
    """
    row, column = np.divmod(arcs, n)
    matched = weights[np.searchsorted(arcs, np.arange(n) * n + sigma)]
    order = np.argsort(column, kind="stable")
    source, length = sigma[row[order]], (weights - matched[row])[order]
    starts = np.searchsorted(column[order], np.arange(n))
    rounding = 2.0**-48 * np.abs(weights).max()
    b = np.zeros(n)
    for _ in range(n + 1):
        shorter = np.minimum(b, np.minimum.reduceat(b[source] + length, starts))
        if (b - shorter).max() <= rounding:
            return matched - shorter[sigma], shorter
        b = shorter
    raise RuntimeError(f"the assignment of {n} points left a cycle of negative cost; please report the clouds")


def settle(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int64[np.ndarray, " n"]]:
    """Optimal σ and potentials for the matrix m as rounded: solve on `arcs`, price all n², add violated ones, repeat."""
    for _ in range(ROUNDS):
        weights = cost.arc_slack(u, v, arcs)
        sigma = match(cost.n, arcs, weights)
        a, b = (torch.from_numpy(z).to(u) for z in potentials(cost.n, arcs, weights, sigma))
        u, v = u + a, v + b
        noise = 8 * cost.unit_roundoff
        violated = near_arcs(cost, u - noise * u.abs(), v - noise * v.abs(), 0.0, cap=CROWD)
        grown = np.union1d(arcs, violated)
        if len(grown) == len(arcs):
            return u, v, sigma
        arcs = grown
    raise RuntimeError(f"{len(violated)} of {cost.n}² arcs still price below zero after {ROUNDS} rounds")


# ------------------------------------------------------------------------------------------------------ certificate
Real = float | Float64[np.ndarray, "..."] | Float64[Tensor, "..."]


def rounding(cost: Real, u: Real, v: Real) -> Real:
    """What float64 may make of a slack c − u − v that is zero: 2⁻⁴⁴ of its terms, some 500 roundings."""
    return 2.0**-44 * (cost + abs(u) + abs(v))


@dataclass(frozen=True)
class Certified:
    """An assignment with a dual that is feasible for all arcs, in the unit of the scaled clouds."""

    sigma: Int64[np.ndarray, " n"]
    u: Float64[np.ndarray, " n"]  # of c, not of m
    v: Float64[np.ndarray, " n"]
    primal: float  # mean of c_{i,σ(i)}
    tolerance: float  # slack beyond rounding up to which an arc counts as tight
    tied_arcs: int
    tie_group: Int64[np.ndarray, " n"]


class Crowded(Exception):
    """More near-tight arcs than can be told apart at the working precision."""


def certify(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    sigma: Int64[np.ndarray, " n"],
    margin: float,
) -> Certified:
    """Solve on the near-tight arcs with float64 distances, and bound all others.

    Every arc outside the near-tight set has true slack ≥ margin under (u, v). Bellman–Ford lowers v only, so
    û_i = min(u_i + margin, min over near arcs of c_ij − v_j) is feasible for all n² arcs, whatever the solver did. Where
    the first term decides, the margin was too small and is widened. A negative margin is a gap of that size, accepted
    in exchange for not having to look at every tie.

    Raises: Crowded if more than `CROWD` arcs a row are near-tight and the margin is positive.
    """
    n = cost.n
    old_u = (cost.x_squares + u.double()).cpu().numpy()
    old_v = (cost.y_squares + v.double()).cpu().numpy()
    diagonal = np.arange(n) * (n + 1)
    while True:
        near = near_arcs(cost, u, v, margin, rigorous=True)
        if len(near) > CROWD * n and margin > 0:
            raise Crowded
        arcs = np.union1d(near, np.concatenate([diagonal, np.arange(n) * n + sigma]))
        row, column = np.divmod(arcs, n)
        exact = exact_costs(x, y, arcs, cost.scale)
        weights = exact - old_u[row] - old_v[column]
        sigma = match(n, arcs, weights)
        lower_v = old_v + potentials(n, arcs, weights, sigma)[1]
        gauge = lower_v.mean()  # (u + t, v − t) is the same dual; small numbers round less
        lower_v -= gauge
        best_u = np.minimum.reduceat(exact - lower_v[column], np.searchsorted(row, np.arange(n)))
        bound_u = old_u + gauge + margin
        if margin <= 0 or (best_u <= bound_u).all():
            break
        margin = 2 * (margin + (best_u - bound_u).max())
    return _read_ties(n, arcs, exact, np.minimum(best_u, bound_u), lower_v, sigma, max(-margin, 0.0))


def _read_ties(
    n: int,
    arcs: Int64[np.ndarray, " k"],
    exact: Float64[np.ndarray, " k"],
    u: Float64[np.ndarray, " n"],
    v: Float64[np.ndarray, " n"],
    sigma: Int64[np.ndarray, " n"],
    tolerance: float,
) -> Certified:
    """Which arcs are tight, which of them other optimal assignments use, and the assignment that fixes most points."""
    row, column = np.divmod(arcs, n)
    tight = exact - u[row] - v[column] <= tolerance + rounding(exact, u[row], v[column])
    tight |= sigma[row] == column
    sigma, group = favour_identity(n, arcs[tight], sigma)
    used = sigma[row] == column
    tied = tight & ~used & (group[row] == group[np.argsort(sigma)[column]])
    group = group if tolerance == 0 else np.zeros_like(group)  # some ties were not looked at: any exchange is possible
    return Certified(sigma, u, v, float(exact[used].mean()), tolerance, int(tied.sum()), group)


def favour_identity(
    n: int, tight: Int64[np.ndarray, " k"], sigma: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Among all assignments on tight arcs one with the most fixed points, and the groups that may trade partners.

    A tight arc (i, j) belongs to some optimal assignment iff i and the owner of j lie on a common cycle of tight arcs:
    the groups are the strongly connected components.
    """
    row, column = np.divmod(tight, n)
    owner = np.argsort(sigma)[column]
    graph = coo_array((np.ones(len(tight)), (row, owner)), shape=(n, n))
    group = connected_components(graph, connection="strong")[1].astype(np.int64)
    identity = row == column
    if (identity & (owner != row) & (group[row] == group[owner])).any():
        sigma = match(n, tight, np.where(identity, 0.0, 1.0))
    return sigma, group


def solve(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    dtype: torch.dtype,
    u: Float64[Tensor, " n"] | None,
    v: Float64[Tensor, " n"] | None,
    *,
    dense_below: int,
    memory: float,
) -> tuple[Certified, SplitCost]:
    """All steps at one working precision. Raises Crowded when float32 cannot tell the near-tight arcs apart."""
    cost = split_cost(x, y, dtype)
    n = cost.n
    if n <= dense_below:
        zero = torch.zeros(n, dtype=dtype, device=x.device)
        u_near, v_near, limit, arcs = row_transform(cost, zero), zero, 1.0, np.arange(n * n)
    else:
        start = None
        if v is not None:
            start = (v * cost.scale**2 - cost.y_squares).to(dtype)
        elif u is not None:
            start = column_transform(cost, (u * cost.scale**2 - cost.x_squares).to(dtype))
        item = cost.cross.element_size()
        kernel = torch.empty_like(cost.cross) if item * n * (2 * n + x.shape[1]) <= memory else None
        u_near, v_near, limit = anneal(cost, start, kernel)
        del kernel
        arcs = near_arcs(cost, u_near, v_near, limit, cap=CROWD)
        if dtype == torch.float32 and len(arcs) > 2 * TARGET_ARCS * n:
            raise Crowded
    arcs = np.union1d(arcs, np.arange(n) * (n + 1))
    u_near, v_near, sigma = settle(cost, u_near, v_near, arcs)
    try:
        return certify(x, y, cost, u_near, v_near, sigma, 0.02 * limit), cost
    except Crowded:
        if dtype == torch.float32:
            raise
        mean = exact_costs(x, y, np.arange(n) * n + sigma, cost.scale).mean()
        return certify(x, y, cost, u_near, v_near, sigma, -3e-10 * float(mean)), cost
