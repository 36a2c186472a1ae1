"""Exact assignment from good potentials: few arcs, a sparse solver, pricing of all arcs, and a dual certificate.

The sparse half of the solver behind `geodesic.transport`; `_split_cost` is the dense half. An *arc* is a pair (i, j),
kept as the key i·n + j; its *slack* is s_ij = c_ij − u_i − v_j. Potentials are feasible if no slack is negative; an
assignment on arcs of zero slack under feasible potentials is optimal, since Σ c_{i,σ(i)} = Σ u + Σ v ≤ any other cost.

    near_arcs     the arcs of small slack, some 25 a row, out of n²
    feed          at least four for each row and each column
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
Ahuja, Magnanti & Orlin, Network Flows, chs. 5 and 9 (residual graphs, reduced costs).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from geodesic._split_cost import (
    TILE,
    SplitCost,
    anneal,
    column_transform,
    exact_costs,
    identity_start,
    row_transform,
    split_cost,
)

_CROWD = 64  # arcs a row; more near-tight arcs than this mean ties, or a precision too low to tell
_LEAST_ARCS = 4  # of each row and column
_ROUNDS = 40  # of pricing; data need one or two
_DENSE_FALLBACK = 5000  # largest n solved without lapx
_LARGEST_WEIGHT = 1e3  # lapmod refuses costs of a million and more
_TIES_GAP = 3e-10  # of the cost: accepted where there are too many ties to look at each
_MOST_ARCS = 2**26  # kept at once, a gigabyte or two

Reals = float | Float64[np.ndarray, "..."] | Float64[Tensor, "..."]


class Crowded(Exception):
    """More near-tight arcs than can be told apart at the working precision.

    Attributes:
        v: the potentials reached, in the unit of the clouds; None before there are any.
    """

    v: Float64[Tensor, " n"] | None = None


def _thin(near: Bool[Tensor, "rows n"], excess: Float[Tensor, "rows n"], cap: int, dice: torch.Generator) -> None:
    """In rows with more arcs keep about `cap`, the best and a random choice: among ties a random sample connects."""
    count = near.sum(1)
    crowded = (count > cap).nonzero()[:, 0]
    if len(crowded):
        kept = torch.rand(len(crowded), near.shape[1], generator=dice, device=near.device) * count[crowded, None] < cap
        kept.scatter_(1, excess[crowded].argmin(1, keepdim=True), True)
        near[crowded] &= kept


def _near_tiles(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], limit: float, rigorous: bool
) -> Iterator[tuple[int, Float[Tensor, "rows n"], Bool[Tensor, "rows n"]]]:
    """First row, slack − limit and its sign, tile by tile."""
    if rigorous:
        p, q, r, t = cost.error_factors(u, v)
        u, v = u + r, v + t
    for rows in cost.tiles():
        excess = cost.slack(u, v, rows).sub_(limit)
        if rigorous:
            excess.addr_(p[rows], q, alpha=-1.001)  # a little more than p q, for the roundings of this line
        yield rows.start, excess, excess <= 0


def near_arcs(
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    limit: float,
    *,
    rigorous: bool = False,
    cap: int | None = None,
    most: int = _MOST_ARCS,
) -> Int64[np.ndarray, " k"]:
    """Keys of all arcs of slack ≤ limit, sorted; `rigorous` adds the error bound: every other arc truly exceeds it.

    Args:
        cost: the cost matrix.
        u: potentials of the rows.
        v: potentials of the columns.
        limit: of the slack, in the unit of the scaled clouds.
        rigorous: whether to include the arcs whose computed slack exceeds the limit by no more than its error.
        cap: thin rows with more arcs than this (`_thin`).
        most: arcs to keep in all.

    Raises: Crowded if there are more.
    """
    dice, count = torch.Generator(u.device).manual_seed(cost.n), 0
    found = torch.empty(min(max(most, cost.n), cost.n**2), dtype=torch.int64, device=u.device)
    for first, excess, near in _near_tiles(cost, u, v, limit, rigorous):
        if cap is not None:
            _thin(near, excess, cap, dice)
        row, column = near.nonzero(as_tuple=True)
        if count + len(row) > len(found):
            raise Crowded
        found[count : count + len(row)] = (row + first) * cost.n + column
        count += len(row)
    return found[:count].cpu().numpy().copy()


def feed(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, " m"]:
    """The arcs, with the cheapest ones of each row and column that has fewer than four.

    The rows and columns of outliers have hardly an arc within a limit that suits the rest. Left with a dear one, they
    push the potentials of the sparse problem far off, and hundreds of thousands of arcs then price below zero.
    """
    n, least, fed = cost.n, min(_LEAST_ARCS, cost.n), [arcs]

    def starved(nodes: Int64[np.ndarray, " k"]) -> Int64[Tensor, " few"]:
        return torch.from_numpy(np.flatnonzero(np.bincount(nodes, minlength=n) < least)).to(u.device)

    for rows in starved(arcs // n).split(max(1, TILE[u.device.type] // n)):
        cheapest = torch.sub(cost.cross[rows], v).topk(least, 1, largest=False).indices
        fed.append((rows[:, None] * n + cheapest).flatten().cpu().numpy())
    columns = starved(arcs % n)
    best, owner = u.new_full((least, len(columns)), math.inf), columns.new_zeros(least, len(columns))
    for rows in cost.tiles():  # columns picked from whole tiles: one by one, each of their entries misses the cache
        reduced = cost.cross[rows][:, columns].sub_(u[rows, None])
        row = torch.arange(rows.start, rows.stop, device=u.device)[:, None].expand_as(reduced)
        best, place = torch.cat([best, reduced]).topk(least, 0, largest=False)
        owner = torch.cat([owner, row]).gather(0, place)
    fed.append((owner * n + columns).flatten().cpu().numpy())
    return np.unique(np.concatenate(fed))


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
    """a, b with a_i + b_j ≤ w_ij on every arc, equality on the optimal σ, and b ≤ 0. Vectorised Bellman–Ford.

    In the residual graph arc (i, j) leads from column σ(i) to column j and costs w_ij − w_{i,σ(i)}; b_j is the cheapest
    walk to j from anywhere. Invariant of the loop: b_j is the cheapest of at most so many steps.

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
    raise RuntimeError(f"the assignment of {n} points left a cycle of negative cost after {n + 1} sweeps")


