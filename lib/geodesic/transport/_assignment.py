"""Exact assignment from good potentials: few arcs, a sparse solver, pricing of all arcs, and a dual certificate.

The top floor of the solver behind `geodesic.transport`: `_cost` makes the matrix, `_annealing` good potentials,
`_arcs` chooses the few pairs that matter, `_certificate` decides among them and proves it. The *slack* of an arc is
s_ij = c_ij − u_i − v_j. Potentials are feasible if no slack is negative; an assignment on arcs of zero slack under
feasible potentials is optimal, since Σ c_{i,σ(i)} = Σ u + Σ v ≤ any other cost.

    settle        price all n² arcs at working precision, add the violated ones, repeat until there is none
    solve         the whole road

| symbol | identifier     | shape | meaning                                                          |
|--------|----------------|-------|------------------------------------------------------------------|
| σ      | sigma          | (n,)  | x_i is sent to y_σ(i)                                            |
|        | arcs           | (k,)  | sorted keys i·n + j                                              |
| w      | weights        | (k,)  | slack of the arcs under the current potentials                   |

Sources: Bertsekas, Annals of Operations Research 14 (1988) (price wars, and scaling against them);
Ahuja, Magnanti & Orlin, Network Flows, chs. 5 and 9 (residual graphs, reduced costs).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from geodesic.transport._annealing import anneal, identity_start
from geodesic.transport._arcs import MOST_ARCS, Crowded, feed, near_arcs, near_tiles, union
from geodesic.transport._certificate import CROWD, Certified, certify, match, potentials, unproved
from geodesic.transport._cost import SplitCost, column_transform, split_cost
from geodesic.transport._exact import Clouds, float64_costs

_PATIENCE = 10  # rounds of pricing before each brings more arcs; data need two to five in all
_LONG_WARS = 20_000  # points from which rounding the weights pays; at 16,000 it gains nothing, at 50,000 half the time
_FINER = 5  # times the quantum falls from round to round
_WORST = 8  # violated arcs a row that a round adds; the thousands of an outlier's row slow the sparse solver down a lot
_MOST_WITHIN = 2**20, 2**28  # pairs looked at one by one within clusters, some 20 s, and their coordinates
_TIES_GAP = 3e-10  # of the spread: accepted where there are too many ties to look at each


def settle(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"], quantum: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int64[np.ndarray, " n"]]:
    """Optimal σ and potentials for the matrix as rounded: solve on `arcs`, price all n², add violated ones, repeat.

    The weights of a round are multiples of a quantum, which falls to nothing. Lapmod begins as an auction, where rows
    outbid each other by the difference of their two best columns: from near-ties alone such a price war is long, and
    the last small step is the shorter for the large ones before it. Rounding down keeps the duals feasible.

    Every round but the last adds an arc, so there is a last. Where rounds are many, each adds more and more arcs; where
    arcs are, what was reached is returned, and the certificate says what it is worth.
    """
    noise, cap = 8 * cost.unit_roundoff, _WORST
    turn = 0
    while True:
        turn += 1
        weights = cost.arc_slack(u, v, arcs)
        if quantum:
            weights = np.floor(weights / quantum) * quantum
        sigma = match(cost.n, arcs, weights)
        a, b, _ = potentials(cost.n, arcs, weights, sigma)
        u, v = u + torch.from_numpy(a).to(u), v + torch.from_numpy(b).to(v)
        if turn % _PATIENCE == 0:
            cap = min(4 * cap, cost.n)
        try:
            violated = near_arcs(cost, u - noise * u.abs(), v - noise * v.abs(), 0.0, cap=cap)
        except Crowded:
            return u, v, sigma
        grown = union(arcs, violated)
        if (len(grown) == len(arcs) and not quantum) or len(grown) > MOST_ARCS:
            return u, v, sigma
        arcs = grown
        quantum /= _FINER
        if quantum <= cost.coldest:
            quantum = 0.0


def _start(
    cost: SplitCost, u: Float64[Tensor, " n"] | None, v: Float64[Tensor, " n"] | None
) -> Float[Tensor, " n"] | None:
    """Potentials v of m at working precision from potentials of c in the unit and the order of the clouds.

    They may be of any size. Optimal ones need no more than the largest cost between their median and the others; what
    lies further off would only drown the rest in its rounding.
    """
    given, squares = (u, cost.x_squares) if v is None else (v, cost.y_squares)
    if given is None:
        return None
    start = (given[cost.order] * cost.scale**2).nan_to_num_() - squares
    reach = 4 * (cost.x_squares.max() + cost.y_squares.max()).item()
    start = (start - start.median()).clamp_(-reach, reach).to(cost.cross.dtype)
    return start if v is not None else column_transform(cost, start)


def _given(cost: SplitCost, v: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """The way back: potentials of c in the unit and the order of the clouds."""
    given = torch.empty_like(cost.y_squares)
    given[cost.order] = (cost.y_squares + v.double()) / cost.scale**2
    return given


@dataclass(frozen=True)
class _Reached:
    """Where the solvers of finite precision arrive, and what the certificate starts from."""

    u: Float[Tensor, " n"]
    v: Float[Tensor, " n"]
    sigma: Int64[np.ndarray, " n"]
    limit: float  # slack within which the optimal arcs lie, and few others


def _identity(cost: SplitCost) -> _Reached | None:
    """Potentials that prove the identity optimal, but for rounding; None if there seem to be none."""
    start = identity_start(cost)
    return start and _Reached(*start[:2], np.arange(cost.n), start[2])


def _from_potentials(cost: SplitCost, near_v: Float[Tensor, " n"] | None) -> _Reached:
    """Anneal for good potentials, choose a few arcs, and settle them.

    Raises: Crowded where float32 cannot tell the near-tight arcs apart.
    """
    n = cost.n
    near_u, near_v, limit = anneal(cost, near_v)
    arcs = union(near_arcs(cost, near_u, near_v, limit, cap=CROWD, at_random=True), np.arange(n) * (n + 1))
    arcs = feed(cost, near_u, near_v, arcs)
    if cost.cross.dtype == torch.float32 and len(arcs) >= CROWD * n:
        raise Crowded(_given(cost, near_v))
    return _Reached(*settle(cost, near_u, near_v, arcs, limit if n >= _LONG_WARS else 0.0), limit)


def _among_ties(clouds: Clouds, cost: SplitCost, reached: _Reached) -> Certified:
    """Where too many arcs are tied to look at each: accept a small excess, and count them as the product sees them.

    Raises: Crowded where even so there are too many to keep.
    """
    n, u, v = cost.n, reached.u, reached.v
    costs = float64_costs(clouds, np.arange(n) * n + reached.sigma, 0.0)
    gap = max(_TIES_GAP * (float(costs.high.mean()) - cost.offset), np.finfo(float).tiny)
    found = certify(clouds, cost, u, v, reached.sigma, -gap)
    near = sum(int(near.sum()) for *_, near in near_tiles(cost, u, v, gap, rigorous=True))
    return replace(found, ties=replace(found.ties, arcs=near - n))


def _within_clusters(clouds: Clouds, cost: SplitCost, reached: _Reached, otherwise: Certified) -> Certified:
    """Where clusters are so tight that the product sees none of their inside: look at all pairs within them.

    Every other arc has more slack than u will rise. What the certificate needs is differences of coordinates, and these
    hold all the digits that the clouds have.
    """
    most = min(_MOST_WITHIN[0], _MOST_WITHIN[1] // clouds.x.shape[1])
    try:
        return certify(clouds, cost, reached.u, reached.v, reached.sigma, 0.02 * reached.limit, max(most, cost.n))
    except Crowded:
        return otherwise


def solve(
    clouds: Clouds, dtype: torch.dtype, u: Float64[Tensor, " n"] | None, v: Float64[Tensor, " n"] | None
) -> tuple[Certified, SplitCost]:
    """All steps at one working precision.

    Where potentials prove the identity optimal, but for rounding, only the certificate remains to be made.

    Raises: Crowded where float32 cannot tell the near-tight arcs apart, with the potentials reached.
    """
    cost = split_cost(clouds.x, clouds.y, dtype, clouds.order)
    start = _start(cost, u, v)
    reached = (_identity(cost) if start is None else None) or _from_potentials(cost, start)
    try:
        return certify(clouds, cost, reached.u, reached.v, reached.sigma, 0.02 * reached.limit), cost
    except Crowded:
        if dtype == torch.float32:
            raise Crowded(_given(cost, reached.v)) from None
    try:
        found = _among_ties(clouds, cost, reached)
    except Crowded:
        found = unproved(clouds, reached.sigma)
    return found if found.certified else _within_clusters(clouds, cost, reached, found), cost
