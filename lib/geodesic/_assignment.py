"""Exact assignment from good potentials: few arcs, a sparse solver, pricing of all arcs, and a dual certificate.

The top floor of the solver behind `geodesic.transport`: `_split_cost` makes the matrix, `_annealing` good potentials,
`_arcs` chooses the few pairs that matter. The *slack* of an arc is s_ij = c_ij − u_i − v_j. Potentials are feasible if
no slack is negative; an assignment on arcs of zero slack under feasible potentials is optimal, since
Σ c_{i,σ(i)} = Σ u + Σ v ≤ any other cost.

    match         exact assignment restricted to given arcs
    potentials    its dual, by Bellman–Ford on the residual graph
    settle        price all n² arcs at working precision, add the violated ones, repeat until there is none
    certify       float64 distances of the near-tight arcs, solve again: a dual that is feasible for all arcs
    read_ties     which arcs other optimal assignments use, and the assignment that fixes most points
    solve         the whole road

| symbol | identifier     | shape | meaning                                                          |
|--------|----------------|-------|------------------------------------------------------------------|
| σ      | sigma          | (n,)  | x_i is sent to y_σ(i)                                            |
|        | arcs           | (k,)  | sorted keys i·n + j                                              |
| w      | weights        | (k,)  | slack of the arcs under the current potentials                   |
| a, b   | a, b           | (n,)  | what the potentials of the restricted problem add to u and v     |

Sources: Jonker & Volgenant, Computing 38 (1987), and Volgenant, Computers & Operations Research 23 (1996) (LAPMOD);
Bertsekas, Annals of Operations Research 14 (1988) (price wars, and scaling against them);
Ahuja, Magnanti & Orlin, Network Flows, chs. 5 and 9 (residual graphs, reduced costs).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from geodesic._annealing import anneal, identity_start
from geodesic._arcs import MOST_ARCS, Crowded, feed, near_arcs, near_tiles
from geodesic._split_cost import SplitCost, column_transform, exact_costs, row_transform, split_cost

_CROWD = 64  # arcs a row; more near-tight arcs than this mean ties, or a precision too low to tell
_ROUNDS = 40  # of pricing; data need two to five
_LONG_WARS = 20_000  # points from which rounding the weights pays; at 16,000 it gains nothing, at 50,000 half the time
_FINER = 5  # times the quantum falls from round to round
_WORST = 8  # violated arcs a row that a round adds; the thousands of an outlier's row slow the sparse solver down a lot
_DENSE_FALLBACK = 5000  # largest n solved without lapx
_LARGEST_WEIGHT = 1e3  # lapmod refuses costs of a million and more
_TIES_GAP = 3e-10  # of the cost: accepted where there are too many ties to look at each

Reals = float | Float64[np.ndarray, "..."] | Float64[Tensor, "..."]


def match(n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"]) -> Int64[np.ndarray, " n"]:
    """The cheapest permutation on the given arcs, which must contain one.

    Complete graphs, and machines without lapx, take SciPy's dense solver. SciPy's sparse one is never used: on
    near-ties it does not return.

    Raises: ModuleNotFoundError beyond 5000 points without lapx.
    """
    try:
        from lap import lapmod
    except ImportError:
        lapmod = None
    if len(arcs) == n * n or (lapmod is None and n <= _DENSE_FALLBACK):
        dense = np.full(n * n, np.inf)
        dense[arcs] = weights
        return linear_sum_assignment(dense.reshape(n, n))[1].astype(np.int64)
    if lapmod is None:
        raise ModuleNotFoundError(
            f"{n} points need the sparse solver of lapx (pip install lapx); up to {_DENSE_FALLBACK} can do without"
        )
    positive = weights - weights.min()
    if positive.any():
        positive *= _LARGEST_WEIGHT / positive.max()
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n + 1))
    return lapmod(n, positive, starts.astype(np.int32), column.astype(np.int32), return_cost=False)[0].astype(np.int64)


def potentials(
    n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"], sigma: Int64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """a, b with a_i + b_j ≤ w_ij on every arc, equality on the optimal σ, and b ≤ 0. Bellman–Ford, arcs at once.

    In the residual graph arc (i, j) leads from column σ(i) to column j and costs w_ij − w_{i,σ(i)}; b_j is the cheapest
    walk to j from anywhere. A sweep follows the arcs out of the columns that have fallen since they were last told on.
    Invariant: b_j ≤ the cheapest walk of at most so many steps.

    Raises: RuntimeError if the graph has a negative cycle, i.e. σ is not optimal.
    """
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n + 1))
    matched = weights[np.searchsorted(arcs, np.arange(n) * n + sigma)]
    owner, length = np.argsort(sigma), weights - matched[row]
    rounding = 2.0**-48 * np.abs(weights).max()
    b, told = np.zeros(n), np.zeros(n)
    downhill = length < -rounding
    np.minimum.at(b, column[downhill], length[downhill])
    for _ in range(n + 1):
        fallen = np.flatnonzero(b < told - rounding)
        if not len(fallen):
            return matched - b[sigma], b
        told[fallen] = b[fallen]
        rows = owner[fallen]
        count = starts[rows + 1] - starts[rows]
        out = np.repeat(starts[rows] - count.cumsum() + count, count) + np.arange(count.sum())  # their arcs
        np.minimum.at(b, column[out], np.repeat(told[fallen], count) + length[out])
    raise RuntimeError(f"the assignment of {n} points left a cycle of negative cost after {n + 1} sweeps")


def settle(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"], quantum: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int64[np.ndarray, " n"]]:
    """Optimal σ and potentials for the matrix as rounded: solve on `arcs`, price all n², add violated ones, repeat.

    The weights of a round are multiples of a quantum, which falls to nothing. Lapmod begins as an auction, where rows
    outbid each other by the difference of their two best columns: from near-ties alone such a price war is long, and
    the last small step is the shorter for the large ones before it. Rounding down keeps the duals feasible.

    Raises: RuntimeError if arcs still price below zero after 40 rounds.
    """
    noise = 8 * cost.unit_roundoff
    for _ in range(_ROUNDS):
        weights = cost.arc_slack(u, v, arcs)
        if quantum:
            weights = np.floor(weights / quantum) * quantum
        sigma = match(cost.n, arcs, weights)
        a, b = (torch.from_numpy(z).to(u) for z in potentials(cost.n, arcs, weights, sigma))
        u, v = u + a, v + b
        violated = near_arcs(cost, u - noise * u.abs(), v - noise * v.abs(), 0.0, cap=_WORST)
        grown = np.union1d(arcs, violated)
        if len(grown) == len(arcs) and not quantum:
            return u, v, sigma
        added, arcs = len(grown) - len(arcs), grown
        quantum /= _FINER
        if quantum <= cost.coldest:
            quantum = 0.0
    raise RuntimeError(f"{added} arcs of {cost.n} points still priced below zero after {_ROUNDS} rounds of pricing")


def rounding(cost: Reals, u: Reals, v: Reals) -> Reals:
    """What float64 may make of a slack c − u − v that is zero: 2⁻⁴⁴ of its terms, some 500 roundings."""
    return 2.0**-44 * (cost + abs(u) + abs(v))


@dataclass(frozen=True)
class Certified:
    """An assignment with a dual that is feasible for all arcs, in the unit of the scaled clouds."""

    sigma: Int64[np.ndarray, " n"]
    u: Float64[np.ndarray, " n"]  # of c, not of m
    v: Float64[np.ndarray, " n"]
    cost: float  # mean of c_{i,σ(i)}
    tolerance: float  # slack beyond rounding up to which an arc counts as tight
    tied_arcs: int
    tie_group: Int64[np.ndarray, " n"]


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
    û_i = min(u_i + margin, min over near arcs of c_ij − v_j) is feasible for all n² arcs, whatever the solvers did.
    Where the first term decides, the margin was too small and is widened. A negative margin is a gap of that size,
    accepted in exchange for not looking at every tie.

    Raises: Crowded if more than 64 arcs a row are near-tight (2²⁶ in all under a negative margin).
    """
    n = cost.n
    old_u = (cost.x_squares + u.double()).cpu().numpy()
    old_v = (cost.y_squares + v.double()).cpu().numpy()
    while True:
        near = near_arcs(cost, u, v, margin, rigorous=True, most=_CROWD * n if margin > 0 else MOST_ARCS)
        arcs = np.union1d(near, np.arange(n) * n + sigma)
        if margin <= 0:
            arcs = np.union1d(arcs, np.arange(n) * (n + 1))  # which may be ties that were not looked at
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
            return read_ties(n, arcs, exact, np.minimum(best_u, bound_u), lower_v, sigma, max(-margin, 0.0))
        margin = 2 * (margin + (best_u - bound_u).max())