def _violated(cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"]) -> Int64[np.ndarray, " k"]:
    """Arcs of slack ≤ 0: all of them if they are few in all, for an outlier's row may have hundreds and need each."""
    try:
        return near_arcs(cost, u, v, 0.0, most=_CROWD * cost.n)
    except Crowded:
        return near_arcs(cost, u, v, 0.0, cap=_CROWD)


def settle(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int64[np.ndarray, " n"]]:
    """Optimal σ and potentials for the matrix as rounded: solve on `arcs`, price all n², add violated ones, repeat.

    Raises: RuntimeError if arcs still price below zero after 40 rounds.
    """
    noise = 8 * cost.unit_roundoff
    for _ in range(_ROUNDS):
        weights = cost.arc_slack(u, v, arcs)
        sigma = match(cost.n, arcs, weights)
        a, b = (torch.from_numpy(z).to(u) for z in potentials(cost.n, arcs, weights, sigma))
        u, v = u + a, v + b
        violated = _violated(cost, u - noise * u.abs(), v - noise * v.abs())
        grown = np.union1d(arcs, violated)
        if len(grown) == len(arcs):
            return u, v, sigma
        added, arcs = len(grown) - len(arcs), grown
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
        near = near_arcs(cost, u, v, margin, rigorous=True, most=_CROWD * n if margin > 0 else _MOST_ARCS)
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
    store_kernel: bool,
) -> tuple[Certified, SplitCost]:
    """All steps at one working precision; `dense` takes all arcs instead of annealing for good ones.

    Raises: Crowded where float32 cannot tell the near-tight arcs apart, or float64 cannot keep them all; RuntimeError
    as the steps.
    """
    cost = split_cost(x, y, dtype)
    n = cost.n
    if dense:
        near_v = torch.zeros(n, dtype=dtype, device=x.device)
        near_u, limit, arcs = row_transform(cost, near_v), 1.0, np.arange(n * n)
    else:
        near_v = _start(cost, u, v)
        straight = identity_start(cost) if near_v is None else None
        near_u, near_v, limit = straight or anneal(cost, near_v, torch.empty_like(cost.cross) if store_kernel else None)
        arcs = np.union1d(near_arcs(cost, near_u, near_v, limit, cap=_CROWD), np.arange(n) * (n + 1))
        if not straight:
            arcs = feed(cost, near_u, near_v, arcs)
    try:
        if dtype == torch.float32 and len(arcs) >= _CROWD * n:
            raise Crowded
        near_u, near_v, sigma = settle(cost, near_u, near_v, arcs)
        return certify(x, y, cost, near_u, near_v, sigma, 0.02 * limit), cost
    except Crowded as crowded:
        if dtype == torch.float32:
            crowded.v = (cost.y_squares + near_v.double()) / cost.scale**2
            raise
    mean = float(exact_costs(x, y, np.arange(n) * n + sigma, cost.scale).mean())
    gap = max(_TIES_GAP * mean, np.finfo(float).tiny)
    found = certify(x, y, cost, near_u, near_v, sigma, -gap)
    near = sum(int(near.sum()) for *_, near in _near_tiles(cost, near_u, near_v, gap, rigorous=True))
    return replace(found, tied_arcs=near - n), cost