def read_ties(
    n: int,
    arcs: Int64[np.ndarray, " k"],
    exact: Float64[np.ndarray, " k"],
    u: Float64[np.ndarray, " n"],
    v: Float64[np.ndarray, " n"],
    sigma: Int64[np.ndarray, " n"],
    tolerance: float,
) -> Certified:
    """Which arcs are tight, which of them other optimal assignments use, and the assignment that fixes most points.

    A tight arc (i, j) belongs to some optimal assignment iff i and the owner of j lie on a common cycle of tight arcs:
    the tie groups are the strongly connected components. With a tolerance above zero some ties were not looked at, so
    all points form one group.
    """
    row, column = np.divmod(arcs, n)
    tight = exact - u[row] - v[column] <= tolerance + rounding(exact, u[row], v[column])
    tight |= sigma[row] == column
    owner = np.argsort(sigma)[column]
    graph = coo_array((np.ones(tight.sum()), (row[tight], owner[tight])), shape=(n, n))
    group = connected_components(graph, connection="strong")[1].astype(np.int64)
    tied = tight & (group[row] == group[owner])
    if (tied & (row == column) & (owner != row)).any():
        sigma = match(n, arcs[tight], np.where(row == column, 0.0, 1.0)[tight])
    used = sigma[row] == column
    group = group if tolerance == 0 else np.zeros_like(group)
    return Certified(sigma, u, v, float(exact[used].mean()), tolerance, int((tied & ~used).sum()), group)


def _start(
    cost: SplitCost, u: Float64[Tensor, " n"] | None, v: Float64[Tensor, " n"] | None
) -> Float[Tensor, " n"] | None:
    """Potentials v of m at working precision from potentials of c in the unit of the clouds."""
    dtype, unit = cost.cross.dtype, cost.scale**2
    if v is not None:
        return (v * unit - cost.y_squares).to(dtype)
    return None if u is None else column_transform(cost, (u * unit - cost.x_squares).to(dtype))


def solve(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    dtype: torch.dtype,
    u: Float64[Tensor, " n"] | None,
    v: Float64[Tensor, " n"] | None,
    *,
    dense: bool,
) -> tuple[Certified, SplitCost]:
    """All steps at one working precision; `dense` takes all arcs instead of annealing for good ones.

    Where potentials prove the identity optimal, but for rounding, only the certificate remains to be made.

    Raises: Crowded where float32 cannot tell the near-tight arcs apart, or float64 cannot keep them all; RuntimeError
    as the steps.
    """
    cost = split_cost(x, y, dtype)
    n, quantum = cost.n, 0.0
    near_v = None if dense else _start(cost, u, v)
    straight = None if dense or near_v is not None else identity_start(cost)
    if straight:
        near_u, near_v, limit = straight
    elif dense:
        near_v = torch.zeros(n, dtype=dtype, device=x.device)
        near_u, limit, arcs = row_transform(cost, near_v), 1.0, np.arange(n * n)
    else:
        near_u, near_v, limit = anneal(cost, near_v)
        quantum = limit if n >= _LONG_WARS else 0.0
        arcs = np.union1d(near_arcs(cost, near_u, near_v, limit, cap=_CROWD, at_random=True), np.arange(n) * (n + 1))
        arcs = feed(cost, near_u, near_v, arcs)
    try:
        if straight:
            sigma = np.arange(n)
        else:
            if dtype == torch.float32 and len(arcs) >= _CROWD * n:
                raise Crowded
            near_u, near_v, sigma = settle(cost, near_u, near_v, arcs, quantum)
        return certify(x, y, cost, near_u, near_v, sigma, 0.02 * limit), cost
    except Crowded as crowded:
        if dtype == torch.float32:
            crowded.v = (cost.y_squares + near_v.double()) / cost.scale**2
            raise
    mean = float(exact_costs(x, y, np.arange(n) * n + sigma, cost.scale).mean())
    gap = max(_TIES_GAP * mean, np.finfo(float).tiny)
    found = certify(x, y, cost, near_u, near_v, sigma, -gap)
    near = sum(int(near.sum()) for *_, near in near_tiles(cost, near_u, near_v, gap, rigorous=True))
    return replace(found, tied_arcs=near - n), cost
